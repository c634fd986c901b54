"""When a retry or another delayed message is delivered. Kafka delivers at once, so the waiting is done here.

Each group has a retry topic of its own (`orders.retry`), because a retry is for one group alone. Each partition of
that topic is a delay level: its records stay there equally long, so the first to come is the first to leave.

1. `streamtools.Retry` says how long: the copy of the message has the time in `deliver_at`.
2. The copy goes to the level with the longest delay that is not over its own: `level_of`, called by copies.py.
3. A consumer of the group reads it, and keeps it in memory (not_due.py) until it leaves its level: `keep_or_forward`,
   `leaves_at`. When memory is full, that level is not fetched (prefetch.py).
4. KafkaConsumer wakes up at `next_due`. What is due is delivered. Else it is forwarded to the level for the rest of
   its delay, and so on.

A delayed message in the queue's own topic is kept in memory if it is due within 0.25 s, else forwarded at once.

A message is never delivered early. It may be late: by the time that forwarding takes, by `FORWARD_AGAIN` more each
time Kafka refuses the copy, and on level 1 by up to 2 s when memory is full. It waits, too, while its consumer has no
room, while the group's coordinator is silent (coordinator.py), and while its partition moves to another member. A
consumer with an order (`ordered_by`) uses no topic: it retries in its process (engine/dispatch.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple

from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.errors import SendError, StreamToolsError
from streamtools.message import Message

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds that each partition of a retry topic holds a record back; the first holds nothing back.
DELAY_LEVELS: Final = (0.0, 0.25, 2.0, 15.0, 120.0, 1800.0)
#: Messages on their way to the retry topic at most; beyond, no more records are taken.
MOST_FORWARDED: Final = 1000
#: Seconds before a copy that Kafka refused is sent to the retry topic again.
FORWARD_AGAIN: Final = 1.0


def level_of(seconds: float, levels: int = len(DELAY_LEVELS)) -> int:
    """The level (partition of the retry topic) for a message that is due in so many seconds.

    Parameters:
        levels: how many partitions the topic has.
    """
    if seconds <= 0:
        return 0
    return min(max(1, bisect_right(DELAY_LEVELS, seconds) - 1), levels - 1)


def leaves_at(level: int, entered: float, due: float | None) -> float:
    """When a message leaves its level, in seconds since the epoch: when it is due, or after the level's delay.

    On levels 0 and 1 it is always the time when the message is due.

    Parameters:
        entered: when the record was written, in seconds since the epoch.
        due: when the message may be delivered; at once (0.0) when None.
    """
    if due is None:
        return 0.0
    if level <= 1 or level >= len(DELAY_LEVELS):
        return due
    return min(due, entered + DELAY_LEVELS[level])


class DelayedRecord(NamedTuple):
    """A record that is not due, with its message and the partition that it was read from."""

    partition: AssignedPartition
    record: Any
    message: Message


class Delays:
    """Keeps records that are not due in memory, or forwards them to the level of the retry topic for their delay.

    Parameters:
        forward: sends copies to the retry topic, and finishes the records that they were made of.
        exactly_once: `forward` does so in transactions: of a partition it sends all, or nothing.
        finished: called with the number of records that were finished.
        failed: called with an error that ends this membership.
        changed: called after each forwarding.
        name: the consumer's, for the log.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[DelayedRecord]], Awaitable[None]],
        *,
        exactly_once: bool,
        finished: Callable[[int], None],
        failed: Callable[[StreamToolsError], None],
        changed: Callable[[], None],
        name: str,
    ) -> None:
        self._forward = forward
        self._exactly_once = exactly_once
        self._finished = finished
        self._failed = failed
        self._changed = changed
        self._name = name
        self._waiting: deque[DelayedRecord] = deque()
        self._under_way = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin forwarding."""
        self._task = asyncio.create_task(self._run(), name="streamtools-delays")

    async def stop(self) -> None:
        """End; what was not forwarded is not finished, and comes again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    @property
    def is_full(self) -> bool:
        """No more records are to be taken until some were forwarded."""
        return len(self._waiting) >= MOST_FORWARDED

    @property
    def is_idle(self) -> bool:
        """Nothing is on its way to the retry topic."""
        return not (self._under_way or self._waiting)

    def keep_or_forward(self, partition: AssignedPartition, record: Any, message: Message, now: float) -> None:
        """Keep a record that is not due until it leaves its level, or forward it to the level for its delay."""
        due = message.deliver_at or now
        leaves = leaves_at(partition.place.partition, record.timestamp / 1000, due) if partition.is_retry else due
        if (partition.is_retry and leaves > now) or due - now <= DELAY_LEVELS[1]:
            partition.not_due.keep(leaves, record)
        else:
            self._waiting.append(DelayedRecord(partition, record, message))
            self._wake.set()

    @staticmethod
    def next_due(partitions: Collection[AssignedPartition]) -> float | None:
        """When the next record in memory leaves its level, in seconds since the epoch; None when there is none."""
        times = (partition.not_due.next_due for partition in partitions)
        return min((due for due in times if due is not None), default=None)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch = [delayed for delayed in self._waiting if not delayed.partition.revoked]
            self._under_way = len(batch)
            self._waiting.clear()
            try:
                if batch:
                    await self._forward(batch)
                    self._finished(len(batch))
            except SendError as error:
                self._keep_refused(batch, error)
            except StreamToolsError as error:
                self._failed(error)
            self._under_way = 0
            self._changed()

    def _keep_refused(self, batch: Iterable[DelayedRecord], error: SendError) -> None:
        """Records whose copies Kafka refused stay unfinished in their topic, and wait in memory to be forwarded."""
        log.error("%s: what waits for its time stays in its topic: %s", self._name, error)
        for delayed in batch:
            partition, record, message = delayed
            if message.id in error.refused:
                partition.not_due.keep(min(message.deliver_at or 0.0, time.time() + FORWARD_AGAIN), record)
            elif not self._exactly_once:
                partition.offsets.finish(record.offset)
                self._finished(1)
            elif record.offset in partition.offsets.pending:  # the transaction was undone: again, without the others
                self._waiting.append(delayed)
                self._wake.set()
