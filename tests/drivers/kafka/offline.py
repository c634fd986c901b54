"""A Kafka consumer without a Kafka: all of its own bookkeeping over one partition of a log in memory.

Everything of ours is real: receiving, settling, moving, committing, what is let go when a partition goes. In
the places of the library stand a commit that is kept here, and producers that fail as they are told.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition

from streamtools.drivers.kafka import KafkaConsumer
from streamtools.drivers.kafka.client.fetched import Fetched
from streamtools.drivers.kafka.consuming.delays import DELAY_LEVELS
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
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

    async def _get_transactional(self, track: AssignedPartition) -> Any:
        # As the real one: an identity serves once.
        if track.transactional is None and track.identity is not None and not track.gone:
            track.identity, track.transactional = None, Transactions(self.broker)  # type: ignore[assignment]
        return await super()._get_transactional(track)


class OfflineConsumer(KafkaConsumer):
    """A consumer whose connection is the broker in memory."""

    look = 0.2
    broker: Broker
    #: False: what is not there now is not waited for.
    waits = True

    async def _open(self) -> None:
        await self._close()
        self._returned, self._moves, self._moving = [], deque(), 0
        self._move_wake, self._settled = asyncio.Event(), asyncio.Event()
        self._tiers = len(DELAY_LEVELS)
        coordinator = SimpleNamespace(commit=self.broker.commit, confirmed_at=math.inf)
        membership = _Membership(
            self.settings,
            self._terms(True),
            "test",
            changed=self._wake_up,
            drained=self._drained,
            passed_over=self._pass_over,
            subscribed=self._subscribed,
        )
        membership.coordinator = coordinator  # type: ignore[assignment]
        self._membership = membership
        self._outbox = outbox = OfflineRetryPublisher(
            self.settings, "test", membership, queue=self.queue, retry_topic=self.retry_topic, tiers=self._tiers
        )
        outbox.broker = self.broker
        self._intake = _Intake(membership)  # type: ignore[assignment]
        self._mover = asyncio.create_task(self._move_routine())
        self.assign()

    async def _arrival(self, membership: GroupMember, wake: asyncio.Future[None]) -> None:
        if not self.waits:
            raise TimeoutError
        await super()._arrival(membership, wake)

    def assign(self) -> None:
        """The partition is ours, from what is committed on."""
        membership = self._membership
        assert membership is not None
        exactly = SETTINGS if self.options.exactly_once else None
        track = AssignedPartition(
            PLACE, Offsets(*self.broker.kept), exactly=exactly, identity=(1, 0) if exactly else None
        )
        membership.tracks = {PLACE: track}
        waiting = [record for offset, record in sorted(self.broker.log.items()) if offset >= track.offsets.next]
        track.arrive(Fetched(iter(waiting), self.broker.end, 100))
        self._wake_up()

    @property
    def membership(self) -> GroupMember:
        assert self._membership is not None
        return self._membership

    @property
    def track(self) -> AssignedPartition:
        return self.membership.tracks[PLACE]


class _Membership(GroupMember):
    async def leave(self) -> None:
        """Without the library."""
        self._closing = True
        self._changed()
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self.commit()
        finally:
            self._let_go()


class _Intake:
    """All has arrived already."""

    def __init__(self, membership: GroupMember) -> None:
        self._membership = membership

    def tracks(self) -> Collection[AssignedPartition]:
        return [track for track in self._membership.tracks.values() if track.arrived]

    def taken(self) -> None:
        for track in self._membership.tracks.values():
            if not (track.arrived or track.going) and track.offsets.pass_over(track._end):
                self._membership.finished()

    async def stop(self) -> None:
        """Nothing is at work."""


def consumer(broker: Broker, **options: Any) -> OfflineConsumer:
    """A consumer of the broker's log."""
    made = OfflineConsumer(PLACE.topic, url=SETTINGS, **options)
    made.broker = broker
    return made
