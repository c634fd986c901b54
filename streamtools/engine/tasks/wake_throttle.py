"""WakeThrottle: limits how often a consumer wakes for messages that come due one after the other."""

from __future__ import annotations

import time
from typing import Final

#: The longest pause between two wakes, in seconds, while many messages come due.
WAKE_INTERVAL: Final = 0.1
#: Seconds of pause that each message adds. Below 50 messages a second, each message has a wake of its own.
REST_PER_MESSAGE: Final = 0.02
#: Seconds of pause that may add up before any is taken, so that 25 messages at once have wakes of their own, too.
REST_LIMIT: Final = 0.5


class WakeThrottle:
    """Says how long to wait before the next wake.

    A rare message is received at its time. Many messages wait for each other, so that one wake serves all of them: to
    wake costs more than a message does. 500 wakes a second took a third of a CPU.

    Parameters:
        tick: the longest time, in seconds, that a message waits for others.
    """

    def __init__(self, tick: float = WAKE_INTERVAL) -> None:
        self._tick = tick
        # When all pauses would be over, one after the other. On the monotonic clock: a wall clock that is set back
        # must not delay anything.
        self._rested = 0.0

    def wait(self) -> float:
        """Seconds until the next wake is allowed: from 0 to a tick."""
        return max(0.0, self._rested - REST_LIMIT - time.monotonic())

    def woke(self, number: int) -> None:
        """Count a wake that brought this number of messages."""
        now = time.monotonic()
        self._rested = min(
            max(self._rested, now) + min(self._tick, number * REST_PER_MESSAGE), now + REST_LIMIT + self._tick
        )

    def forget(self) -> None:
        """Forget all pauses."""
        self._rested = 0.0
