"""Tells a cancellation that is meant for the running task from one that is not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from contextlib import suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, TypeVar

from streamtools.errors import ConnectionLost

T = TypeVar("T")

#: A task that ignores its cancellation is cancelled this often.
CANCEL_TRIES: Final = 10


def asked_to_stop() -> bool:
    """Whether other code cancelled the running task. If not, a CancelledError in it is not meant for it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class WorkerScope:
    """The scope of the tasks that run handlers: they end when it ends, and for no other reason.

    A handler can cancel the task that runs it: by mistake, or by a library that does not undo its own cancellation.
    Then the handler has failed. The task must not end, and the next message must not be affected.
    """

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self._task = task
        #: True when the tasks have to end.
        self.ending: bool = False

    @property
    def ended(self) -> bool:
        """Whether the tasks have to end: `ending` is true, or the task that started them was cancelled."""
        return self.ending or (self._task is not None and self._task.cancelling() > 0)


#: The scope of the running task, if it runs handlers.
worker_scope: ContextVar[WorkerScope | None] = ContextVar("streamtools_home", default=None)


def scope_ended() -> bool:
    """Whether the running task has to end. If it runs handlers, a cancellation that a handler made does not count."""
    owner = worker_scope.get()
    return asked_to_stop() if owner is None else owner.ended


async def clear_cancellation() -> None:
    """Clear a cancellation of the running task that a handler made."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    while task.uncancel():
        pass
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)  # before Python 3.13 the cancellation is still raised once


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await work that must be completed: a cancellation meanwhile takes effect at the caller's next await.

    A second cancellation cancels the work. If the cancellation came from a timeout whose block has ended by then, it
    is not raised.
    """
    task, inner = asyncio.current_task(), asyncio.ensure_future(work)
    held = False
    while not inner.done():
        try:
            await asyncio.wait({inner})
        except asyncio.CancelledError:
            if held:
                inner.cancel()
                raise
            held = True
    if held and task is not None:
        asyncio.get_running_loop().call_soon(_cancel_now, task)
    return inner.result()


def _cancel_now(task: asyncio.Task[Any]) -> None:
    if not task.done() and task.cancelling():
        task.uncancel()
        task.cancel()


class until:  # noqa: N801 - used as `async with until(event):`, as asyncio.timeout is
    """A block that ends without an error when an event is set; it works like `asyncio.timeout`."""

    def __init__(self, event: asyncio.Event) -> None:
        self._event = event
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._watch = asyncio.create_task(self._event.wait())
        self._watch.add_done_callback(self._end)

    def _end(self, _: asyncio.Task[Any]) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watch.remove_done_callback(self._end)
        self._watch.cancel()
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            return True
        return False


async def end(tasks: Iterable[asyncio.Task[Any]], seconds: float) -> int:
    """Cancel tasks; cancel those that continue several times.

    A task that still continues is abandoned: the end of the event loop does not wait for it.

    Returns:
        The number of abandoned tasks.
    """
    pending, tries = {task for task in tasks if not task.done()}, 0
    try:
        while pending and tries < CANCEL_TRIES:
            tries += 1
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=seconds / CANCEL_TRIES)
    finally:
        for task in pending:
            if not task.done():
                asyncio.tasks._unregister_task(task)  # asyncio.run would wait for it for ever
    return len(pending)


async def stray_cancellation_as_lost(work: Awaitable[T]) -> T:
    """Await a call of a driver. If its client library cancels the caller, it has lost its connection.

    Raises:
        ConnectionLost: the work was cancelled, although nobody cancelled the running task.
    """
    try:
        return await work
    except asyncio.CancelledError as error:
        if asked_to_stop():
            raise
        raise ConnectionLost("The client library cancelled the operation.") from error
