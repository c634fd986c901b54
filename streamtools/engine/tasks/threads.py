"""Runs `def` handlers in daemon threads, so that a handler that hangs cannot keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(Executor):
    """A pool of daemon threads; it starts a thread when there is work and no thread is idle.

    At its exit the interpreter waits for the threads of concurrent.futures.ThreadPoolExecutor, however long a handler
    hangs. It does not wait for daemon threads. Nothing is lost by that: the broker delivers the message again.

    Parameters:
        number: the most threads.
        name: the beginning of their names.
    """

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._name = name
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` in a thread."""
        future: Future[T] = Future()
        self._work.put((future, lambda: fn(*args, **kwargs)))
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._number:
            thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Let each thread end after its present work, without waiting for it. Safe to repeat."""
        for _ in self._threads:
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, work
            self._idle.release()


class DefaultThreads(ThreadPoolExecutor):
    """The threads of `asyncio.to_thread` in an event loop of this library; its end waits for them, but not for ever.

    asyncio accepts only a ThreadPoolExecutor, so this is one; but the work runs in a pool of `Threads`.

    Parameters:
        number: the most threads.
        patience: the seconds that the end of the loop waits for running work.
    """

    def __init__(self, number: int, patience: float) -> None:
        super().__init__(number)
        self._pool = Threads(number, "streamtools-default")
        self._patience = patience
        self._under_way: set[Future[Any]] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` in a thread."""
        future = self._pool.submit(fn, *args, **kwargs)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let each thread end after its present work, and wait for that, but not for ever. Safe to repeat."""
        self._pool.shutdown()
        if wait:
            _wait_for([*self._under_way], self._patience)


def _wait_for(work: list[Future[Any]], seconds: float) -> None:
    wait(work, timeout=seconds)
