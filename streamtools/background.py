"""Background: one event loop in a thread, for code that has none: scripts, threads, synchronous web frameworks."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, Final, TypeVar

from streamtools.engine.tasks.cancellation import end

T = TypeVar("T")

#: Seconds in which the loop's thread ends when the interpreter does.
CLOSE_TIMEOUT: Final = 1.0


class BackgroundLoop:
    """An event loop in a daemon thread, begun with the first coroutine; begun anew in a forked process."""

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):  # the lock may be held by a thread that is not in the child
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Coroutine[Any, Any, T]) -> Work[T]:
        """Begin to run a coroutine; safe from any thread."""
        return Work(self._running(), work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for its result; safe from any thread.

        A wait that is interrupted (Ctrl-C) cancels the coroutine, and waits for its end.

        Raises:
            RuntimeError: called on the loop itself, which would wait for itself for ever.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("The background loop would wait for itself: here, await the coroutine instead.")
        return self.start(work).result()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name="streamtools-background", daemon=True
                )
                self._thread.start()
                atexit.register(_end, self._loop, self._thread)
            return self._loop


class Work(Future[T]):
    """A coroutine under way on a background loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        super().__init__()
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, work)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result; leaving early, by an exception of the waiting thread, ends the coroutine first."""
        try:
            return super().result(timeout)
        finally:
            if not self.done():
                self.stop()

    def stop(self) -> None:
        """Cancel the coroutine, and wait for its end. Safe to repeat."""
        self._loop.call_soon_threadsafe(self._cancel)
        wait([self])

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._ended)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(end(asyncio.all_tasks(loop), CLOSE_TIMEOUT / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())  # closes what is open
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_TIMEOUT)


_background: Final = BackgroundLoop()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on this process's one background loop and wait for its result; safe from any thread.

    ```python
    run(bus.start())
    run(bus.publish(OrderPlaced(id=1)))     # a bus is stopped on the loop that it was started on
    ```

    Raises:
        RuntimeError: called on the background loop itself: await the coroutine there.
    """
    return _background.run(work)


def start(work: Coroutine[Any, Any, T]) -> Work[T]:
    """Begin to run a coroutine on the background loop; its `.result()` waits for it."""
    return _background.start(work)
