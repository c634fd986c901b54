"""KafkaProducer: sends to topics, each message confirmed by all replicas that are in sync."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field, field_validator

from streamtools.drivers.kafka.features import FEATURES
from streamtools.drivers.kafka.names import check_kafka_name
from streamtools.drivers.kafka.outgoing import outgoing
from streamtools.drivers.kafka.publisher import Publisher
from streamtools.drivers.kafka.records import Placed
from streamtools.drivers.kafka.topics import Topic
from streamtools.errors import Closed, ConnectionLost, SendError, StreamToolsError
from streamtools.message import Message
from streamtools.options import Options
from streamtools.producer import Producer, Receipt
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Sends with wait=False under way at most; the next one waits.
UNDER_WAY: Final = 10_000


def is_async(method: str | None) -> bool | None:
    """Whether `method` says not to wait; None for what is another protocol's (`method="POST"`)."""
    return {"sync": False, "async": True}.get(method or "")


class ProducerOptions(Options):
    """What a producer of Kafka takes besides.

    Attributes:
        partitions: of the topic, where it is made; `KAFKA_PARTITIONS`, else the broker's default, when None.
        replication: copies of each partition, likewise.
        method: "sync" confirms each send; "async" is `wait=False` on every send.
    """

    partitions: Annotated[int | None, Field(ge=1)] = None
    replication: Annotated[int | None, Field(ge=1)] = None
    method: str = "sync"


class SendOptions(Options):
    """What one send to Kafka takes besides.

    Attributes:
        partition: where it goes; by its key, or anywhere, when None.
        timestamp: the record's own, in seconds since the epoch; now when None.
        wait: False returns at once with a receipt that can be awaited.
        method: "sync" is `wait=True`, "async" is `wait=False`.
    """

    partition: Annotated[int | None, Field(ge=0)] = None
    timestamp: Annotated[float | None, Field(ge=0)] = None
    wait: bool | None = None
    method: str | None = None

    @field_validator("timestamp")
    @classmethod
    def _is_seconds(cls, value: float | None) -> float | None:
        if value is not None and value > 1e11:
            raise ValueError("in seconds since the epoch, not in milliseconds")
        return value


@dataclass(frozen=True, slots=True)
class KafkaReceipt(Receipt):
    """Where a message stands.

    Attributes:
        partition: of the topic.
        offset: in the partition; None when Kafka held it already from an attempt before.
    """

    partition: int | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class PendingReceipt(Receipt):
    """Awaiting it returns the KafkaReceipt, or raises what `send` would have raised."""

    task: asyncio.Task[list[Receipt]] = field(repr=False, compare=False)
    position: int = field(repr=False, compare=False)

    async def _confirmed(self) -> Receipt:
        # The task goes on when who waits for it is cancelled.
        return (await asyncio.shield(self.task))[self.position]


class KafkaProducer(Producer, protocol="kafka"):
    """Sends to Kafka: idempotent, confirmed by all in-sync replicas. Options: `ProducerOptions`, `SendOptions`."""

    features = FEATURES
    settings_class: ClassVar[type[KafkaSettings]] = KafkaSettings
    options_class: ClassVar[type[ProducerOptions]] = ProducerOptions
    send_options_class: ClassVar[type[SendOptions]] = SendOptions
    settings: KafkaSettings
    options: ProducerOptions
    _publisher: Publisher | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._under_way: set[asyncio.Task[list[Receipt]]] = set()
        self._failed: list[SendError] = []

    async def flush(self) -> None:
        """Return when all that was sent with `wait=False` is confirmed.

        Raises:
            SendError: naming those that failed since the last `flush()`.
        """
        while self._under_way:
            await asyncio.wait(set(self._under_way))
        failed, self._failed = self._failed, []
        if failed:
            refused = [id for error in failed for id in error.refused]
            unknown = [id for error in failed for id in error.unknown]
            raise SendError(str(failed[0]), refused=refused, unknown=unknown) from failed[0]

    async def close(self) -> None:
        """Wait for what was sent with `wait=False`, then close the connection. Safe to repeat."""
        try:
            await self.flush()
        except SendError as error:
            log.error("%r: sent with wait=False and not held by Kafka: %s", self, error)  # noqa: TRY400
        await super().close()

    # --- hooks ------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._close()
        publisher = Publisher(self.settings, self.client_id or f"streamtools-{self.queue}")
        try:
            topics = await publisher.open()
            if self.declare is not False:
                topic = Topic(
                    name=self.queue, partitions=self.options.partitions, replication=self.options.replication
                )
                await topics.declare([topic], self.declare)
        except BaseException:
            await publisher.close()
            raise
        self._publisher = publisher

    async def _send(self, batch: Sequence[Message], options: SendOptions) -> Sequence[Receipt] | None:
        if not self._waits(options):
            return await self._send_later(batch, options)
        if self._publisher is None:
            if self._closed:
                raise Closed(f"{self!r} was closed; call open() to use it again.")
            raise ConnectionLost(f"{self!r} is not connected.")
        items = outgoing(_placed(batch, options))
        await self._publisher.publish(items)
        return [KafkaReceipt(i.id, i.topic, i.partition, i.offset) for i in items]

    async def _close(self) -> None:
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.close()

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_kafka_name(queue)

    # --- without waiting --------------------------------------------------------------------------

    def _waits(self, options: SendOptions) -> bool:
        if options.wait is not None:
            return options.wait
        said = is_async(options.method)
        return not (is_async(self.options.method) if said is None else said)

    async def _send_later(self, batch: Sequence[Message], options: SendOptions) -> list[Receipt]:
        while len(self._under_way) >= UNDER_WAY:
            await asyncio.wait(set(self._under_way), return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._deliver(batch, options.model_copy(update={"wait": True})))
        self._under_way.add(task)
        task.add_done_callback(self._sent_later)
        return [PendingReceipt(m.id, m.queue, task, position) for position, m in enumerate(batch)]

    def _sent_later(self, task: asyncio.Task[list[Receipt]]) -> None:
        self._under_way.discard(task)
        if task.cancelled():
            return
        error = task.exception()  # looked at: flush() tells it, whoever awaits the receipt or not
        if isinstance(error, SendError):
            self._failed.append(error)
        elif isinstance(error, StreamToolsError):
            self._failed.append(SendError(str(error)))


def _placed(batch: Sequence[Message], options: SendOptions) -> Sequence[Message]:
    if options.partition is None and options.timestamp is None:
        return batch
    return [Placed.of(message, options.partition, options.timestamp) for message in batch]
