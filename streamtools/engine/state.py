"""LoopState: the state that the parts of a consumer's loop share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from streamtools.engine.tasks.cancellation import WorkerScope
from streamtools.errors import ConnectError, ConnectionLost


class LoopState:
    """Has the counts of a loop, and whether it goes on; `changed()` wakes the loop to check them.

    Attributes:
        in_hand: the number of deliveries that are received and not settled.
        running: the number of handlers that are running.
        settled: the number of deliveries settled so far.
        progress: when a delivery was last settled, on the monotonic clock.
        lost: why the connection was lost; handlers may still be running.
        stopping: set when no more messages must be received.
        scope: the scope of the tasks that run handlers.
    """

    def __init__(self) -> None:
        self.in_hand: int = 0
        self.running: int = 0
        self.settled: int = 0
        self.progress: float = time.monotonic()
        self.lost: ConnectError | None = None
        self.stopping: asyncio.Event = asyncio.Event()
        self.scope: WorkerScope = WorkerScope(None)
        self._change = asyncio.Event()

    def changed(self) -> None:
        """Wake the loop."""
        self._change.set()

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._change.wait()
        self._change.clear()

    async def wait_while(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition is false; return False if the seconds are over first."""
        try:
            async with asyncio.timeout(seconds):
                while condition():
                    await self.wait()
        except TimeoutError:
            return False
        return True

    def done(self, number: int) -> None:
        """Count deliveries that were settled."""
        self.in_hand -= number
        self.settled += number
        self.progress = time.monotonic()
        self._change.set()

    def lose(self, error: ConnectError) -> None:
        """Note that the connection was lost; the first error counts."""
        self.lost = self.lost or error
        self._change.set()

    def task_ended(self, task: asyncio.Task[None]) -> None:
        """End the loop if one of its tasks has ended with an error, or was cancelled by other code."""
        if task.cancelled() and self.scope.ending:
            return
        error = stray() if task.cancelled() else task.exception()
        if error is not None:
            self.lose(error if isinstance(error, ConnectError) else ConnectionLost(f"the loop ended by {error!r}"))


def stray() -> ConnectionLost:
    """Return the error for a task of the loop that was cancelled by other code."""
    return ConnectionLost("A task of the consumer's loop was cancelled by other code.")
