"""WakeThrottle: limits how often a consumer wakes for messages that become due one after the other."""

from __future__ import annotations

import time
from typing import Final

#: The longest pause between two wakes, in seconds, while many messages become due.
WAKE_INTERVAL: Final = 0.1
#: Each message adds this many seconds of pause. Below 50 messages a second, each message has its own wake.
REST_PER_MESSAGE: Final = 0.02
#: Pauses begin when this many seconds have added up; so 25 messages in quick succession each have their own wake.
REST_LIMIT: Final = 0.5


class WakeThrottle:
    """Computes how long to wait before the next wake.

    If messages are rare, each is received at its time. If there are many, they wait for each other, so that one wake
    serves all of them: a wake takes more CPU time than a message. 500 wakes a second took a third of a CPU.

    Parameters:
        tick: the longest time, in seconds, that a message waits for others.
    """

    def __init__(self, tick: float = WAKE_INTERVAL) -> None:
        self._tick = tick
        # The time at which all pauses would be over, one after the other. It is on the monotonic clock, because a
        # wall clock that is set back must not delay anything.
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
