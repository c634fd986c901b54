"""Puller: what a consumer without a handler does: it receives deliveries, and settles each when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from streamtools.delivery import Delivery, Settlement
from streamtools.engine.settling import Decider, OneSettlement
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.verdicts import DROP, RELEASE, Verdict


class Pulled(Protocol):
    """What the puller needs of a consumer's driver, or of what stands before it."""

    async def _receive(self, limit: int) -> Sequence[Delivery]: ...
    async def _poll(self, limit: int) -> Sequence[Delivery]: ...
    async def _settle(self, settlements: Sequence[Settlement]) -> None: ...


class Owner(Protocol):
    """What the puller needs of its consumer."""

    drops_expired: ClassVar[bool]

    @property
    def _transport(self) -> Pulled: ...
    def _here(self) -> Any: ...


class Puller:
    """Receives deliveries that somebody settles manually.

    Parameters:
        owner: the consumer.
        decider: makes the settlement for a verdict.
    """

    def __init__(self, owner: Owner, decider: Decider) -> None:
        self.decider = decider
        self._owner = owner
        self._lock = asyncio.Lock()
        self._settle_manually = self.settle  # one object: deliveries show by it whose they are

    @property
    def is_busy(self) -> bool:
        """Somebody waits for deliveries."""
        return self._lock.locked()

    def has_given(self, delivery: Delivery) -> bool:
        """Whether a delivery was received here."""
        return delivery.settle_manually is self._settle_manually

    async def pull(self, limit: int, deadline: float | None, *, at_once: bool) -> list[Delivery]:
        """Up to `limit` deliveries, none when the time is over; messages that have expired are dropped.

        Parameters:
            deadline: on the event loop's clock; None for no limit.
            at_once: only what is there now.

        Raises:
            ConnectError: the connection ended.
        """
        while True:
            batch = await self._pull(limit, deadline, at_once)
            expired = [each for each in batch if each.message.expired] if self._owner.drops_expired else ()
            if not expired:
                return batch
            fresh = [delivery for delivery in batch if delivery not in expired]
            settle = self._owner._transport._settle
            try:
                await stray_cancellation_as_lost(settle([Settlement(delivery, DROP) for delivery in expired]))
            except asyncio.CancelledError:
                await settle([Settlement(delivery, RELEASE) for delivery in fresh])
                raise
            if fresh:
                return fresh

    async def _pull(self, limit: int, deadline: float | None, at_once: bool) -> list[Delivery]:
        if at_once and self._lock.locked():
            return []  # another waits, so there is nothing
        transport = self._owner._transport
        receive = transport._poll if at_once else transport._receive
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                batch = await stray_cancellation_as_lost(receive(limit))
        except TimeoutError:
            return []
        for delivery in batch:
            delivery.settle_manually = self._settle_manually
        return list(batch)

    async def settle(self, delivery: Delivery, verdict: Verdict) -> None:
        """Perform a verdict."""
        self._owner._here()
        settlement = self.decider.settlement(delivery, delivery.message, verdict, None)
        await OneSettlement(self._owner._transport._settle, self.decider, settlement).perform()
