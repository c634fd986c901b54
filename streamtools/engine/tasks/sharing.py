"""Sharing: one object for each event loop and key, opened by the first who needs it, closed by the last.

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
    """Objects that are shared by all who ask for them under one key, on one event loop.

    May stand in a module: nothing outlives the event loop that it was opened on. Safe from any thread that runs a
    loop, as each loop has objects of its own.

    Parameters:
        close: closes an object; runs in a task of its own, so that nobody's cancellation interrupts it.
        is_dead: the object is of no use any more: whoever asks next gets another, while those who have it keep it
            until they release it.
    """

    def __init__(
        self, close: Callable[[T], Coroutine[Any, Any, None]], *, is_dead: Callable[[T], bool] = lambda _: False
    ) -> None:
        self._close = close
        self._is_dead = is_dead
        self._loops: dict[asyncio.AbstractEventLoop, Shelf[T]] = {}

    async def acquire(self, key: Hashable, open_: Callable[[], Coroutine[Any, Any, T]]) -> Lease[T]:
        """The object of this key on the running loop: opened if nobody has it, waited for while somebody opens it.

        Parameters:
            open_: opens one. It runs in a task of its own and in an empty context: a caller that is cancelled does
                not interrupt it for the others; the last one does.

        Raises:
            BaseException: whatever `open_` raises, for all who waited for it. The next caller tries anew.
        """
        loop = asyncio.get_running_loop()
        shelf = self._shelf(loop)
        while (entry := shelf.get(key)) is not None and entry.closing is not None:
            await asyncio.wait({entry.closing})  # what it held, a port or an exclusive queue, may be wanted anew
            shelf = self._shelf(loop)  # the former one was given up if it was empty
        if entry is None or self._is_over(entry):
            entry = shelf[key] = _Entry(loop, key, loop.create_task(open_(), context=Context()))
        entry.holders += 1
        try:
            await asyncio.wait({entry.opening})
            return Lease(self, entry, entry.opening.result())
        except BaseException:
            if (closing := self._leave(entry)) is not None:
                await asyncio.wait({closing})  # leave nothing half open behind
            raise

    def _is_over(self, entry: _Entry[T]) -> bool:
        opening = entry.opening
        if not opening.done():
            return False
        return opening.cancelled() or opening.exception() is not None or self._is_dead(opening.result())

    def _leave(self, entry: _Entry[T]) -> asyncio.Task[None] | None:
        """Count one holder less; what closes the object, if that was the last one."""
        entry.holders -= 1
        if entry.holders:
            return None
        if not entry.opening.done():
            entry.opening.cancel()
        # The end of the loop lets it come to its end: cancelled, or not even begun, it would leave the object open.
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
            if not shelf:  # so that a loop that ends is not kept
                self._loops.pop(entry.loop, None)

    def _shelf(self, loop: asyncio.AbstractEventLoop) -> Shelf[T]:
        found = self._loops.get(loop)
        if found is None:
            for other in list(self._loops):
                if other.is_closed():  # what it ran cannot be awaited any more
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
        """Let go of the object; the last one to do so closes it, and waits for that. Safe to repeat.

        From another event loop nothing is awaited: the object's own loop closes it, or has ended with it.
        """
        entry, self._entry = self._entry, None
        if entry is None or entry.loop.is_closed():
            return
        if entry.loop is not asyncio.get_running_loop():
            with suppress(RuntimeError):  # it has ended in this moment
                entry.loop.call_soon_threadsafe(self._sharing._leave, entry)
            return
        if (closing := self._sharing._leave(entry)) is not None:
            await asyncio.wait({closing})
            closing.result()


class _Closing:
    """The closing of an object; the end of the event loop waits for it."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    async def close(self) -> None:
        """Wait until it has ended."""
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
        #: Those who have the object, or wait for it.
        self.holders = 0
