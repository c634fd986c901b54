"""The queue of a delay level has no leader: messages are sent past this level.

A quorum queue that has lost most of its nodes confirms nothing. Messages that need such a level take the next higher
levels, which hold them a little longer, until the level is tried again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streamtools.drivers.rabbitmq.topology.delay_levels import DOUBLING

#: A level that gave no answer is not used for this many seconds.
LEADERLESS_TTL: Final = 300.0


class LeaderlessLevels:
    """Remembers which levels one connection does not use for now.

    Parameters:
        time: the event loop's clock.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        #: Level -> when it is used again.
        self._until: dict[int, float] = {}

    def avoid(self, name: str) -> None:
        """Do not use this level for a while."""
        self._until[int(name.rpartition(".")[2])] = self._time() + LEADERLESS_TTL

    def passable(self, number: int) -> int:
        """Return the least number of steps, at least `number`, that needs none of these levels."""
        if not self._until:
            return number
        self._until = {level: until for level, until in self._until.items() if until > self._time()}
        for level in sorted(self._until):
            if number >> level & 1 and number < 1 << DOUBLING:
                number = (number >> level) + 1 << level
        return number
