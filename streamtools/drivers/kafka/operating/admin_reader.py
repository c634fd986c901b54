"""AdminReader: reads what waits for a group without joining it, for `peek`, `move` and `discard`.

AdminViewer shows what waits and what arrives, and changes nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka

from streamtools.delivery import Delivery, Settlement, publish_first
from streamtools.drivers.kafka.brokers.cluster import EARLIEST, LATEST, Cluster
from streamtools.drivers.kafka.brokers.topics import Topics
from streamtools.drivers.kafka.client.batches import Buffers
from streamtools.drivers.kafka.client.connect import connection, started, stopped
from streamtools.drivers.kafka.client.consumers import ConsumerClient
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, refusal
from streamtools.drivers.kafka.names import RETRY, is_retry_topic, reader_of
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.operating.groups import Commit, Groups, Progress, busy
from streamtools.drivers.kafka.producing.record import ProducerRecord, not_held, records_of
from streamtools.drivers.kafka.producing.sender import Sender
from streamtools.drivers.kafka.records import (
    COPY_ROOM,
    GROUP,
    QUEUE,
    RETRIES,
    decode_origin,
    header_texts,
    id_of,
    now_ms,
    read_record,
)
from streamtools.errors import QueueError, SendError
from streamtools.message import Message
from streamtools.settings import KafkaSettings

#: Seconds in which a first fetch surely finds what is there.
FETCH: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RedrivenMessage(Message):
    """A message on its way back to the group that had rejected it."""

    @classmethod
    def of(cls, message: Message) -> RedrivenMessage:
        """The same message, marked so."""
        return cls(**{f.name: getattr(message, f.name) for f in fields(Message)})


class AdminReader:
    """Reads what a topic's group had not finished at `open()`; it can send it elsewhere, and commit for the group.

    The group is the one that the topic is for: the one named as it, or that whose retries it holds.

    Parameters:
        queue: the topic.
        cluster: a connected one.
        settings: of the connections that it opens itself.
        client_id: shown by the broker.
    """

    def __init__(self, queue: str, cluster: Cluster, settings: KafkaSettings, *, client_id: str | None) -> None:
        self._queue = queue
        self._group = reader_of(queue)
        self._cluster = cluster
        self._groups = Groups(cluster)
        self._settings = settings
        self._client_id = client_id or "streamtools-admin"
        self._offsets: dict[TopicPartition, Offsets] = {}
        self._ends: dict[TopicPartition, float] = {}
        self._commits: dict[TopicPartition, Commit] = {}  # of the group, as last seen
        self._records: dict[TopicPartition, dict[int, Any]] = {}  # taken and not finished
        self._there: dict[tuple[str, str], bool] = {}  # whether groups and their retry topics exist
        self._client: ConsumerClient | None = None
        self._sender: Sender | None = None

    async def open(self) -> None:
        """Find out what waits."""
        with self._plain_errors():
            await self._open()

    async def _open(self) -> None:
        topic = (await self._cluster.topics([self._queue])).get(self._queue)
        if topic is None:
            raise Topics(self._cluster.client, self._settings).missing(self._queue)
        self._commits = commits = await self._groups.committed(self._group, topic.partitions)
        begins = await self._cluster.offsets(topic.partitions, EARLIEST)
        ends = await self._cluster.offsets(topic.partitions, LATEST)
        consumer = AIOKafkaConsumer(
            **await connection(self._settings, self._client_id),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        client = ConsumerClient(consumer, self._settings)
        await started(consumer, self._settings)
        self._client = client
        client.hand_over(Buffers)
        consumer.assign(topic.partitions)
        for partition in topic.partitions:
            progress = Progress(begins[partition], ends[partition], commits.get(partition))
            self._ends[partition] = self._end(ends[partition])
            self._offsets[partition] = Offsets(progress.start, progress.metadata)
            self._records[partition] = {}
            consumer.seek(partition, progress.start)

    async def receive(self, max_messages: int = 1, *, timeout: float | None = None) -> list[Delivery]:
        """The next messages, the oldest first among those fetched together; none when all were read."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while unread := await self._unread():
            rest = 1.0 if deadline is None else deadline - loop.time()
            if rest <= 0:
                break
            with self._plain_errors():
                found = await self._connected.get_many(*unread, timeout_ms=int(1000 * rest), max_records=max_messages)
            # Each partition's records keep their order, whatever their times.
            records = heapq.merge(*found.values(), key=lambda record: record.timestamp or 0)
            taken = [self._take(record) for record in records]
            if deliveries := [delivery for delivery in taken if delivery is not None]:
                return deliveries
        return []

    async def close(self) -> None:
        """Close the connections; what was not settled has not changed."""
        client, self._client = self._client, None
        sender, self._sender = self._sender, None
        try:
            if sender is not None:
                await sender.close()
        finally:
            if client is not None:
                await stopped(client.consumer)

    async def _stop(self) -> None:
        """Nothing is under way between two calls."""

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        """Send what the settlements send, then commit.

        Raises:
            QueueError: the group has consumers, or somebody else has committed for it meanwhile.
            SendError: some messages were refused; only those stay in the topic.
        """
        await self._opened()
        await self._check_alone()
        held, refused = await publish_first(self._publish, settlements)
        await self._finish(held)
        if refused is not None:
            raise refused

    async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
        sender = await self._opened()
        copies = [await self._copy(*each) for each in zip(settlements, messages, strict=True)]
        try:
            await sender.publish(copies)
        except SendError as error:
            error.messages = not_held(messages, copies)
            raise

    # --- how --------------------------------------------------------------------------------------

    def _end(self, found: int) -> float:
        """The offset where reading a partition stops; `found` is its end at `open()`."""
        return found

    @property
    def _connected(self) -> ConsumerClient:
        assert self._client is not None, "it is not open"
        return self._client

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except CLIENT_ERRORS as error:
            raise refusal(error, self._settings) from error

    async def _copy(self, settlement: Settlement, message: Message) -> ProducerRecord:
        record = settlement.delivery.token
        [item] = records_of([message], read=record.headers)
        told = header_texts(record.headers, (GROUP, RETRIES))
        item.is_copy = True
        if message.error is not None:  # it stays rejected, and a later redrive needs to know where it came from
            item.headers += decode_origin(record, _place(record)).headers
            item.headers += [(name, text.encode()) for name, text in told.items()]
        if isinstance(message, RedrivenMessage) and await self._goes_back(told, item.topic):
            item.headers += [*decode_origin(record, _place(record)).headers, (QUEUE, item.topic.encode())]
            item.topic, item.partition, item.timestamp = told[RETRIES], 0, now_ms()
        return item

    async def _goes_back(self, told: Mapping[str, str], topic: str) -> bool:
        """The group that had rejected a message of this topic, as its headers say, still reads its retries."""
        return (
            GROUP in told
            and RETRIES in told
            and await self._exists(told[GROUP], told[RETRIES])
            and await self._waits_for(told[GROUP], told[RETRIES], topic)
        )

    async def _exists(self, group: str, topic: str) -> bool:
        """The group and its retry topic still exist; else nobody would read what is sent there."""
        if (group, topic) not in self._there:
            known = group in await self._groups.names() and topic in await self._cluster.topics([topic])
            self._there[group, topic] = known
        return self._there[group, topic]

    async def _waits_for(self, group: str, retries: str, topic: str) -> bool:
        """`retries` is where retries of this topic by this group wait.

        The names stand in headers that anybody may have written: a message must not get into the retries of another
        group. A group that reads several topics must have committed something of this one.
        """
        if retries in (topic + RETRY, f"{topic}{RETRY}.{group}"):
            return reader_of(retries) == group
        if not is_retry_topic(retries) or reader_of(retries) != group:
            return False
        found = await self._cluster.topics([topic])
        partitions = [TopicPartition(topic, number) for number in found[topic].leaders] if found else []
        return bool(await self._groups.committed(group, partitions))

    async def _opened(self) -> Sender:
        if self._sender is None:
            # Checked before anything is sent: what cannot be committed would be sent again each time.
            if (await self._groups.describe(self._group)).active:
                raise busy(self._group, self._settings)
            sender = Sender(self._settings, self._client_id, room=COPY_ROOM)
            await sender.open()
            self._sender = sender
        return self._sender

    async def _check_alone(self) -> None:
        """Check that nobody else has committed for the group: they would send the same messages.

        Raises:
            QueueError: somebody has.
        """
        if await self._groups.committed(self._group, self._ends) != self._commits:
            raise QueueError(
                f"Another redrive, move or purge of {self._queue!r} is at work. Wait for its end, and repeat this."
            )

    async def _unread(self) -> list[TopicPartition]:
        """Partitions that were not read up to their end; the others are paused."""
        found = []
        for partition, end in self._ends.items():
            if await self._connected.consumer.position(partition) < end:
                found.append(partition)
            else:
                self._connected.consumer.pause(partition)
        return found

    def _take(self, record: Any) -> Delivery | None:
        partition = _place(record)
        if record.offset >= self._ends[partition] or not self._offsets[partition].take(record.offset):
            return None
        self._records[partition][record.offset] = record
        message, trouble = read_record(record, partition)
        return Delivery(message, token=record, decode_error=trouble)

    async def _finish(self, settlements: Sequence[Settlement]) -> None:
        touched = set()
        for settlement in settlements:
            record = settlement.delivery.token
            partition = _place(record)
            if self._offsets[partition].finish(record.offset):
                del self._records[partition][record.offset]
            touched.add(partition)  # even if it was finished before: that commit may have failed
        for partition in touched:
            await self._make_room(partition)
        commits = {p: self._offsets[p].commit()[:2] for p in touched}
        try:
            await self._groups.commit(self._group, commits)
            self._commits |= commits
        except kafka.UnknownMemberIdError as error:
            raise busy(self._group, self._settings) from error
        except CLIENT_ERRORS as error:
            raise refusal(error, self._settings) from error

    async def _make_room(self, partition: TopicPartition) -> None:
        """If the commit cannot tell all that is finished, write the messages that were left once more at the end.

        A commit has room for some thousand gaps between finished messages. The messages in the gaps are finished
        where they were, once they are written again.
        """
        offsets, left = self._offsets[partition], self._records[partition]
        if offsets.commit()[2] or self._sender is None:
            return
        await self._sender.publish([_same_record(record) for record in left.values()])
        for offset in list(left):
            offsets.finish(offset)
        left.clear()


