"""A Kafka consumer without a Kafka: all of its own bookkeeping over one partition of a log in memory.

Everything of ours is real: receiving, settling, moving, committing, what is let go when a partition goes. In
the places of the library stand a commit that is kept here, and producers that fail as they are told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition

from streamtools.drivers.kafka import KafkaConsumer
from streamtools.drivers.kafka.client.fetched import Fetched
from streamtools.drivers.kafka.consuming.copies import Copies
from streamtools.drivers.kafka.consuming.delays import DELAY_LEVELS
from streamtools.drivers.kafka.consuming.exactly_once import TransactionalPublisher
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, PartitionTransactions
from streamtools.drivers.kafka.consuming.retries import RetryPublisher
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.producing.record import ProducerRecord, records_of, refused
from streamtools.errors import ConnectionLost
from streamtools.message import Message
from streamtools.settings import KafkaSettings

PLACE = TopicPartition("orders", 0)
SETTINGS = KafkaSettings(host="127.0.0.1:1")


def record(offset: int, message: Message | None = None, **changes: Any) -> Any:
    """A record as the library parses it; its message's id is the offset, so that copies tell where they are from."""
    message = message or Message(body=b"x", queue=PLACE.topic, id=str(offset), content_type="text/plain")
    [item] = records_of([message])
    usual = {"offset": offset, "timestamp": item.timestamp, "key": item.key, "value": item.value}
    return SimpleNamespace(**{**usual, "headers": item.headers, **changes})


def _refused(batch: Sequence[ProducerRecord], trouble: Any) -> dict[str, BaseException]:
    bad: dict[str, BaseException] = {}
    for item in batch:
        if isinstance(trouble, set) and item.id in trouble:
            bad[item.id] = error = ValueError("no")
            item.refuse(error)
    return bad


class Broker:
    """What is kept when consumers go: the log, what is committed of it, and what was sent.

    Attributes:
        log: by offset.
        kept: the commit: offset and metadata.
        sent: ids, as they were confirmed (in a transaction: committed).
        troubles: what happens to the next requests that send: None for nothing; ids that are refused; "lost" before
            or "late" after it is done; "never": there is no answer.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        self.log: dict[int, Any] = {record.offset: record for record in records}
        self.end: int = max(self.log, default=-1) + 1
        self.kept: tuple[int, str] = (0, "")
        self.sent: list[str] = []
        self.troubles: list[Any] = []

    async def trouble(self) -> Any:
        await asyncio.sleep(0)
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble == "never":
            await asyncio.Event().wait()
        if trouble == "lost":
            raise ConnectionLost("lost")
        return trouble

    async def publish(self, batch: Sequence[ProducerRecord]) -> None:
        """As a Publisher does."""
        trouble = await self.trouble()
        bad = _refused(batch, trouble)
        self.sent += [item.id for item in batch if item.id not in bad]
        if trouble == "late":
            raise ConnectionLost("late")
        if bad:
            raise refused(bad, SETTINGS)

    async def commit(self, offsets: Mapping[TopicPartition, Any], place: object = None) -> None:
        """As a Coordinator does."""
        await asyncio.sleep(0)
        self.keep(offsets[PLACE].offset, offsets[PLACE].metadata)

    def keep(self, offset: int, metadata: str) -> None:
        self.kept = offset, metadata

    async def close(self) -> None:
        """Nothing is open."""


class Transactions:
    """In the place of TransactionalProducer: what it sends and commits is the broker's once it is committed."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.broken = False
        self.items: list[str] = []
        self.offset: tuple[int, str] | None = None

    async def begin(self) -> None:
        assert not self.broken, "a producer whose transaction failed is of no use"
        self.items, self.offset = [], None

    async def send(self, batch: Sequence[ProducerRecord]) -> None:
        trouble = await self._trouble()
        if bad := _refused(batch, trouble):
            raise refused(bad, SETTINGS)
        self.items += [item.id for item in batch]

    async def add_offsets(self, offsets: Mapping[TopicPartition, tuple[int, str]], group: str) -> None:
        self.offset = offsets[PLACE]

    async def commit(self) -> None:
        trouble = await self._trouble()
        assert self.offset is not None
        self.broker.sent += self.items
        self.broker.keep(*self.offset)
        if trouble == "late":
            self.broken = True
            raise ConnectionLost("late")

    async def abort(self) -> None:
        self.items, self.offset = [], None

    async def close(self) -> None:
        self.broken = True

    async def _trouble(self) -> Any:
        try:
            return await self.broker.trouble()
        except BaseException:
            self.broken = True
            raise


