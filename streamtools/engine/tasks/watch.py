"""Watches event loops, and logs which code blocks one.

A blocked event loop sends no heartbeat and acknowledges nothing. Brokers then believe that the process is dead, and
deliver its messages to others; the errors that follow do not show the cause. So once a second, a thread asks each
loop that handles messages for an answer. If no answer comes, it logs what the loop's thread is doing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds between two questions to a loop.
CHECK_INTERVAL: Final = 1.0
#: After this many seconds without an answer, a warning is logged.
BLOCKED_TIMEOUT: Final = 3.0

#: The directories of this package and of asyncio; the warning never names code in them.
_OURS: Final = str(Path(__file__).absolute().parents[2]) + os.sep
_ASYNCIO: Final = os.path.dirname(os.path.abspath(asyncio.__file__)) + os.sep  # noqa: PTH100, PTH120


class _Watched:
    """One watched event loop.

    Parameters:
        loop: the running loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.users = 0
        self._thread = threading.get_ident()
        self._asked: float | None = None
        self._blocker = ""

    def ask(self, now: float) -> None:
        """Ask the loop for an answer, unless the last answer has not come yet."""
        if self._asked is not None:
            return
        self._asked = now
        try:
            self.loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed
            self._asked = None

    def look(self, now: float) -> None:
        """Log what blocks the loop, if it has not answered for too long."""
        if self._asked is not None and not self._blocker and now - self._asked >= BLOCKED_TIMEOUT:
            self._blocker = _blocker(sys._current_frames().get(self._thread))
            log.warning(
                "The event loop has stood still for %.1f s, in %s. Meanwhile no heartbeat is sent and nothing is "
                "acknowledged, and a broker may deliver its messages to others. Await slow operations, or write the "
                "handler with `def`: then it runs in a thread.",
                now - self._asked,
                self._blocker,
            )

    def forgive(self, now: float) -> None:
        """Start the wait for the answer again: the whole process was stopped, so no code has blocked the loop."""
        if self._asked is not None and not self._blocker:
            self._asked = now

    def _answer(self) -> None:
        asked, blocker = self._asked, self._blocker
        self._asked, self._blocker = None, ""
        if blocker and asked is not None:
            log.warning(
                "The event loop goes on: it stood still for %.1f s, in %s.", time.monotonic() - asked, blocker
            )


class _Watch:
    """Watches the event loops of this process, in one thread that runs while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[asyncio.AbstractEventLoop, _Watched] = {}
        self._ended: threading.Event | None = None

    def add(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch a loop until `remove` has been called as often as `add`."""
        with self._lock:
            watched = self._watched.setdefault(loop, _Watched(loop))
            watched.users += 1
            if self._ended is None:
                self._ended = threading.Event()
                threading.Thread(target=self._run, args=(self._ended,), name="streamtools-watch", daemon=True).start()

    def remove(self, loop: asyncio.AbstractEventLoop) -> None:
        """Undo one `add`."""
        with self._lock:
            watched = self._watched[loop]
            watched.users -= 1
            if not watched.users:
                del self._watched[loop]
            if not self._watched and self._ended is not None:
                self._ended.set()
                self._ended = None

    def _run(self, ended: threading.Event) -> None:
        last, worked = time.monotonic(), time.process_time()
        while not ended.wait(CHECK_INTERVAL):
            now, work = time.monotonic(), time.process_time()
            with self._lock:
                watched = list(self._watched.values())
            # This thread may itself be late. If the process used no CPU meanwhile, the process was stopped. Otherwise
            # some code let no other thread run, for example a long regular expression.
            stopped = now - last > 2 * CHECK_INTERVAL and work - worked < (now - last) / 10
            for one in watched:
                if stopped:
                    one.forgive(now)
                one.ask(now if stopped else last + CHECK_INTERVAL)
                one.look(now)
            last, worked = now, work


_watch: Final = _Watch()


@contextmanager
def watched() -> Iterator[None]:
    """Watch the running event loop while the block lasts."""
    loop = asyncio.get_running_loop()
    _watch.add(loop)
    try:
        yield
    finally:
        _watch.remove(loop)


def _blocker(frame: FrameType | None) -> str:
    """Return the function of the user that runs in a thread, and its current line.

    Parameters:
        frame: the innermost frame of the thread.
    """
    outermost: FrameType | None = None
    at = frame
    while at is not None and not _is_ours(at.f_code):
        outermost, at = at, at.f_back
    if outermost is None:
        return "code that cannot be seen" if frame is None else f"{_name(frame)} ({_place(frame)})"
    assert frame is not None
    text = f"{_name(outermost)} ({_place(outermost)})"
    return text if frame is outermost else f"{text}, which is in {_name(frame)} ({_place(frame)})"


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith((_OURS, _ASYNCIO))


def _name(frame: FrameType) -> str:
    module = frame.f_globals.get("__name__", "")
    return f"{module}.{frame.f_code.co_qualname}" if module else frame.f_code.co_qualname


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
