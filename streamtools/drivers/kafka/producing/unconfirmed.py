"""What was sent together and waits for its confirmation, and how much of that one sender may have."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

#: Bytes that wait unconfirmed at most; senders wait for room beyond.
UNCONFIRMED: Final = 64 * 1024 * 1024


class UnconfirmedBatch:
    """Messages sent together: done when each has its outcome.

    Attributes:
        future: ends when all are confirmed, or each of the others has failed.
        room: of whoever sends them.
        given_up: nobody waits any more; what was not handed to Kafka yet is forgotten.
    """

    __slots__ = ("failed", "future", "given_up", "remaining", "room", "unknown")

    def __init__(self, number: int, room: ByteLimit) -> None:
        self.room: ByteLimit = room
        self.remaining: int = number
        self.failed: dict[str, BaseException] = {}
        self.unknown: dict[str, BaseException] = {}
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.given_up: bool = False

    def done(self, number: int = 1) -> None:
        self.remaining -= number
        if self.remaining <= 0 and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: BaseException) -> None:
        """All that is left of it ends by this error."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # looked at: whoever waits gets it all the same


class ByteLimit:
    """Bytes that one sender may have unconfirmed; it waits for room beyond."""

    def __init__(self, limit: int = UNCONFIRMED) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def is_short_of(self, size: int) -> bool:
        """There is no room for so many bytes; what is larger than all of it has it alone."""
        return self._taken > 0 and self._taken + size > self._limit

    async def wait_for(self, size: int) -> None:
        """Return when there is room for so many bytes."""
        while self.is_short_of(size):
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def take(self, size: int) -> None:
        """So many bytes wait."""
        self._taken += size

    def free(self, size: int) -> None:
        """So many bytes wait no more."""
        self._taken -= size
        while self._waiting and self._taken < self._limit // 2:
            _wake(self._waiting.popleft())

    def clear(self) -> None:
        """Nobody is to wait any more."""
        self._taken = 0
        while self._waiting:
            _wake(self._waiting.popleft())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
