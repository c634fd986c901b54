"""Event loops: connections, locks and tasks belong to the loop that they were made in, and end with it.

A producer, consumer, admin or bus may stand in a module and be used in one event loop after the other, or in several
at once in threads. Each loop has connections of its own; what is still open when a loop ends is closed by `at_end`.
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

#: Seconds in which everything that is open when an event loop ends is closed.
CLOSE_TIMEOUT: Final = 5.0

#: Held while an object moves from one loop to another: several threads may use the object.
_moving = threading.RLock()
#: What a parent process had connected, kept in its forked child: collecting it there could harm the parent.
_forked: Final[list[Any]] = []


def _renew_lock() -> None:
    global _moving  # noqa: PLW0603 - it may be held by a thread that does not exist in the forked child
    _moving = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Closable(Protocol):
    """An object that is closed when its event loop ends."""

    async def close(self) -> None: ...


class PerLoop(Generic[T]):
    """One object for each event loop that asks; those of loops that have ended are forgotten.

    Parameters:
        make: makes one, in the running loop.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._process = os.getpid()
        self._found: dict[asyncio.AbstractEventLoop, T] = {}

    def here(self) -> T:
        """The object of the running loop; it is made when it is first asked for."""
        loop = asyncio.get_running_loop()
        found = self._found.get(loop)
        if found is None or self._process != os.getpid():
            with _moving:
                self._forget()
                found = self._found[loop] = self._make()
        return found

    def elsewhere(self) -> list[T]:
        """The objects of other loops that have not ended."""
        loop = asyncio.get_running_loop()
        with _moving:
            self._forget()
            return [found for other, found in self._found.items() if other is not loop]

    def everywhere(self) -> list[T]:
        """The objects of all loops that have not ended; from any thread."""
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

    When that loop has ended, it begins anew in the next one: what the constructor makes is made again, from the same
    arguments, while public attributes stay as they are. In a second loop beside the first, `_in_second_loop` decides.
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
        """This object, as the running loop is to use it."""
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
        """The object for a second loop, while the first one has not ended: a twin with connections of its own."""
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
        """Run the constructor again; nothing of the loop that has ended is awaited."""
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
        """Release what can be released without awaiting: the loop ended before this was closed."""

    def _public(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def in_its_loop(loop: asyncio.AbstractEventLoop | None, function: Callable[[], Any]) -> None:
    """Call a function in the event loop that it is for: at once in that loop, soon from another thread or loop."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if loop is None or loop.is_closed():
        function()
    elif loop is running:
        function()
        loop.call_soon_threadsafe(_wake_up)  # a signal handler may have interrupted its waiting
    else:
        loop.call_soon_threadsafe(function)


def _wake_up() -> None:
    """Do nothing: the call itself makes the event loop look at its queue."""


# --- the end of a loop ------------------------------------------------------------------------------


class _Ending:
    """What is to be closed at the end of one event loop."""

    #: By loop; each removes itself at its end.
    all: Final[dict[asyncio.AbstractEventLoop, _Ending]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.open: dict[int, Closable] = {}
        self._loop = loop
        # asyncio closes the asynchronous generators of a loop when that ends, after its tasks (see
        # loop.shutdown_asyncgens, which asyncio.run calls): it is the one moment at which the loop still works.
        self._generator = self._wait()
        try:
            self._generator.asend(None).send(None)
        except StopIteration:  # it has come to its yield
            pass

    async def _wait(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            # asyncio warns of generators that begin now, also those of asynccontextmanager; ours come to their end.
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
        while self.open and not late:  # closing one may begin to close another
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
    """A task that asyncio does not list, and so does not cancel when its event loop ends: `at_end` waits for it."""
    asyncio.tasks._unregister_task(task)
    return task


def at_end(what: Closable) -> None:
    """Have something closed when the running event loop ends, unless `forget` comes first. Safe to repeat."""
    loop = asyncio.get_running_loop()
    ending = _Ending.all.get(loop)
    if ending is None:
        for other in [other for other in list(_Ending.all) if other.is_closed()]:
            _Ending.all.pop(other, None)
        ending = _Ending.all[loop] = _Ending(loop)
    ending.open[id(what)] = what


def forget(what: Closable) -> None:
    """Leave it out at the end of the running event loop: it is closed, or has nothing open."""
    ending = _Ending.all.get(asyncio.get_running_loop())
    if ending is not None:
        ending.open.pop(id(what), None)
