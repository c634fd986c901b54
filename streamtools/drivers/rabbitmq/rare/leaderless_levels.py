"""Levels of the delay chain whose queue has no leader: messages are sent without them.

A quorum queue that has lost most of its nodes confirms nothing. What needs such a level is held a little longer, by
the levels above it, until the level is tried again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streamtools.drivers.rabbitmq.topology.delay_levels import DOUBLING

#: Seconds for which a level that gave no answer is not used.
LEADERLESS_TTL: Final = 300.0


class LeaderlessLevels:
    """The levels that one connection does not use for now.

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
        """The least number of steps, at least this one, that needs none of these levels."""
        if not self._until:
            return number
        self._until = {level: until for level, until in self._until.items() if until > self._time()}
        for level in sorted(self._until):
            if number >> level & 1 and number < 1 << DOUBLING:
                number = (number >> level) + 1 << level
        return number