class AdminViewer(AdminReader):
    """Shows what waits for a topic's group, and then what arrives; changes nothing.

    Parameters:
        queue: the topic.
        settings: of its connections.
        client_id: shown by the broker.
    """

    def __init__(self, queue: str, settings: KafkaSettings, *, client_id: str | None) -> None:
        super().__init__(queue, Cluster(settings, client_id or "streamtools-admin"), settings, client_id=client_id)

    async def open(self) -> None:
        """Connect, and find out what waits.

        Raises:
            ConnectError: no broker lets us in.
            QueueError: there is no such topic, or it may not be read.
        """
        await self._cluster.open()
        try:
            await super().open()
        except BaseException:
            await self.close()
            raise

    async def receive(self, max_messages: int = 1, *, timeout: float | None = None) -> list[Delivery]:
        """The next messages that wait or arrive; none if none came for `timeout` seconds."""
        return await super().receive(max_messages, timeout=None if timeout is None else max(timeout, FETCH))

    async def close(self) -> None:
        """Close the connections."""
        try:
            await super().close()
        finally:
            await self._cluster.stop()

    def _end(self, found: int) -> float:
        return math.inf


def _same_record(record: Any) -> ProducerRecord:
    place = _place(record)
    found = decode_origin(record, place).headers
    origin = [(name, value) for name, value in found if name not in dict(record.headers)]
    return ProducerRecord(
        id=id_of(place, record.offset),
        topic=record.topic,
        key=record.key,
        value=record.value,
        headers=[*record.headers, *origin],
        timestamp=record.timestamp,
        partition=record.partition,
    )


def _place(record: Any) -> TopicPartition:
    return TopicPartition(record.topic, record.partition)
