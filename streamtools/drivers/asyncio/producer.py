"""AsyncIOProducer: puts messages into the queues of this process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Unpack

from streamtools.driver import Options
from streamtools.drivers.asyncio.broker import Broker
from streamtools.errors import QueueError, SendError
from streamtools.features import Features
from streamtools.message import Message
from streamtools.parameters import ProducerParameters, SendManyParameters, SendParameters
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.settings import AsyncIOSettings

FEATURES = Features(groups=True, redelivery=True, atomic=True, topics=True, cancel=True, tombstones=True)


class AsyncIOProducer(Producer, protocol="asyncio"):
    """Sends within this process; waits while the queue is full."""

    features = FEATURES
    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings
    _broker: Broker

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        def __init__(self, queue: str, **options: Unpack[ProducerParameters]) -> None: ...
        async def send(  # type: ignore[override]
            self, payload: object, **options: Unpack[SendParameters]
        ) -> Receipt: ...
        async def send_many(  # type: ignore[override]
            self, payloads: Iterable[object], **options: Unpack[SendManyParameters]
        ) -> list[Receipt]: ...

    async def _open(self) -> None:
        self._broker = Broker.of(self.settings)
        self._broker.declare(self.queue, self.declare)

    async def _send(self, batch: Sequence[Message], options: Options) -> None:
        for position, message in enumerate(batch):
            try:
                await self._broker.put(message)
            except QueueError as error:
                left = batch[position:]
                raise SendError(str(error), refused=[m.id for m in left], messages=left) from error
