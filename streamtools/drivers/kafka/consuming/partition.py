"""One partition in our hands, from its assignment until it is taken away."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, cast

from aiokafka import TopicPartition

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.client.fetched import Fetched
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.producing.transactions import Identity, TransactionalProducer
from streamtools.drivers.kafka.records import Origin, told_origin
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Records of one tier that wait in memory for their time, and bytes of them; the rest waits at the broker.
SHELF: Final = 200
SHELF_BYTES: Final = 4 * 1024 * 1024


class KafkaDelivery(Delivery):
    """A message of one partition. Its token is the record as it was parsed; None where the message has all of it.

    Attributes:
        track: the partition.
        offset: in it.
    """

    __slots__ = ("offset", "track")

    track: AssignedPartition
    offset: int

    @property
    def origin(self) -> Origin:
        """Where the message was read first."""
        topic, partition = self.track.partition
        told = None if self.token is None else told_origin(self.token)
        return told or Origin(topic, partition, self.offset)


def delivery_of(settlement: Settlement) -> KafkaDelivery:
    """What it settles: nothing but ours is given to us."""
    return cast(KafkaDelivery, settlement.delivery)


class AssignedPartition:
    """What of one partition is with us, and how far it is done.

    Attributes:
        partition: which one.
        is_retry: it is of the group's retry topic.
        offsets: the bookkeeping; with what is pending stands its delivery while that is in hand.
        kept: the offset that was committed last.
        settling: how many settlements are under way.
        arrived: records that are read and not taken yet, as they came together.
        shelf: records that are not due yet, in the order of the time when each leaves.
        full: the commit's metadata has no room: no more is taken until the first gap closes.
        paused: it is not read for now.
        going: it is about to be taken away: nothing more of it is begun.
        gone: it was taken away; nothing of it is of any use.
        exactly: it is committed by transactions alone, at this address; None where it is not.
        identity: ours as the one who may; it serves once.
        lock: one transaction after the other.
        transactional: what makes them, once there was one.
    """

    def __init__(
        self,
        partition: TopicPartition,
        offsets: Offsets,
        *,
        is_retry: bool = False,
        exactly: KafkaSettings | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.partition: TopicPartition = partition
        self.offsets: Offsets = offsets
        self.is_retry: bool = is_retry
        self.kept: int = offsets.next
        self.settling: int = 0
        self.arrived: deque[Fetched] = deque()
        self._end = offsets.next
        self.shelf: list[tuple[float, Any]] = []
        self.shelf_bytes: int = 0
        self.full: bool = False
        self.paused: bool = False
        self.going: bool = False
        self.gone: bool = False
        self.exactly: KafkaSettings | None = exactly
        self.identity: Identity | None = identity
        self.lock: asyncio.Lock = asyncio.Lock()
        self.transactional: TransactionalProducer | None = None

    @property
    def shelf_full(self) -> bool:
        """What else is not due waits at the broker."""
        return len(self.shelf) >= SHELF or self.shelf_bytes >= SHELF_BYTES

    def arrive(self, fetched: Fetched) -> None:
        """Keep what was read."""
        self.reach(fetched.start)
        self.arrived.append(fetched)
        self._end = fetched.end

    def reach(self, offset: int) -> None:
        """What is read next begins here. Where that is behind the end of what was read, the rest is no more."""
        first, self._end = self._end, max(offset, self._end)
        if offset > first and self.offsets.unfinished(first, offset):
            topic, partition = self.partition
            log.warning(
                "Kafka has deleted messages that were not read yet: topic %r, partition %d, from offset %d to %d. "
                "Going on at %d. They exceeded the retention of the topic, or somebody has deleted them: keep "
                "more (`streamtools queues alter %s --retention 30d`), or read faster.",
                topic,
                partition,
                first,
                offset - 1,
                offset,
                topic,
            )

    def take_over(self, record: Any, other: AssignedPartition) -> None:
        """Go on with this record, and what had arrived behind it; and with what makes transactions."""
        self.transactional, other.transactional = other.transactional, None
        self.arrived.append(Fetched(iter((record,)), record.offset + 1, 0))
        self.arrived.extend(other.arrived)
        self._end = other._end

    @property
    def waiting(self) -> int:
        """How many records wait here, at most: offsets without a record count as well."""
        return max(0, self._end - self.offsets.next) if self.arrived else 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are in memory for the records that wait here."""
        return sum(fetched.held for fetched in self.arrived)

    @property
    def unpacked(self) -> int:
        """Bytes of the batch that is being read, where it was compressed."""
        return self.arrived[0].unpacked if self.arrived else 0

    def hold(self, until: float, record: Any) -> None:
        """Keep a record until its time; equal ones stay in their order."""
        at = len(self.shelf)
        while at > 0 and self.shelf[at - 1][0] > until:
            at -= 1
        self.shelf.insert(at, (until, record))
        self.shelf_bytes += len(record.value or b"")

    def due(self, now: float, limit: int) -> Iterator[Any]:
        """Take those whose time has come, so many at most."""
        while limit > 0 and self.shelf and self.shelf[0][0] <= now:
            limit -= 1
            record = self.shelf.pop(0)[1]
            self.shelf_bytes -= len(record.value or b"")
            yield record

    def deliver(self, offset: int, message: Message, record: Any, trouble: DecodeError | None) -> KafkaDelivery:
        """Hand over what is pending at this offset."""
        self.offsets.pending[offset] = delivery = KafkaDelivery(message, record, 0, trouble)
        delivery.track, delivery.offset = self, offset
        return delivery

    @property
    def in_hand(self) -> list[KafkaDelivery]:
        """Deliveries handed over, that are not being settled."""
        return [delivery for delivery in self.offsets.pending.values() if delivery is not None]

    def is_mine(self, delivery: KafkaDelivery) -> bool:
        """This very delivery is in hand and not being settled."""
        return not self.gone and self.offsets.pending.get(delivery.offset) is delivery

    def __repr__(self) -> str:
        return f"<AssignedPartition {self.partition.topic}-{self.partition.partition} at {self.offsets.position}>"
