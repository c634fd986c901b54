"""Handles SIGTERM and SIGINT: the first one stops everything that listens in the main thread's event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Final, Self, TypeVar

T = TypeVar("T")

log: logging.Logger = logging.getLogger("streamtools")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: A signal that is repeated within this many seconds counts once.
SAME_SIGNAL_TIMEOUT: Final = 0.05
#: Seconds between two attempts to interrupt.
_MOMENT: Final = 0.05
#: Seconds that the last line of the log may take.
_LAST_LOG_TIMEOUT: Final = 0.5


class Interrupted(BaseException):
    """Raised in code that blocks the event loop, because a signal came or its time is over."""


class _Signals:
    """Handles both signals in the main thread, from the first `heeded` block to the end of the last one.

    Python calls `_came` between any two of its instructions, also in code that blocks the event loop, and while the
    event loop waits.
    """

    #: The object that is installed; None outside of all blocks.
    current: _Signals | None = None

    def __init__(self) -> None:
        self.users = 0
        self._process = os.getpid()
        #: When the first signal came, on the monotonic clock.
        self.first: float | None = None
        #: Whether the first signal interrupts the code that runs now.
        self.interrupts = False
        self.in_loop: _InLoop | None = None
        #: Set while another thread interrupts us by a signal: returns whether the interruption is still wanted.
        self._overdue: Callable[[], bool] | None = None
        self.handler: Callable[[int, FrameType | None], None] = self._came
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self.handler)
        self._ignoring = threading.Lock()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._was_ignored

    def _was_ignored(self, ignored: sys.UnraisableHookArgs) -> None:
        # Python ignores exceptions in finalizers and in callbacks of weak references; imports run both.
        if not isinstance(ignored.exc_value, Interrupted):
            self._unraisable(ignored)
        elif self.interrupts:
            with self._ignoring:
                threading.Thread(target=self._interrupt_again, daemon=True).start()

    def _interrupt_again(self) -> None:
        with self._ignoring:
            time.sleep(_MOMENT)  # in another thread, until the main thread has left `_was_ignored`
        self.interrupt_if(lambda: self.interrupts)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # the signal came to a forked child before it had reset its signals
            self.leave()
            os.kill(os.getpid(), number)
            return
        if (overdue := self._overdue) is not None:
            self._overdue = None
            if overdue():
                raise Interrupted
            return
        if self.first is None:
            self.first = time.monotonic()
            if self.in_loop is not None:
                self.in_loop.stop_all(number)
            if self.interrupts:
                raise Interrupted(signal.Signals(number).name)
        elif (
            time.monotonic() - self.first >= SAME_SIGNAL_TIMEOUT
        ):  # sooner, it is the same one: timeout(1) signals twice
            # Log in another thread, because this one may hold the lock of a log handler.
            last = threading.Thread(target=log.warning, args=("A second signal: ending at once.",), daemon=True)
            last.start()
            last.join(_LAST_LOG_TIMEOUT)
            os._exit(128 + number)

    def interrupt_if(self, overdue: Callable[[], bool]) -> None:
        """Interrupt the main thread if `overdue` returns true when the main thread calls it; for other threads."""
        self._overdue = overdue
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNALS[0])

    def leave(self) -> None:
        """Reset both signals to Python's defaults, in a forked child: the event loop is its parent's."""
        signal.set_wakeup_fd(-1)  # the parent reads from the other end of this pipe
        if signal.getsignal(signal.SIGTERM) is self.handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is self.handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        """Restore the handlers of before, unless other code has set its own meanwhile."""
        if sys.unraisablehook == self._was_ignored:
            sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            if signal.getsignal(number) is self.handler and handler is not None:
                signal.signal(number, handler)  # None was not set by Python, and cannot be restored


class _InLoop:
    """Stops the listeners of one event loop at the first signal."""

    def __init__(self, signals: _Signals, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: For each listener: the function that stops it, and the seconds after which code that still blocks the event
        #: loop is interrupted.
        self.listeners: list[tuple[Callable[[], None], float]] = []
        self._signals = signals
        self._heard = threading.Event()
        self._before = {number: _handle(loop, number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, _wake_up)  # a signal that reaches another thread wakes the loop
            signal.signal(number, signals.handler)

    def stop_all(self, number: int) -> None:
        """Stop all listeners, as soon as the event loop runs."""
        self.loop.call_soon_threadsafe(self._say, number)
        for stop, _ in self.listeners:
            self.loop.call_soon_threadsafe(stop)
        limit = max(seconds for _, seconds in self.listeners)
        threading.Thread(target=self._insist, args=(limit,), name="streamtools-signals", daemon=True).start()

    def _say(self, number: int) -> None:
        self._heard.set()
        log.info("%s: finishing what is in hand.", signal.Signals(number).name)

    def _insist(self, limit: float) -> None:
        while not self._heard.wait(limit):
            self._signals.interrupt_if(lambda: not self._heard.is_set())

    def restore(self) -> None:
        """Restore the handlers of before, unless other code has set its own meanwhile."""
        self._heard.set()
        for number, handle in self._before.items():
            if signal.getsignal(number) is not self._signals.handler:
                continue
            self.loop.remove_signal_handler(number)
            if handle is None:
                signal.signal(number, self._signals.handler)
            else:
                self.loop.add_signal_handler(number, handle._callback, *handle._args)


def _leave_to_parent() -> None:
    """Leave the handling of signals to the parent; called in a forked child."""
    signals, _Signals.current = _Signals.current, None
    if signals is not None:
        signals.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _wake_up() -> None:
    """Do nothing: `_came` has run by now, and has scheduled the rest."""


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def heeded() -> Iterator[None]:
    """Handle SIGTERM and SIGINT in this block: listeners in it stop, even if the signal comes before they begin.

    A second signal ends the process at once. Only the main thread can have signal handlers; in other threads this
    does nothing.
    """
    if not _in_main_thread():
        yield
        return
    signals = _Signals.current = _Signals.current or _Signals()
    signals.users += 1
    try:
        yield
    finally:
        signals.users -= 1
        if not signals.users:
            _Signals.current = None
            signals.restore()


@contextmanager
def stopped_by_signals(stop: Callable[[], None], limit: float) -> Iterator[None]:
    """Call `stop` at the first SIGTERM or SIGINT; a second one ends the process at once.

    Several may listen in one event loop: all of them are stopped. When the last one has ended, the handlers of before
    are restored. Outside of the main thread this does nothing.

    Parameters:
        limit: the seconds after the signal after which code that still blocks the event loop is interrupted.
    """
    with heeded():
        if not _in_main_thread() or (signals := _Signals.current) is None:
            yield
            return
        loop = asyncio.get_running_loop()
        if (here := signals.in_loop) is None or here.loop is not loop:
            here = signals.in_loop = _InLoop(signals, loop)
        here.listeners.append((stop, limit))
        if signals.first is not None:
            stop()
        try:
            yield
        finally:
            here.listeners.remove((stop, limit))
            if not here.listeners:
                signals.in_loop = None if signals.in_loop is here else signals.in_loop
                here.restore()


class Interruptible:
    """Runs code that may block the event loop, and interrupts it.

    Use it by `with`, or as the context of `calling.within`. Outside of the main thread, and outside of `heeded`, it
    interrupts nothing.

    Parameters:
        by_signal: whether the first signal interrupts the code; if that signal has come before, the constructor
            raises at once.
        seconds: interrupt the code also this many seconds after the beginning of the `with` block; None for no limit.

    Raises:
        Interrupted: the code was interrupted.
    """

    def __init__(self, *, by_signal: bool = False, seconds: float | None = None) -> None:
        self._signals = _Signals.current if _in_main_thread() else None
        self._by_signal = by_signal
        self._seconds = seconds
        self._runs = False
        self._over = threading.Event()
        if by_signal and self._signals is not None and self._signals.first is not None:
            raise Interrupted

    def __enter__(self) -> Self:
        if self._signals is not None and self._seconds is not None:
            wait = partial(self._wait, self._signals, self._seconds)
            threading.Thread(target=wait, name="streamtools-limit", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that may be interrupted."""
        if (signals := self._signals) is None:
            return function(*arguments)
        try:
            self._runs, signals.interrupts = True, self._by_signal
            return function(*arguments)
        finally:
            self._runs = signals.interrupts = False

    def _wait(self, signals: _Signals, seconds: float) -> None:
        while not self._over.wait(seconds):
            if self._runs:
                signals.interrupt_if(lambda: self._runs)


def _handle(loop: asyncio.AbstractEventLoop, number: int) -> Any:
    """Return what an event loop calls at a signal; only asyncio's own loop tells, in a private attribute."""
    return getattr(loop, "_signal_handlers", {}).get(number)
