"""One partition in our hands, from its assignment until it is taken away."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from aiokafka import TopicPartition

from streamtools.delivery import Delivery
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.transactions import Identity, Transactional
from streamtools.settings import KafkaSettings

#: Records of one tier that wait in memory for their time, and bytes of them; the rest waits at the broker.
SHELF: Final = 200
SHELF_BYTES: Final = 4 * 1024 * 1024


class Token(NamedTuple):
    """What settles a delivery.

    Attributes:
        record: as it was read.
    """

    track: Track
    offset: int
    record: Any


class Track:
    """What of one partition is with us, and how far it is done.

    Attributes:
        partition: which one.
        offsets: the bookkeeping.
        in_hand: deliveries handed over, by offset; a settlement takes its own out.
        settling: how many settlements are under way.
        arrived: records that are read, and not taken yet.
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
        exactly: KafkaSettings | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.partition: TopicPartition = partition
        self.offsets: Offsets = offsets
        self.in_hand: dict[int, Delivery] = {}
        self.settling: int = 0
        self.arrived: deque[Any] = deque()
        self.arrived_bytes: int = 0
        self.shelf: list[tuple[float, Any]] = []
        self.shelf_bytes: int = 0
        self.full: bool = False
        self.paused: bool = False
        self.going: bool = False
        self.gone: bool = False
        self.exactly: KafkaSettings | None = exactly
        self.identity: Identity | None = identity
        self.lock: asyncio.Lock = asyncio.Lock()
        self.transactional: Transactional | None = None

    @property
    def shelf_full(self) -> bool:
        """What else is not due waits at the broker."""
        return len(self.shelf) >= SHELF or self.shelf_bytes >= SHELF_BYTES

    def arrive(self, records: list[Any]) -> None:
        """Keep what was read."""
        self.arrived.extend(records)
        self.arrived_bytes += sum(len(record.value or b"") for record in records)

    def next(self) -> Any:
        """The next record; there must be one."""
        record = self.arrived.popleft()
        self.arrived_bytes -= len(record.value or b"")
        return record

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

    def is_mine(self, delivery: Delivery, offset: int) -> bool:
        """This very delivery is in hand and not being settled."""
        return not self.gone and self.in_hand.get(offset) is delivery

    def finish(self, offset: int) -> None:
        """This one is done with."""
        self.offsets.finish(offset)

    def __repr__(self) -> str:
        return f"<Track {self.partition.topic}-{self.partition.partition} at {self.offsets.position}>"
