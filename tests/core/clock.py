"""A clock that a test puts forward at will."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """The time of day and the event loop's, both put forward at will."""

    def __init__(self) -> None:
        self.offset = 0
        self._time = time.time

    def __call__(self) -> float:
        return self._time() + self.offset

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """An event loop on this clock."""
        clock = self

        class Loop(asyncio.SelectorEventLoop):
            def time(self) -> float:
                return super().time() + clock.offset

        return Loop()
