"""UnconfirmedBatch: messages of one send that wait for Kafka's confirmation. ByteLimit: how many may wait."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

#: Unconfirmed bytes of one sender at most; it waits beyond.
UNCONFIRMED: Final = 64 * 1024 * 1024


class UnconfirmedBatch:
    """Messages that were sent together, until each is confirmed or failed.

    Parameters:
        number: how many messages.
        limit: the sender's, which counts their bytes.

    Attributes:
        remaining: how many have no outcome.
        failed: why messages were refused, by their ids.
        future: done when every message is confirmed or failed.
        given_up: nobody waits any more; messages that are in no batch are forgotten.
    """

    __slots__ = ("failed", "future", "given_up", "limit", "remaining")

    def __init__(self, number: int, limit: ByteLimit) -> None:
        self.limit: ByteLimit = limit
        self.remaining: int = number
        self.failed: dict[str, BaseException] = {}
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.given_up: bool = False

    def confirm(self, number: int, size: int) -> None:
        """So many messages, of so many bytes, are confirmed."""
        self.limit.free(size)
        self.done(number)

    def done(self, number: int = 1) -> None:
        """So many more messages have their outcome."""
        self.remaining -= number
        if self.remaining <= 0 and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: BaseException) -> None:
        """All messages without an outcome end by this error."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # looked at, so that asyncio does not warn if nobody waits


class ByteLimit:
    """Bytes that one sender may have unconfirmed.

    Parameters:
        limit: how many.
    """

    def __init__(self, limit: int = UNCONFIRMED) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def is_exceeded_by(self, size: int) -> bool:
        """So many more bytes are too many. A batch above the limit is let in when nothing else waits."""
        return self._taken > 0 and self._taken + size > self._limit

    async def wait_for(self, size: int) -> None:
        """Return when so many more bytes are within the limit."""
        while self.is_exceeded_by(size):
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def take(self, size: int) -> None:
        """So many more bytes wait."""
        self._taken += size

    def free(self, size: int) -> None:
        """So many bytes wait no more."""
        self._taken -= size
        while self._waiting and self._taken < self._limit // 2:
            _wake(self._waiting.popleft())

    def clear(self) -> None:
        """Let everybody in: nothing waits any more."""
        self._taken = 0
        while self._waiting:
            _wake(self._waiting.popleft())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
