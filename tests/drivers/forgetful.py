"""A driver that keeps no promise to who is killed: what it hands out is gone from the queue at once."""

from __future__ import annotations

from collections.abc import Sequence

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from streamtools.verdicts import ACK


class ForgetfulConsumer(SQLiteConsumer, protocol="forgetful"):
    async def _receive(self, limit: int) -> Sequence[Delivery]:
        batch = await super()._receive(limit)
        await super()._settle([Settlement(delivery, ACK) for delivery in batch])
        return batch

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        """It is done already."""


class ForgetfulProducer(SQLiteProducer, protocol="forgetful"):
    pass
