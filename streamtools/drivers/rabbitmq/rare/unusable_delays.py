"""Delays that are not possible: this user may not declare the chain, may not send to it, or says declare=False.

Each refusal ends a channel, so it is remembered for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streamtools.errors import QueueError

#: Seconds until what was not usable is asked for again.
UNUSABLE_TTL: Final = 30.0


class Unheld(QueueError):
    """Nothing can hold a message until it is due: what that needs is missing, or we may not use it."""


class LevelsMissing(Unheld):
    """Levels of the chain are missing."""


class UnusableDelays:
    """What one connection cannot use for delays.

    Parameters:
        time: the event loop's clock.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        #: A target's word or a number of levels (0: the whole chain), and whether declaring was wanted -> until when
        #: that is taken to be so, and why.
        self._found: dict[tuple[str | int, bool], tuple[float, str]] = {}

    def note(self, what: str | int, why: str, *, declares: bool) -> None:
        """Remember that this target, or so many levels, cannot be used."""
        self._found[what, declares] = self._time() + UNUSABLE_TTL, why

    def forbid(self, why: str) -> None:
        """Remember that we may not send to the chain."""
        for declares in (True, False):
            self.note(0, why, declares=declares)

    def check(self, target: str, levels: int, *, standing: int, declares: bool) -> None:
        """Raise Unheld if this was found out a moment ago.

        Parameters:
            levels: how many are needed.
            standing: how many exist.
        """
        if not self._found:
            return
        now = self._time()
        self._found = {what: found for what, found in self._found.items() if found[0] > now}
        for (what, declaring), (_, why) in self._found.items():
            is_meant = what in (target, 0) or (isinstance(what, int) and standing < what <= levels)
            if is_meant and declaring is declares:
                raise Unheld(why)
