"""Endpoint: the base of producers and consumers: a queue, its address and the connection to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from streamtools.driver import EndpointHooks, Options
from streamtools.engine.backoff import backoff_within
from streamtools.engine.options import parameters, read_options
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.engine.tasks.eventloops import LoopBound, at_end, forget
from streamtools.errors import Closed, ConnectError
from streamtools.protocols import QUEUE_OPTIONS
from streamtools.validation.checks import Declare, check_declare, check_place, check_texts

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Private names of the base classes, beside the hooks, that drivers may define.
MAY_DEFINE: Final = {"_abandon", "_deliver"}


def _names(cls: type) -> set[str]:
    """The private names that a class defines or declares."""
    names = {*vars(cls), *vars(cls).get("__annotations__", {})}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


class Wrapper(Protocol):
    """Wraps a driver to write and read the headers of another system; it has the hooks of that driver."""

    @property
    def style(self) -> object:
        """The style of the headers; equal for producers and consumers whose messages have the same headers."""
        ...


class Endpoint(LoopBound, EndpointHooks):
    """The base of Producer and Consumer."""

    #: The wrapper of the driver; None if messages have our own headers.
    wrapper: Wrapper | None = None
    _ignored: set[str]
    _connected: bool
    _closed: bool
    #: The number of connections made so far.
    _opened: int
    _opening: asyncio.Lock

    @classmethod
    def _check_names(cls, base: type) -> None:
        """Check that a driver's class defines none of the private names of its base class, but hooks.

        Raises:
            TypeError: the class defines such a name.
        """
        ours = {name for each in base.__mro__ if each.__module__ != EndpointHooks.__module__ for name in _names(each)}
        for each in cls.__mro__[: cls.__mro__.index(base)]:
            if taken := sorted(ours & _names(each) - MAY_DEFINE):
                raise TypeError(
                    f"{each.__name__} defines {', '.join(taken)}, which {base.__name__} has for itself: give it "
                    "another name."
                )

    def _set_up(
        self,
        queue: str,
        url: str | ProtocolSettings | None,
        declare: Declare,
        client_id: str | None,
        host: str | None,
        port: int | None,
    ) -> None:
        self.queue: str = queue
        self.declare: Declare = declare
        self.client_id: str | None = client_id
        self.host: str | None = host
        self.port: int | None = port
        self.validate_queue(queue)
        check_declare(declare)
        check_texts({"client_id": client_id})
        check_place(host, port)
        self.settings: ProtocolSettings = self.settings_class.resolve(url)
        self._ignored = set()
        self._connected = False
        self._closed = False
        self._opened = 0
        self._opening = asyncio.Lock()

    # --- for users ------------------------------------------------------------------------------

    async def a_init(self) -> Self:
        """The same as `open()`."""
        return await self.open()

    async def close(self) -> None:
        """Close the connection. Safe to repeat; operations that are not finished raise.

        An object that is used in several event loops has a connection in each of them. This closes the one of the
        running loop. When a loop ends, its connection is closed, too.
        """
        here = self._here()
        here._closed = True
        here._connected = False
        forget(here)
        await here._close_driver()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.queue!r} at {self.settings.safe_url}>"

    @property
    def place(self) -> object:
        """The protocol, the address and the style of headers: endpoints of one place can send for each other."""
        return self.protocol, self.settings, self.wrapper.style if self.wrapper is not None else None

    # --- connecting -----------------------------------------------------------------------------

    def _reopen(self) -> Self:
        """Return the object that the running loop uses, and mark it as not closed."""
        here = self._here()
        here._closed = False
        return here

    async def _keep_connecting(self, deadline: float, failures: list[ConnectError]) -> None:
        """Try to connect until that succeeds, until an error is permanent, or until the deadline (monotonic clock).

        Parameters:
            failures: the errors so far; new ones are added.
        """
        while not self._connected:
            if self._closed:
                raise Closed(f"{self!r} was closed; call open() to use it again.")
            try:
                await stray_cancellation_as_lost(self._open_or_close())
            except ConnectError as error:
                failures.append(error)
                delay = backoff_within(len(failures), deadline - time.monotonic())
                if error.permanent or delay is None:
                    raise
                if [str(failure) for failure in failures[-2:-1]] == [str(error)]:
                    log.debug("%r: the same error. Trying again in %.1f s.", self, delay)
                else:
                    log.warning("%r: %s Trying again.", self, error)
                if not await self._goes_on_after(delay):
                    raise
            else:
                self._connected = True
                self._opened += 1
                at_end(self)
                if failures:
                    log.info("%r: connected.", self)

    async def _open_or_close(self) -> None:
        try:
            await self._open()
        except BaseException:
            await self._close_what_is_left()
            raise

    async def _disconnect(self, error: ConnectError) -> None:
        """Log that the connection was lost, and close what is left of it."""
        log.warning("%r: %s Reconnecting.", self, error)
        self._connected = False
        await stray_cancellation_as_lost(self._close_what_is_left())

    async def _close_what_is_left(self) -> None:
        try:
            await self._close_driver()
        except Exception as error:  # this must not hide the first error, nor prevent a new connection
            log.warning("%r: closing what is left: %s", self, error)

    async def _close_driver(self) -> None:
        """End what is still running, and close the driver."""
        await self._close()

    async def _goes_on_after(self, delay: float) -> bool:
        """Wait before the next try; return False if there must not be one."""
        await asyncio.sleep(delay)
        return True

    # --- options --------------------------------------------------------------------------------

    def _read_options(self, given: Mapping[str, Any], constructor: Callable[..., Any]) -> None:
        own = parameters(constructor)
        owner = f"{type(self).__name__} of {self.queue!r}"
        options, foreign = read_options(self.options_class, given, known=QUEUE_OPTIONS, own=own, owner=owner)
        self.options: Options = options
        self._note_ignored(foreign)

    def _note_ignored(self, names: Iterable[str]) -> None:
        if new := [name for name in names if name not in self._ignored]:
            self._ignored.update(new)
            log.info("%s ignores %s: options of another protocol.", type(self).__name__, ", ".join(new))
