"""PartitionSender: sends the messages of one partition in order, one batch at a time.

Messages are idempotent: the library numbers the messages of a partition, so that a batch which it repeats is written
once. A batch that failed leaves a hole in these numbers, and Kafka then takes no other from the same producer. After
a plain refusal the numbers are taken back; after any other failure the sending goes on with a new producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final, Protocol

from aiokafka import errors as kafka

from streamtools.drivers.kafka.client.producers import next_number, rewind, use_topics
from streamtools.drivers.kafka.client.record_batch import RecordBatch
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, RECORD_REFUSALS, REFUSALS, client_error, plain
from streamtools.drivers.kafka.producing.batches import BatchQueue, confirm
from streamtools.drivers.kafka.producing.deleted_topics import DeletionWatch, deleted
from streamtools.drivers.kafka.producing.partitions import PartitionChooser
from streamtools.drivers.kafka.producing.record import Records, singles
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.errors import Closed, StreamToolsError
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds before a batch is sent again by a new producer; doubled each time, up to the second number.
AGAIN_DELAY: Final = 0.05
LONGEST_AGAIN_DELAY: Final = 1.0


class Producers(Protocol):
    """Where a PartitionSender gets the producing client from."""

    settings: KafkaSettings
    partitions: PartitionChooser

    async def producer(self) -> Any:
        """The producer to use now; None after the end."""

    async def renew(self, failed: Any) -> None:
        """Use a new producer instead of `failed`."""

    def redistribute(self, batch: Sequence[Records]) -> None:
        """Hand these over once more, as their topic has fewer partitions now."""


class PartitionSender(BatchQueue):
    """The messages of one partition, and the task that sends them while there are any."""

    def __init__(self, producers: Producers, topic: str, partition: int) -> None:
        super().__init__()
        self.topic: str = topic
        self.partition: int = partition
        self.task: asyncio.Task[None] | None = None
        self._producers = producers
        self._failures = 0  # since the last confirmation

    @property
    def is_sending(self) -> bool:
        """Something is on its way, or waits."""
        return self.task is not None and not self.task.done()

    def wake(self) -> None:
        """Begin to send what waits; to be called when nothing is sent."""
        self.task = asyncio.create_task(self._run(), name=f"streamtools-{self.topic}-{self.partition}")

    async def _run(self) -> None:
        while self.waiting:
            producer = await self._producers.producer()
            if producer is None:
                return
            if self._producers.partitions.lacks(self.topic, self.partition):
                self._redistribute()
                return
            batch, written = self.build(producer)
            if batch:
                await self._send(producer, batch, written)

    async def _send(self, producer: Any, batch: list[Records], written: RecordBatch) -> None:
        number = next_number(producer, self.topic, self.partition)
        use_topics(producer, (self.topic,))  # a new producer knows of none
        try:
            future = await producer.send_batch(written, self.topic, partition=self.partition)
            with DeletionWatch(producer, self.topic, self.partition, self._producers.settings):
                offset = (await future).offset
        except asyncio.CancelledError:
            if asked_to_stop():
                _fail(batch, Closed("The producer was closed while this was sent."))
                raise
            await self._send_again(batch, producer, kafka.KafkaConnectionError("the client library gave it up"))
        except CLIENT_ERRORS as error:
            await self._failed(batch, producer, number, error)
        except Exception as error:  # a fault of the library: whoever waits is told, and sends again
            _fail([*batch, *self.take_all()], client_error(error, self._producers.settings))
            raise
        else:
            self._failures = 0
            confirm(batch, self.partition, offset)

    async def _failed(self, batch: list[Records], producer: Any, number: int, error: BaseException) -> None:
        partitions = self._producers.partitions
        partitions.look_again(producer.client.cluster)
        if partitions.lacks(self.topic, self.partition):  # the topic was made anew, with fewer
            self.put_back(batch)
            return
        if isinstance(error, REFUSALS):
            rewind(producer, self.topic, self.partition, number)
        if isinstance(error, RECORD_REFUSALS) and len(alone := singles(batch)) > 1:
            self.halve(alone)
        elif isinstance(error, REFUSALS):
            _refuse(batch, error)
        elif isinstance(error, kafka.UnknownTopicOrPartitionError):
            partitions.forget(self.topic)
            _refuse([*batch, *self.take_all()], deleted(self.topic, partitions.count(self.topic)))
            await self._producers.renew(producer)
        else:
            await self._send_again(batch, producer, error)

    async def _send_again(self, batch: list[Records], producer: Any, error: BaseException) -> None:
        """Put the batch before all others, to be sent by a new producer as long as somebody waits for it."""
        level = logging.WARNING if not self._failures else logging.DEBUG  # logged once
        log.log(
            level, "A batch of %d for %s-%d is sent again: %s", len(batch), self.topic, self.partition, plain(error)
        )
        self.put_back(batch)
        try:
            await self._producers.renew(producer)
        except StreamToolsError as trouble:
            _fail(self.take_all(), trouble)
            return
        await asyncio.sleep(min(AGAIN_DELAY * 2**self._failures, LONGEST_AGAIN_DELAY))
        self._failures = min(self._failures + 1, 10)

    def _redistribute(self) -> None:
        """Rare: the partition is gone; what waits goes to where its key belongs now."""
        log.warning(
            "The topic %r was deleted and made anew while messages were sent to it, with %s partition(s).",
            self.topic,
            self._producers.partitions.count(self.topic),
        )
        self._producers.redistribute(self.take_all())

    async def close(self) -> None:
        """End; what is not confirmed fails."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        _fail(self.take_all(), Closed("The producer was closed before this was confirmed."))


def _refuse(batch: Sequence[Records], error: BaseException) -> None:
    for item in singles(batch):
        item.fail(error)


def _fail(batch: Sequence[Records], error: BaseException) -> None:
    """Nothing is known about these; whoever waits for them gets the error."""
    for item in batch:
        item.pending.limit.free(item.size)
        item.pending.fail(error)
