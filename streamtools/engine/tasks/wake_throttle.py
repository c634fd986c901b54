"""WakeThrottle: how often to wake for what comes due one by one."""

from __future__ import annotations

import time
from typing import Final

#: Seconds between wakes, at most, while much comes due.
WAKE_INTERVAL: Final = 0.1
#: Seconds of rest that each message asks for: below 50 a second all are woken for singly.
REST_PER_MESSAGE: Final = 0.02
#: Seconds of rest that may be owed: so a few at once, 25, are woken for singly, too.
REST_LIMIT: Final = 0.5


class WakeThrottle:
    """Rare messages come when they are due; many gather, so that one wake serves all of a tick.

    Waking costs more than a message does: 500 of them a second, each at its own time, took a third of a CPU.

    Parameters:
        tick: the most seconds that anything waits for others.
    """

    def __init__(self, tick: float = WAKE_INTERVAL) -> None:
        self._tick = tick
        # When all rests would be over, one after the other; on the monotonic clock, since a wall clock that
        # is set back must not hold anything up.
        self._rested = 0.0

    def wait(self) -> float:
        """Seconds until the next wake may be: 0 for at once, a tick at most."""
        return max(0.0, self._rested - REST_LIMIT - time.monotonic())

    def woke(self, number: int) -> None:
        """Count a wake that so many messages came with."""
        now = time.monotonic()
        self._rested = min(
            max(self._rested, now) + min(self._tick, number * REST_PER_MESSAGE), now + REST_LIMIT + self._tick
        )

    def forget(self) -> None:
        """Owe nothing."""
        self._rested = 0.0
