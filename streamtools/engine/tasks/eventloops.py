"""Binds objects to event loops: connections, locks and tasks belong to the loop that they were made in.

A producer, consumer, admin or bus may be a global of a module. It can be used in one event loop after the other, or
in several at the same time, in threads. It has a connection in each loop. `at_end` closes a connection that is still
open when its loop ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from streamtools.driver import required

T = TypeVar("T")

log: logging.Logger = logging.getLogger("streamtools")

#: When an event loop ends, all that is open is closed within this many seconds.
CLOSE_TIMEOUT: Final = 5.0

#: Held while an object moves from one loop to another: several threads may use the object.
_moving = threading.RLock()
#: Connections of the parent process, kept in a forked child: if they were collected there, the parent's could break.
_forked: Final[list[Any]] = []


def _renew_lock() -> None:
    global _moving  # noqa: PLW0603 - a thread that does not exist in the forked child may hold the old one
    _moving = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Closable(Protocol):
    """An object that is closed when its event loop ends."""

    async def close(self) -> None: ...


class PerLoop(Generic[T]):
    """Holds one object for each event loop that asks for it; forgets the objects of closed loops.

    Parameters:
        make: makes an object, in the running loop.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._process = os.getpid()
        self._found: dict[asyncio.AbstractEventLoop, T] = {}

    def here(self) -> T:
        """Return the object of the running loop; make it at the first call."""
        loop = asyncio.get_running_loop()
        found = self._found.get(loop)
        if found is None or self._process != os.getpid():
            with _moving:
                self._forget()
                found = self._found[loop] = self._make()
        return found

    def elsewhere(self) -> list[T]:
        """Return the objects of all other loops that are not closed."""
        loop = asyncio.get_running_loop()
        with _moving:
            self._forget()
            return [found for other, found in self._found.items() if other is not loop]

    def everywhere(self) -> list[T]:
        """Return the objects of all loops that are not closed. Safe to call from any thread."""
        with _moving:
            self._forget()
            return [*self._found.values()]

    def _forget(self) -> None:
        if self._process != os.getpid():
            _forked.append(self._found)
            self._process, self._found = os.getpid(), {}
        for loop in [loop for loop in self._found if loop.is_closed()]:
            del self._found[loop]


class LoopBound:
    """An object whose connections belong to the event loop that it is used in.

    When that loop is closed, the object starts again in the next loop: its constructor runs again with the same
    arguments, and public attributes keep their values. If it is used in a second loop while the first one is open,
    `_in_second_loop` decides what that loop uses.
    """

    #: The loop that its connections belong to; None before its first use.
    _at: asyncio.AbstractEventLoop | None = None
    _process: int = 0
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _twins: PerLoop[Self] | None = None

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        new = super().__new__(cls)
        new._arguments = (arguments, options)
        return new

    @required
    async def open(self) -> Self:
        """Connect, in the running loop."""
        raise NotImplementedError

    @required
    async def close(self) -> None:
        """Close the connection of the running loop."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _here(self) -> Self:
        """Return the object that the running loop uses: this one or a twin."""
        loop = asyncio.get_running_loop()
        if loop is self._at:
            return self
        with _moving:
            if self._at is None:
                self._live_in(loop)
            elif self._at.is_closed() or self._process != os.getpid():
                self._begin_anew()
                self._live_in(loop)
            else:
                return self._in_second_loop(loop)
        return self

    def _in_second_loop(self, loop: asyncio.AbstractEventLoop) -> Self:
        """Return the object for a second loop while the first one is open: a twin with its own connections."""
        if self._twins is None:
            self._twins = PerLoop(self._make_twin)
        return self._twins.here()

    def _make_twin(self) -> Self:
        arguments, options = self._arguments
        twin = type(self)(*arguments, **options)
        vars(twin).update(self._public())
        twin._live_in(asyncio.get_running_loop())
        return twin

    def _live_in(self, loop: asyncio.AbstractEventLoop) -> None:
        self._at, self._process = loop, os.getpid()

    def _begin_anew(self) -> None:
        """Run the constructor again, without awaiting anything of the closed loop."""
        public, kept = self._public(), {"_arguments": self._arguments, "_twins": self._twins}
        arguments, options = self._arguments
        if self._process == os.getpid():
            self._abandon()
        private = {name: value for name, value in vars(self).items() if name.startswith("_")}
        if self._process != os.getpid():
            _forked.append(private)
        for name in private.keys() - kept.keys():
            del vars(self)[name]
        type(self).__init__(self, *arguments, **options)
        vars(self).update({**kept, **public})

    def _abandon(self) -> None:
        """Release what can be released without `await`, because the loop ended before the object was closed."""

    def _public(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def in_its_loop(loop: asyncio.AbstractEventLoop | None, function: Callable[[], Any]) -> None:
    """Call a function in an event loop: at once if that loop is running here, else as soon as it can."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if loop is None or loop.is_closed():
        function()
    elif loop is running:
        function()
        loop.call_soon_threadsafe(_wake_up)  # if a signal handler called us, the loop may be waiting
    else:
        loop.call_soon_threadsafe(function)


