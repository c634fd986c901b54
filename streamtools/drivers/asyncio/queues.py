"""Queue: the messages of one group, ready, due later and in hand."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Iterable
from itertools import count
from threading import RLock
from typing import NamedTuple

from streamtools.drivers.asyncio.waiters import call_in, stand_in, wait_for, wake, wake_all
from streamtools.engine.tasks.wake_throttle import WakeThrottle
from streamtools.message import Message


class Item(NamedTuple):
    """A message in a queue.

    Attributes:
        place: its place among the other items, which it keeps while it is in hand.
        origin: the queue that it failed in, to which a redrive puts it back.
    """

    place: int
    message: Message
    origin: Queue | None


class Queue:
    """One group's queue: messages that are ready, messages that are due later, and those in hand.

    Parameters:
        lock: the broker's lock, because event loops in several threads may use the queue.
    """

    def __init__(self, name: str, maxsize: int, lock: RLock) -> None:
        self.name = name
        self.maxsize = maxsize
        self.lock = lock
        self.ready: deque[Item] = deque()
        self.later: list[tuple[float, Item]] = []
        self.in_hand: int = 0
        self.deleted: bool = False
        self._places = count()
        #: Event loop -> the timer that wakes its waiting tasks when the first item of `later` is due.
        self._timers: dict[asyncio.AbstractEventLoop, asyncio.TimerHandle] = {}
        self._pace = WakeThrottle()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """The number of messages that wait, due or not."""
        return len(self.ready) + len(self.later)

    async def room(self) -> None:
        """Wait until there may be room."""
        with self.lock:
            if self.size < self.maxsize:
                return
            waiter = stand_in(self._putters)
        await wait_for(waiter, self._putters)

    def pass_on(self) -> None:
        """Wake the next task that waits for room, if there still is room that the caller does not use."""
        if self.size < self.maxsize:
            wake(self._putters)

    def put(self, message: Message, origin: Queue | None = None) -> None:
        """Add a message even if the queue is full: a consumer that sends must not wait for itself.

        The caller has to hold the lock.
        """
        item = Item(next(self._places), message, origin)
        if message.deliver_at is not None and message.deliver_at > time.time():
            heapq.heappush(self.later, (message.deliver_at, item))
            if self.later[0][1] is item:
                self._schedule_where_someone_waits()
        else:
            self.ready.append(item)
            wake(self._getters)

    def put_back(self, items: Iterable[Item]) -> None:
        """Return items that were taken to their places."""
        with self.lock:
            items = sorted(items)
            self.in_hand -= len(items)
            if items and self.ready and self.ready[0] < items[-1]:
                self.ready = deque(sorted([*items, *self.ready]))
            else:
                self.ready.extendleft(reversed(items))
            if self.ready:
                wake(self._getters)

    async def arrival(self) -> None:
        """Wait until a message may be ready, or until `interrupt()`."""
        with self.lock:
            if self.ready or self.deleted:
                return
            waiter = stand_in(self._getters)
            if self.later:
                self._schedule()
        await wait_for(waiter, self._getters)

    def interrupt(self) -> None:
        """Wake everyone who waits for an arrival."""
        with self.lock:
            wake_all(self._getters)

    def take(self, limit: int) -> list[Item]:
        """Take up to `limit` messages that are ready."""
        with self.lock:
            taken = [self.ready.popleft() for _ in range(min(limit, len(self.ready)))]
            self.in_hand += len(taken)
            if self.ready:
                wake(self._getters)
            for _ in range(min(len(taken), len(self._putters))):
                wake(self._putters)
            return taken

    def cancel(self, id: str) -> bool:  # noqa: A002 - the field's name
        """Delete a message that is not due yet; return False if there is none with this id."""
        with self.lock:
            kept = [entry for entry in self.later if entry[1].message.id != id]
            found = len(kept) < len(self.later)
            self.later[:] = kept
            heapq.heapify(self.later)
            return found

    def purge(self) -> int:
        """Delete all messages that wait, and return how many."""
        with self.lock:
            number = self.size
            self.ready.clear()
            self.later.clear()
            wake_all(self._putters)
            return number

    def ripen(self) -> int:
        """Move due messages from `later` to `ready`, and return by how many `ready` has grown."""
        with self.lock:
            now, before = time.time(), len(self.ready)
            while self.later and self.later[0][0] <= now:
                _, item = heapq.heappop(self.later)
                self.ready.append(item._replace(place=next(self._places)))
                wake(self._getters)
            return len(self.ready) - before

    # --- messages that are due later ------------------------------------------------------------

    def _schedule_where_someone_waits(self) -> None:
        loops = {waiter.get_loop() for waiter in self._getters}
        for loop in loops:
            call_in(loop, self._schedule)
        if not loops:  # usually the next task that waits sets the timer; while all are busy handling, we set it here
            self._schedule()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        with self.lock:
            if (timer := self._timers.pop(loop, None)) is not None:
                timer.cancel()
            if self.later:
                for other in [other for other in self._timers if other.is_closed()]:
                    del self._timers[other]
                delay = max(self.later[0][0] - time.time(), self._pace.wait())
                self._timers[loop] = loop.call_later(delay, self._due, loop)

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:
            self._timers.pop(loop, None)
            if number := self.ripen():
                self._pace.woke(number)
            self._schedule()
