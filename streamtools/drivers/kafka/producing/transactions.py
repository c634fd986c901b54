"""TransactionalProducer: messages to many topics, and a group's offsets, visible together or not at all.

A transactional id has one owner. Whoever takes it over (`fence`) ends what its last owner had open, and Kafka takes
nothing more from that one. If a transaction fails and its fate is open, its producer is used no more; the next owner
finds out by taking the id over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.protocol.transaction import InitProducerIdRequest

from streamtools.drivers.kafka.client.connect import connection, started
from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.client.producers import (
    abandoned,
    abort_what_was_added,
    is_in_transaction,
    next_number,
    rewind,
    take_identity,
)
from streamtools.drivers.kafka.client.record_batch import RecordBatch
from streamtools.drivers.kafka.errors import BATCH_REFUSALS, CLIENT_ERRORS, RECORD_REFUSALS, client_error, plain
from streamtools.drivers.kafka.producing.batches import BatchQueue, confirm
from streamtools.drivers.kafka.producing.partitions import PartitionChooser
from streamtools.drivers.kafka.producing.record import Records, refused, singles
from streamtools.drivers.kafka.producing.unconfirmed import ByteLimit, UnconfirmedBatch
from streamtools.drivers.kafka.records import COPY_ROOM
from streamtools.errors import ConnectionLost, StreamToolsError
from streamtools.settings import KafkaSettings

#: Seconds after which Kafka ends a transaction whose owner is silent; readers wait for it so long.
TIMEOUT: Final = 60.0
#: Seconds between two attempts to take an id over while its last transaction is being ended.
FENCE_INTERVAL: Final = 0.03
#: The coordinator is elsewhere, or not ready: ask again.
_AGAIN: Final[tuple[type[Exception], ...]] = (
    kafka.ConcurrentTransactions,
    kafka.CoordinatorLoadInProgressError,
    kafka.CoordinatorNotAvailableError,
    kafka.NotCoordinatorError,
    kafka.NodeNotReadyError,
    kafka.RequestTimedOutError,
    kafka.KafkaConnectionError,
)

#: A batch was refused, by itself or because another topic was; the producer can abort and go on.
_REFUSED: Final[tuple[type[Exception], ...]] = (*BATCH_REFUSALS, kafka.OperationNotAttempted)

T = TypeVar("T")

#: A producer id and its epoch.
Identity = tuple[int, int]


async def fence(client: Any, transactional_id: str, *, timeout: float) -> Identity:
    """Take a transactional id over: what its last owner had open is aborted, or its commit is completed.

    Parameters:
        client: the library's, connected.
        timeout: seconds.

    Raises:
        TimeoutError: it could not be had in time.
    """
    request = InitProducerIdRequest(transactional_id, int(1000 * TIMEOUT))
    async with asyncio.timeout(timeout):
        while True:
            try:
                node = await client.coordinator_lookup(CoordinationType.TRANSACTION, transactional_id)
                answer = await client.send(node, request, group=ConnectionGroup.COORDINATION)
                error = kafka.for_code(answer.error_code)
                if error is kafka.NoError:
                    return answer.producer_id, answer.producer_epoch
                raise error()
            except _AGAIN:
                await asyncio.sleep(FENCE_INTERVAL)


class TransactionalProducer:
    """A producer with a transactional id, for one transaction after the other.

    Parameters:
        transactional_id: its last owner is fenced off by `open()`.
        identity: what `fence` has returned for it, if that was called before.

    Attributes:
        broken: it must not be used any more: the fate of its transaction is open, or it was fenced off.
    """

    def __init__(
        self, settings: KafkaSettings, transactional_id: str, client_id: str, *, identity: Identity | None = None
    ) -> None:
        self._settings = settings
        self._id = transactional_id
        self._client_id = client_id
        self._identity = identity
        self._max_size = settings.max_message + COPY_ROOM
        self._partitions = PartitionChooser(settings)
        self._producer: Any = None
        self.broken: bool = False
        self._closed = False

    async def open(self) -> None:
        """Connect, and fence off the id's last owner unless that was done.

        Raises:
            ConnectError: no broker lets us in.
            Closed: `close()` was called meanwhile.
        """
        producer = AIOKafkaProducer(
            **await connection(self._settings, self._client_id),
            transactional_id=self._id,
            transaction_timeout_ms=int(1000 * TIMEOUT),
            max_request_size=self._max_size,
        )
        harden(producer.client)
        abort_what_was_added(producer)
        if self._identity is not None:
            take_identity(producer, self._identity)
        await started(
            producer,
            self._settings,
            timeout=self._settings.connect_timeout + TIMEOUT,
            closed=lambda: self._closed,
        )
        self._producer = producer

    async def begin(self) -> None:
        """Begin a transaction."""
        await self._do(self._producer.begin_transaction())

    async def send(self, batch: Sequence[Records]) -> None:
        """Send as part of the transaction, which must be aborted when this fails.

        Raises:
            SendError: naming the messages that Kafka refuses.
            ConnectionLost: their fate is open.
        """
        batch, missing = await self._partitions.know(batch, self._producer)
        pending = UnconfirmedBatch(sum([item.number for item in batch]), ByteLimit())
        queues: dict[tuple[str, int], BatchQueue] = {}

        def queue_of(topic: str, partition: int) -> BatchQueue:
            return queues.setdefault((topic, partition), BatchQueue())

        self._partitions.distribute(batch, pending, queue_of, missing=missing, max_size=self._max_size)
        if not pending.failed:
            await asyncio.gather(*(self._send_all(*place, queue) for place, queue in queues.items()))
        if pending.failed:
            raise refused(pending.failed, self._settings, batch)

    async def add_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]], group: str) -> None:
        """Commit a group's offsets as part of the transaction."""
        await self._do(self._producer.send_offsets_to_transaction(dict(offsets), group))

    async def commit(self) -> None:
        """Make all of it visible.

        Raises:
            ConnectionLost: its fate is open.
        """
        await self._do(self._producer.commit_transaction())

    async def abort(self) -> None:
        """Forget all of it; if that fails, Kafka does it when the id is taken over, or after `TIMEOUT`."""
        try:
            await self._do(self._producer.abort_transaction())
        except StreamToolsError:
            self.broken = True

    async def close(self) -> None:
        """End at once; an open transaction is aborted by Kafka."""
        self._closed = True
        producer, self._producer = self._producer, None
        await self._partitions.close()
        if producer is not None:
            await abandoned(producer)

    async def _do(self, work: Awaitable[T], *, spared: tuple[type[Exception], ...] = ()) -> T:
        """Do it in time. After any other error than `spared`, the producer is broken."""
        try:
            async with asyncio.timeout(self._settings.request_timeout * 2):
                return await work
        except asyncio.CancelledError:
            self.broken = True
            raise
        except CLIENT_ERRORS as error:  # a TimeoutError is an OSError
            self.broken = self.broken or not isinstance(error, spared)
            raise self._lost(error) from error

    def _lost(self, error: BaseException) -> StreamToolsError:
        if isinstance(error, kafka.ProducerFenced | kafka.InvalidProducerEpoch):
            return ConnectionLost(f"Another has taken over the transactional id {self._id!r}, or its time was over.")
        return ConnectionLost(f"A transaction of {self._id!r} at {self._settings.safe_url} failed: {plain(error)}")

    async def _send_all(self, topic: str, partition: int, queue: BatchQueue) -> None:
        """Send batch after batch to one partition, until one is refused for another reason than a record of it."""
        while queue.waiting and not self.broken and is_in_transaction(self._producer):
            batch, written = queue.build(self._producer)
            if not batch:
                continue
            number = next_number(self._producer, topic, partition)
            error = await self._send_batch(written, topic, partition, batch)
            if error is None:
                continue
            rewind(self._producer, topic, partition, number)
            if isinstance(error, kafka.OperationNotAttempted):  # another topic was refused: nothing more is sent
                return
            if not isinstance(error, RECORD_REFUSALS):
                batch += queue.take_all()
            elif len(alone := singles(batch)) > 1:
                queue.halve(alone)
                continue
            for item in singles(batch):
                item.fail(error)

    async def _send_batch(
        self, written: RecordBatch, topic: str, partition: int, batch: Sequence[Records]
    ) -> BaseException | None:
        """Send it; returns why it was refused, if it was."""

        async def send() -> int:
            future = await self._producer.send_batch(written, topic, partition=partition)
            offset: int = (await future).offset
            return offset

        try:
            confirm(batch, partition, await self._do(send(), spared=_REFUSED))
        except ConnectionLost as lost:
            if isinstance(lost.__cause__, _REFUSED):
                return lost.__cause__
            raise
        return None


async def opened(producer: TransactionalProducer, settings: KafkaSettings) -> TransactionalProducer:
    """Open it; nothing is left open when that fails."""
    try:
        await producer.open()
    except CLIENT_ERRORS as error:
        await producer.close()
        raise client_error(error, settings) from error
    except BaseException:
        await producer.close()
        raise
    return producer


def same_kafka(one: KafkaSettings, other: KafkaSettings) -> bool:
    """Both name a broker in common."""
    return not set(one.addresses).isdisjoint(other.addresses)
