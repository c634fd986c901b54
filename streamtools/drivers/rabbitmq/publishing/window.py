"""Window: lets senders wait while too many messages are unconfirmed."""

from __future__ import annotations

import asyncio
from collections import deque


class Window:
    """Wakes as many waiting senders as there is room for.

    Attributes:
        waiting: a future for each waiting sender, in order.
    """

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Wait to be woken."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.wake(1)  # this sender was woken, but is cancelled: wake the next one
            raise

    def wake(self, number: int) -> None:
        """Wake this number of senders."""
        while self.waiting and number > 0:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                number -= 1

    def wake_all(self) -> None:
        """Wake all senders, because there is nothing to wait for any more."""
        self.wake(len(self.waiting))
