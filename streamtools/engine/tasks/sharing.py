"""Sharing: one object for each event loop and key; its first user opens it, and its last user closes it.

```python
connections = Sharing(close=Connection.close, is_dead=lambda connection: connection.lost is not None)
lease = await connections.acquire(address, lambda: open_connection(address))
try:
    await lease.value.ask(...)
finally:
    await lease.release()
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from contextlib import suppress
from contextvars import Context
from typing import Any, Generic, TypeVar

from streamtools.engine.tasks.eventloops import at_end, forget, unlisted

T = TypeVar("T")

#: The shared objects of one event loop, by key.
Shelf = dict[Hashable, "_Entry[T]"]


class Sharing(Generic[T]):
    """Shares objects among all callers that ask for the same key in the same event loop.

    It may be a global of a module: no object outlives the event loop that it was opened in. It can be used from every
    thread that runs a loop, because each loop has its own objects.

    Parameters:
        close: closes an object. It runs in its own task, so that no caller's cancellation interrupts it.
        is_dead: whether an object cannot be used any more. Then the next caller gets another object, and those that
            have this one keep it until they release it.
    """

    def __init__(
        self, close: Callable[[T], Coroutine[Any, Any, None]], *, is_dead: Callable[[T], bool] = lambda _: False
    ) -> None:
        self._close = close
        self._is_dead = is_dead
        self._loops: dict[asyncio.AbstractEventLoop, Shelf[T]] = {}

    async def acquire(self, key: Hashable, open_: Callable[[], Coroutine[Any, Any, T]]) -> Lease[T]:
        """Return the object of this key in the running loop: open it if nobody has, wait if somebody is opening it.

        Parameters:
            open_: opens an object. It runs in its own task, in an empty context: the cancellation of one caller does
                not interrupt it while others wait for it.

        Raises:
            BaseException: whatever `open_` raises, in all callers that waited for it. The next caller tries again.
        """
        loop = asyncio.get_running_loop()
        shelf = self._shelf(loop)
        while (entry := shelf.get(key)) is not None and entry.closing is not None:
            await asyncio.wait({entry.closing})  # the new object may need the same port or exclusive queue
            shelf = self._shelf(loop)  # the old shelf was discarded if it was empty
        if entry is None or self._is_over(entry):
            entry = shelf[key] = _Entry(loop, key, loop.create_task(open_(), context=Context()))
        entry.holders += 1
        try:
            await asyncio.wait({entry.opening})
            return Lease(self, entry, entry.opening.result())
        except BaseException:
            if (closing := self._leave(entry)) is not None:
                await asyncio.wait({closing})  # leave nothing half open
            raise

    def _is_over(self, entry: _Entry[T]) -> bool:
        opening = entry.opening
        if not opening.done():
            return False
        return opening.cancelled() or opening.exception() is not None or self._is_dead(opening.result())

    def _leave(self, entry: _Entry[T]) -> asyncio.Task[None] | None:
        """Count one holder less; if it was the last one, return the task that closes the object."""
        entry.holders -= 1
        if entry.holders:
            return None
        if not entry.opening.done():
            entry.opening.cancel()
        # The end of the loop must not cancel this task, even before it has begun: that would leave the object open.
        entry.closing = closing = unlisted(entry.loop.create_task(self._end(entry), context=Context()))
        end = _Closing(closing)
        at_end(end)
        closing.add_done_callback(lambda _: forget(end))
        return closing

    async def _end(self, entry: _Entry[T]) -> None:
        try:
            await asyncio.wait({entry.opening})
            if not entry.opening.cancelled() and entry.opening.exception() is None:
                await self._close(entry.opening.result())
        finally:
            shelf = self._shelf(entry.loop)
            if shelf.get(entry.key) is entry:
                del shelf[entry.key]
            if not shelf:  # so that no closed loop is kept
                self._loops.pop(entry.loop, None)

    def _shelf(self, loop: asyncio.AbstractEventLoop) -> Shelf[T]:
        found = self._loops.get(loop)
        if found is None:
            for other in list(self._loops):
                if other.is_closed():  # its tasks cannot be awaited any more
                    self._loops.pop(other, None)
            found = self._loops[loop] = {}
        return found


class Lease(Generic[T]):
    """The right to use a shared object until `release()`.

    Attributes:
        value: the object.
    """

    def __init__(self, sharing: Sharing[T], entry: _Entry[T], value: T) -> None:
        self.value: T = value
        self._sharing = sharing
        self._entry: _Entry[T] | None = entry

    async def release(self) -> None:
        """Release the object; the last release closes it, and waits until it is closed. Safe to repeat.

        In another event loop this waits for nothing: the loop of the object closes it, or is closed itself.
        """
        entry, self._entry = self._entry, None
        if entry is None or entry.loop.is_closed():
            return
        if entry.loop is not asyncio.get_running_loop():
            with suppress(RuntimeError):  # that loop was closed at this moment
                entry.loop.call_soon_threadsafe(self._sharing._leave, entry)
            return
        if (closing := self._sharing._leave(entry)) is not None:
            await asyncio.wait({closing})
            closing.result()


class _Closing:
    """Lets the end of the event loop wait for the task that closes an object."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    async def close(self) -> None:
        """Wait until the task has ended."""
        try:
            await asyncio.wait({self._task})
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise


class _Entry(Generic[T]):
    """One object, from the beginning of its opening to the end of its closing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, key: Hashable, opening: asyncio.Task[T]) -> None:
        self.loop = loop
        self.key = key
        self.opening = opening
        self.closing: asyncio.Task[None] | None = None
        #: The number of callers that have the object, or wait for it.
        self.holders = 0
