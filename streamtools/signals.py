"""SIGTERM and SIGINT: one wish to stop, for everything that serves in the main thread's event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

log: logging.Logger = logging.getLogger("streamtools")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: Seconds within which a repeated signal is the same one.
SAME_SIGNAL: Final = 0.05

_Python = Callable[[int, FrameType | None], Any] | int | None


class Interrupted(BaseException):
    """A signal came while code ran that no event loop can stop."""


class _Signals:
    """Both signals in one event loop, from the first who listens to the last."""

    #: The one that is installed.
    current: _Signals | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.listeners: list[Callable[[], None]] = []
        #: When the first signal came, on the monotonic clock.
        self.first: float | None = None
        self._before = {number: (signal.getsignal(number), _handle(loop, number)) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self.came, number)
        self._ours = {number: _handle(loop, number) for number in SIGNALS}

    def came(self, number: int) -> None:
        """Stop all who listen; a second signal ends the process."""
        if self.is_second():
            log.warning("A second signal: ending at once.")
            os._exit(128 + number)
        if self.first is None:
            log.info("%s: finishing what is in hand.", signal.Signals(number).name)
            self.first = time.monotonic()
            for stop in self.listeners:
                stop()

    def is_second(self) -> bool:
        """A signal now is the second one. Moments after the first it is the same: timeout(1) signals twice."""
        return self.first is not None and time.monotonic() - self.first >= SAME_SIGNAL

    def restore(self) -> None:
        """Put back what was there before, unless somebody has put something else there meanwhile."""
        for number, (before, handle) in self._before.items():
            if _handle(self.loop, number) is not self._ours[number]:
                continue
            self.loop.remove_signal_handler(number)
            _set(number, before)
            if handle is not None:
                self.loop.add_signal_handler(number, handle._callback, *handle._args)


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGTERM or SIGINT; a second one ends the process at once.

    Several may listen in one event loop: all of them are stopped. When the last has left, the handlers of before are
    put back. Outside of the main thread, which alone can have signal handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    signals = _Signals.current
    if signals is None or signals.loop is not loop:
        signals = _Signals.current = _Signals(loop)
    signals.listeners.append(stop)
    if signals.first is not None:
        stop()
    try:
        yield
    finally:
        signals.listeners.remove(stop)
        if not signals.listeners:
            signals.restore()
            _Signals.current = None if _Signals.current is signals else _Signals.current


@contextmanager
def interrupted_by_signals(*, first: bool = True) -> Iterator[None]:
    """Heed signals in code that does not run in the event loop, or blocks it. A second one ends the process at once.

    Parameters:
        first: whether the first one interrupts, too.

    Raises:
        Interrupted: a signal came.
    """
    handle = _interrupt if first else _second
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                _set(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _second(number, frame)
    raise Interrupted(signal.Signals(number).name)


def _second(number: int, frame: FrameType | None) -> None:
    # An event loop that listens is told of the signal as well, once it runs again.
    if _Signals.current is not None and _Signals.current.is_second():
        os._exit(128 + number)


def _set(number: int, handler: _Python) -> None:
    if handler is not None:  # None: it was not set from Python, and cannot be set from here
        signal.signal(number, handler)


def _handle(loop: asyncio.AbstractEventLoop, number: int) -> Any:
    """What this event loop calls at a signal, where it tells: asyncio has no public way to ask, and uvloop none."""
    return getattr(loop, "_signal_handlers", {}).get(number)