class OfflineRetryPublisher(RetryPublisher):
    """Sends to the broker in memory."""

    broker: Broker

    async def _get_sender(self) -> Any:
        return self.broker


class OfflineTransactionalPublisher(TransactionalPublisher):
    """The same, in transactions."""

    broker: Broker

    async def _get_producer(self, partition: AssignedPartition, transactions: PartitionTransactions) -> Any:
        # As the real one: an identity serves once.
        if transactions.producer is None and transactions.identity is not None and not partition.revoked:
            transactions.identity = None
            transactions.producer = Transactions(self.broker)  # type: ignore[assignment]
        return await super()._get_producer(partition, transactions)


class OfflineConsumer(KafkaConsumer):
    """A consumer whose connection is the broker in memory."""

    poll_timeout = 0.2
    broker: Broker
    #: False: what is not there now is not waited for.
    waits = True

    async def _open(self) -> None:
        await self._close()
        member = _Member(
            self.settings,
            self._subscription(has_retry_topic=True),
            changed=self._wake_up,
            drained=self._drained,
            passed_over=self._pass_over,
            doubted=self._doubted,
            topic_changes=self._topic_changes,
        )
        cluster = SimpleNamespace(partitions_for_topic=lambda _: {PLACE.partition})
        member.client = SimpleNamespace(cluster=cluster, is_connected=True)  # type: ignore[assignment]
        coordinator = SimpleNamespace(commit=self.broker.commit, is_doubtful=False)
        member.coordinator = coordinator  # type: ignore[assignment]
        self._begin(member, len(DELAY_LEVELS))
        self._prefetcher = _Prefetcher(member)  # type: ignore[assignment]
        self.assign()

    def _new_publisher(self, copies: Copies, member: GroupMember) -> RetryPublisher:
        publisher: OfflineRetryPublisher | OfflineTransactionalPublisher
        if self.options.exactly_once:
            publisher = OfflineTransactionalPublisher(self.settings, copies, member, "test")
        else:
            publisher = OfflineRetryPublisher(self.settings, copies)
        publisher.broker = self.broker
        return publisher

    async def _wait_for_change(self, member: GroupMember, wake: asyncio.Future[None]) -> None:
        if not self.waits:
            raise TimeoutError
        await super()._wait_for_change(member, wake)

    def assign(self) -> None:
        """The partition is ours, from what is committed on."""
        member = self.member
        transactions = PartitionTransactions(SETTINGS, (1, 0)) if self.options.exactly_once else None
        partition = AssignedPartition(PLACE, Offsets(*self.broker.kept), transactions=transactions)
        member.partitions = {PLACE: partition}
        waiting = [record for offset, record in sorted(self.broker.log.items()) if offset >= partition.offsets.next]
        partition.arrive(Fetched(iter(waiting), self.broker.end, 100))
        self._wake_up()

    @property
    def member(self) -> GroupMember:
        assert self._member is not None
        return self._member

    @property
    def partition(self) -> AssignedPartition:
        return self.member.partitions[PLACE]


class _Member(GroupMember):
    async def leave(self) -> None:
        """Without the library."""
        self._closing = True
        self.changed()
        await self.commits.stop()
        try:
            await self.commits.commit()
        finally:
            self._let_go()


class _Prefetcher:
    """All has arrived already."""

    def __init__(self, member: GroupMember) -> None:
        self._member = member

    def ready(self) -> Collection[AssignedPartition]:
        return [partition for partition in self._member.partitions.values() if partition.arrived]

    def taken(self) -> None:
        for partition in self._member.partitions.values():
            if not (partition.arrived or partition.revoking) and partition.offsets.pass_over(partition._end):
                self._member.commits.finished()

    async def stop(self) -> None:
        """Nothing is at work."""


def consumer(broker: Broker, **options: Any) -> OfflineConsumer:
    """A consumer of the broker's log."""
    made = OfflineConsumer(PLACE.topic, url=SETTINGS, **options)
    made.broker = broker
    return made
