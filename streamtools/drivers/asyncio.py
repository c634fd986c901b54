"""`asyncio://`: queues within this process. The first file for a driver author to read.

A message sent is appended to its queue's `ready`, or to the heap of `later` until it is due; a
consumer takes it from there, holds it until it is settled, and puts it back if it is released. That
is all a protocol needs to do: retries, the error queue and the worker pool stand above it.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from streamtools.admin import QueueAdmin, QueueInfo
from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.errors import Closed, SendError
from streamtools.features import Features
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.settings import AsyncIOSettings
from streamtools.verdicts import Kind

FEATURES = Features()


class Queue:
    """One queue: messages that are ready, messages that are due later, and those in hand."""

    def __init__(self, name: str, maxsize: int) -> None:
        self.name = name
        self.maxsize = maxsize
        self.ready: deque[Message] = deque()
        self.later: list[tuple[float, int, Message]] = []
        self.in_hand = 0
        self._order = count()
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Condition()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """Messages that wait, due or not."""
        return len(self.ready) + len(self.later)

    async def put(self, message: Message) -> None:
        """Add a message; waits while the queue is full."""
        while self.size >= self.maxsize:
            await self._wait(self._putters)
        self.put_now(message)

    def put_now(self, message: Message) -> None:
        """Add a message, full or not: for copies, which must not wait for the consumer that makes them."""
        if message.deliver_at is not None and message.deliver_at > time.time():
            heapq.heappush(self.later, (message.deliver_at, next(self._order), message))
            self._schedule()
        else:
            self.ready.append(message)
            _wake(self._getters)

    def put_back(self, messages: Sequence[Message]) -> None:
        """Return messages that were taken, to the front, in their order."""
        self.in_hand -= len(messages)
        self.ready.extendleft(reversed(messages))
        _wake(self._getters)

    async def take(self, limit: int) -> list[Message]:
        """Wait for at least one message and take up to `limit`."""
        while not self.ready:
            await self._wait(self._getters)
        taken = [self.ready.popleft() for _ in range(min(limit, len(self.ready)))]
        self.in_hand += len(taken)
        if self.ready:
            _wake(self._getters)
        for _ in taken:
            _wake(self._putters)
        return taken

    def purge(self) -> int:
        """Forget all messages that wait; the number of them."""
        number = self.size
        self.ready.clear()
        self.later.clear()
        while self._putters:
            _wake(self._putters)
        return number

    async def _wait(self, line: deque[asyncio.Future[None]]) -> None:
        waiter = asyncio.get_running_loop().create_future()
        line.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                _wake(line)  # it was meant for us; pass it on
            raise

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = self.later[0][0] - time.time()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay), self._ripen)

    def _ripen(self) -> None:
        self._timer = None
        now = time.time()
        while self.later and self.later[0][0] <= now:
            self.ready.append(heapq.heappop(self.later)[2])
            _wake(self._getters)
        if self.later:
            self._schedule()


def _wake(line: deque[asyncio.Future[None]]) -> None:
    while line:
        waiter = line.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return


class Broker:
    """The queues of one name within one event loop."""

    #: By event loop, so that it ends with the loop; nothing outlives it.
    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Broker]]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}

    @classmethod
    def of(cls, settings: AsyncIOSettings) -> Broker:
        """The broker of this name in the running loop."""
        brokers = cls._all.setdefault(asyncio.get_running_loop(), {})
        return brokers.setdefault(settings.name, cls())
