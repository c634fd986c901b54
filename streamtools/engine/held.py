"""Limits the messages that a consumer holds because the broker refuses their copies; prefetch does not count them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.message import Message

log: logging.Logger = logging.getLogger("streamtools")

#: If this many messages are held, or this many bytes of bodies, the consumer receives no more messages.
HELD_LIMIT: Final = 1000
HELD_BYTES: Final = 128 * 1024 * 1024
#: Seconds between two declarations of the queues; one declaration serves all messages that are held.
REDECLARE_INTERVAL: Final = 0.4


class HeldBack:
    """Counts the messages that one loop holds back.

    Attributes:
        number: the number of these messages.
    """

    def __init__(self) -> None:
        self.number: int = 0
        self._bytes = 0
        self._queue, self._reason = "", ""  # of the last one
        self._is_said = False
        self._declaring = asyncio.Lock()
        self._declared = float("-inf")

    def has_room(self) -> bool:
        """Whether more messages may be received; if not, the log says once why."""
        if self.number < HELD_LIMIT and self._bytes < HELD_BYTES:
            if 2 * self.number < HELD_LIMIT and 2 * self._bytes < HELD_BYTES:
                self._is_said = False
            return True
        if not self._is_said:
            self._is_said = True
            log.warning(
                "No more messages of %r are received: %d (%d bytes) are held back, and the limit is %d (%d bytes). "
                "The last one: %s",
                self._queue, self.number, self._bytes, HELD_LIMIT, HELD_BYTES, self._reason,
            )  # fmt: skip
        return False

    @contextmanager
    def place(self, message: Message) -> Iterator[Callable[[str], None]]:
        """Count a message, from its first refusal until the block ends; the block gets a function to report refusals.

        The block calls that function with the reason of each refusal.
        """
        size, is_taken = len(message.body or b""), False

        def take(reason: str) -> None:
            nonlocal is_taken
            self._queue, self._reason = message.queue, reason
            if not is_taken:
                is_taken = True
                self.number += 1
                self._bytes += size

        try:
            yield take
        finally:
            if is_taken:
                self.number -= 1
                self._bytes -= size

    async def redeclare(self, redeclare: Callable[[], Awaitable[None]]) -> None:
        """Declare the queues again, unless that was done a moment ago for another message."""
        async with self._declaring:
            if time.monotonic() - self._declared < REDECLARE_INTERVAL:
                return
            try:
                await stray_cancellation_as_lost(redeclare())
            finally:
                self._declared = time.monotonic()
