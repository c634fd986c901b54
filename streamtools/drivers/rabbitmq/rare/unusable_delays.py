"""Delays are not possible: the user may not declare the delay chain, may not send to it, or sets declare=False.

For each refusal the broker closes a channel, so refusals are remembered for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from streamtools.errors import QueueError

#: A refusal is remembered for this many seconds.
UNUSABLE_TTL: Final = 30.0


class Unheld(QueueError):
    """No queue can hold a message until it is due: the delay chain is missing, or we may not use it."""


class LevelsMissing(Unheld):
    """Levels of the delay chain are missing."""


class UnusableDelays:
    """Remembers which parts of the delay chain one connection cannot use.

    Parameters:
        time: the event loop's clock.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        #: (the word of a target or a number of levels, where 0 is the whole chain; whether to declare) -> (until when
        #: it is remembered, why it cannot be used).
        self._found: dict[tuple[str | int, bool], tuple[float, str]] = {}

    def note(self, what: str | int, why: str, *, declares: bool) -> None:
        """Remember that a target, or this number of levels, cannot be used."""
        self._found[what, declares] = self._time() + UNUSABLE_TTL, why

    def forbid(self, why: str) -> None:
        """Remember that we may not send to the chain."""
        for declares in (True, False):
            self.note(0, why, declares=declares)

    def check(self, target: str, levels: int, *, standing: int, declares: bool) -> None:
        """Raise Unheld if a refusal of this target or these levels is remembered.

        Parameters:
            levels: the number of levels that are needed.
            standing: the number of levels that exist.
        """
        if not self._found:
            return
        now = self._time()
        self._found = {what: found for what, found in self._found.items() if found[0] > now}
        for (what, declaring), (_, why) in self._found.items():
            is_meant = what in (target, 0) or (isinstance(what, int) and standing < what <= levels)
            if is_meant and declaring is declares:
                raise Unheld(why)
