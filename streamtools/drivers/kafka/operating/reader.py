"""AdminReader: what waits for a group, read from outside it, for `peek`, `move` and `discard`.

AdminViewer shows it, and what arrives, to those who only look.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.brokers.cluster import EARLIEST, LATEST, Cluster
from streamtools.drivers.kafka.brokers.topics import Topics
from streamtools.drivers.kafka.client.batches import Answers, Buffers
from streamtools.drivers.kafka.client.connect import connection, get_many, started, stopped
from streamtools.drivers.kafka.client.guard import harden
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

#: Seconds in which a first fetch has surely found what is there.
FETCH: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RedrivenMessage(Message):
    """A message on its way back to the group that had rejected it."""

    @classmethod
    def of(cls, message: Message) -> RedrivenMessage:
        """The message, on its way back."""
        return cls(**{f.name: getattr(message, f.name) for f in fields(Message)})


class AdminReader:
    """Reads what waited in a topic when it was opened, for the group that the topic is for; joins no group.

    Parameters:
        queue: the topic.
        cluster: connected.
        settings: of the connections that it opens itself.
        client_id: as the broker shows them.
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
        self._commits: dict[TopicPartition, Commit] = {}  # of the group, as far as we know
        self._records: dict[TopicPartition, dict[int, Any]] = {}  # taken and not finished
        self._there: dict[tuple[str, str], bool] = {}  # whether groups and their topics for retries are
        self._consumer: Any = None
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
        harden(consumer._client)
        answers = Answers(consumer._client)
        await started(consumer, self._settings)
        self._consumer = consumer
        consumer._fetcher._records = Buffers(consumer._fetcher._records, answers)
        consumer.assign(topic.partitions)
        for partition in topic.partitions:
            progress = Progress(begins[partition], ends[partition], commits.get(partition))
            self._ends[partition] = self._end(ends[partition])
            self._offsets[partition] = Offsets(progress.start, progress.metadata)
            self._records[partition] = {}
            consumer.seek(partition, progress.start)

    async def receive(self, max_messages: int = 1, *, timeout: float | None = None) -> list[Delivery]:
        """The next that wait, the oldest first among those that came together; none at the end."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while unread := await self._unread():
            rest = 1.0 if deadline is None else deadline - loop.time()
            if rest <= 0:
                break
            with self._plain_errors():
                found = await get_many(self._consumer, *unread, timeout_ms=int(1000 * rest), max_records=max_messages)
            # Each partition's records stay in their order, whatever their times.
            records = heapq.merge(*found.values(), key=lambda record: record.timestamp or 0)
            taken = [self._take(record) for record in records]
            if deliveries := [delivery for delivery in taken if delivery is not None]:
                return deliveries
        return []

    async def close(self) -> None:
        """Let go; nothing that was not settled has changed."""
        consumer, self._consumer = self._consumer, None
        sender, self._sender = self._sender, None
        try:
            if sender is not None:
                await sender.close()
        finally:
            if consumer is not None:
                await stopped(consumer)

    async def _stop(self) -> None:
        """There is nothing under way between two calls."""

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        """Send what is to go out, then commit.

        Raises:
            QueueError: the group has consumers, or somebody else has moved it meanwhile.
            SendError: a message was refused; it and nothing else stays.
        """
        sender = await self._opened()
        await self._check_alone()
        copies = [await self._copies(settlement) for settlement in settlements]
        batch = [item for items in copies for item in items]
        try:
            if batch:
                await sender.publish(batch)
        except SendError as error:
            error.messages = not_held([m for s in settlements for m in s.outgoing], batch)
            kept = [all(item.error is None for item in items) for items in copies]
            await self._finish([s for s, is_held in zip(settlements, kept, strict=True) if is_held])
            raise
        await self._finish(settlements)

    # --- how --------------------------------------------------------------------------------------

    def _end(self, found: int) -> float:
        """Where reading a partition stops."""
        return found

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except CLIENT_ERRORS as error:
            raise refusal(error, self._settings) from error

    async def _copies(self, settlement: Settlement) -> list[ProducerRecord]:
        record = settlement.delivery.token
        items = records_of(settlement.outgoing, read=record.headers)
        told = header_texts(record.headers, (GROUP, RETRIES))
        for item, message in zip(items, settlement.outgoing, strict=True):
            item.is_copy = True
            if message.error is not None:  # it is put aside, and goes home from there
                item.headers += decode_origin(record, _place(record)).headers
                item.headers += [(name, text.encode()) for name, text in told.items()]
        if GROUP in told and RETRIES in told and await self._reads(told[GROUP], told[RETRIES]):
            origin = decode_origin(record, _place(record))
            back = [i for i, m in zip(items, settlement.outgoing, strict=True) if isinstance(m, RedrivenMessage)]
            for item in back:
                if not await self._waits_for(told[GROUP], told[RETRIES], item.topic):
                    continue
                item.headers += [*origin.headers, (QUEUE, item.topic.encode())]
                item.topic, item.partition, item.timestamp = told[RETRIES], 0, now_ms()
        return items

    async def _reads(self, group: str, topic: str) -> bool:
        """Both are still there; else what waits there would wait for nobody."""
        if (group, topic) not in self._there:
            known = group in await self._groups.names() and topic in await self._cluster.topics([topic])
            self._there[group, topic] = known
        return self._there[group, topic]

    async def _waits_for(self, group: str, retries: str, topic: str) -> bool:
        """Retries of this topic, by this group, wait in that one.

        Whoever may write to the error queue may have written the names: a message for one topic is to come into no
        other group's retries. Of a group that reads several topics it is asked whether it has read this one.
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
            # Before anything is sent: what cannot be committed would be sent again each time.
            if (await self._groups.describe(self._group)).active:
                raise busy(self._group, self._settings)
            sender = Sender(self._settings, self._client_id, room=COPY_ROOM)
            await sender.open()
            self._sender = sender
        return self._sender

    async def _check_alone(self) -> None:
        """That nobody else has moved the group since: who does would send the same messages, and we undo his commit.

        Raises:
            QueueError: somebody has.
        """
        if await self._groups.committed(self._group, self._ends) != self._commits:
            raise QueueError(
                f"Another redrive, move or purge of {self._queue!r} is at work. Wait for its end, and repeat this."
            )

    async def _unread(self) -> list[TopicPartition]:
        """PartitionChooser with something before the end that was found at the beginning."""
        found = []
        for partition, end in self._ends.items():
            if await self._consumer.position(partition) < end:
                found.append(partition)
            else:
                self._consumer.pause(partition)
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
            touched.add(partition)  # in any case: the commit before may have failed
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
        """Put what was left, and is in the way, behind everything else.

        A commit has room for some thousand gaps between finished messages. Beyond, the messages in the gaps are
        written once more at the end, as they are, and finished where they were.
        """
        offsets, left = self._offsets[partition], self._records[partition]
        if offsets.commit()[2] or self._sender is None:
            return
        await self._sender.publish([_again(record) for record in left.values()])
        for offset in list(left):
            offsets.finish(offset)
        left.clear()


class AdminViewer(AdminReader):
    """Shows what waits for a topic's group, and then what arrives; joins no group and moves none.

    Parameters:
        queue: the topic.
        settings: of its connections.
        client_id: as the broker shows them.
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
        """The next that wait or arrive; none when there were none for `timeout` seconds."""
        return await super().receive(max_messages, timeout=None if timeout is None else max(timeout, FETCH))

    async def close(self) -> None:
        """Let go; nothing has changed."""
        try:
            await super().close()
        finally:
            await self._cluster.stop()

    def _end(self, found: int) -> float:
        return math.inf


def _again(record: Any) -> ProducerRecord:
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