def _wake_up() -> None:
    """Do nothing: the call itself makes the event loop look at its queue."""


# --- the end of a loop ------------------------------------------------------------------------------


class _Ending:
    """Closes objects at the end of one event loop."""

    #: The objects of this class by event loop; each removes itself at the end of its loop.
    all: Final[dict[asyncio.AbstractEventLoop, _Ending]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.open: dict[int, Closable] = {}
        self._loop = loop
        # At the end of a loop, after its tasks, asyncio closes its asynchronous generators (asyncio.run calls
        # loop.shutdown_asyncgens). Only then can we still run something in the loop, so we wait in a generator.
        self._generator = self._wait()
        try:
            self._generator.asend(None).send(None)
        except StopIteration:  # the generator has reached its yield
            pass

    async def _wait(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            # asyncio warns of every generator that begins now, such as an asynccontextmanager; ours end in time.
            hooks = sys.get_asyncgen_hooks()
            sys.set_asyncgen_hooks(firstiter=None)
            try:
                await self._close_all()
            finally:
                sys.set_asyncgen_hooks(firstiter=hooks.firstiter)
                _Ending.all.pop(self._loop, None)

    async def _close_all(self) -> None:
        deadline = self._loop.time() + CLOSE_TIMEOUT
        late: set[asyncio.Task[None]] = set()
        while self.open and not late:  # closing one object may add another
            closing = [asyncio.ensure_future(_close(what)) for what in self.open.values()]
            self.open.clear()
            _, late = await asyncio.wait(closing, timeout=max(0.0, deadline - self._loop.time()))
        for task in late:
            task.cancel()
        if late:
            log.warning(
                "%d connections were not closed within %g s as their event loop ended.", len(late), CLOSE_TIMEOUT
            )
            await asyncio.wait(late, timeout=1.0)


async def _close(what: Closable) -> None:
    try:
        await what.close()
    except Exception as error:
        log.warning("%r: closing it at the end of its event loop failed: %s", what, error)


def unlisted(task: asyncio.Task[T]) -> asyncio.Task[T]:
    """Hide a task from asyncio, so that it is not cancelled when its event loop ends; `at_end` waits for it."""
    asyncio.tasks._unregister_task(task)
    return task


def at_end(what: Closable) -> None:
    """Close an object when the running event loop ends, unless `forget` is called before. Safe to repeat."""
    loop = asyncio.get_running_loop()
    ending = _Ending.all.get(loop)
    if ending is None:
        for other in [other for other in list(_Ending.all) if other.is_closed()]:
            _Ending.all.pop(other, None)
        ending = _Ending.all[loop] = _Ending(loop)
    ending.open[id(what)] = what


def forget(what: Closable) -> None:
    """Do not close an object at the end of the running event loop: it is closed already, or has nothing open."""
    ending = _Ending.all.get(asyncio.get_running_loop())
    if ending is not None:
        ending.open.pop(id(what), None)
