"""One connection to RabbitMQ: made by aio-pika, given up as a whole, never mended in place."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from itertools import chain
from math import inf
from typing import Any, Final, TypeVar, cast

import aio_pika
from aiormq.abc import AbstractChannel, AbstractConnection
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPError
from yarl import URL

from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.amqp.frame_reader import FrameReader
from streamtools.drivers.rabbitmq.amqp.frames import FRAME_MAX, GOODBYE
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, channel_lost, connect_error, lost
from streamtools.engine.tasks.cancellation import asked_to_stop, end
from streamtools.engine.tasks.eventloops import unlisted
from streamtools.errors import ConnectError, ConnectionLost, StreamToolsError
from streamtools.settings import RabbitMQSettings

T = TypeVar("T")

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds for a goodbye to the broker; after it the socket is closed without one.
CLOSE_TIMEOUT: Final = 2.0
#: Seconds for the client library's tasks to end once the socket is closed.
END_TIMEOUT: Final = 0.5
#: Seconds for the answer to one request, unless the broker has blocked the connection.
CALL_TIMEOUT: Final = 30.0
#: Seconds for a channel to be opened while nothing else is answered: no queue holds that up, so it is the connection.
OPEN_TIMEOUT: Final = 15.0
#: Channels of one connection, where the broker names no limit (channel_max 0).
CHANNEL_MAX: Final = 65_535
#: Channels for declarations at once: a queue that gives no answer holds one of them up, not the others.
DECLARING_CHANNELS: Final = 16
#: Channels for declarations that are kept open.
IDLE_CHANNELS: Final = 2

#: Whose work is being done, in the library's tasks and callbacks.
_whose: Final[ContextVar[Connection | None]] = ContextVar("streamtools_rabbitmq_link", default=None)


class _OurLines(logging.Filter):
    """The library tells how a request or a connection has ended; what that means stands in our own lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out the traceback, and warnings about requests that we gave up and connections that have ended."""
        connection = _whose.get()
        if connection is None or record.levelno != logging.WARNING:
            is_said = False
        else:
            is_said = connection.has_ended or record.name == "aiormq.channel"
        if record.name == "aiormq.connection":
            record.exc_info = None
        return not is_said


for _name in ("aiormq.connection", "aiormq.channel"):
    logging.getLogger(_name).addFilter(_OurLines())


class _OpenTransport(TransportFactory):
    """Hands the library a transport that is open already."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._pair = reader, writer

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._pair


class _UnlistedTasks:
    """The event loop as the library has it: asyncio does not list the tasks that it starts there.

    At the end of an event loop asyncio cancels all tasks that it lists. The library's tasks would then close the
    socket, and what was acknowledged last would be delivered again: the broker ends a channel whose socket is closed
    before it reads the channel's last frames. So they go on until `Connection.close`, which runs later and waits for
    them.

    Attributes:
        tasks: those that have not ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Connection) -> None:
        self._loop = loop
        self._connection = connection
        self.tasks: set[asyncio.Task[Any]] = set()

    def create_task(self, work: Coroutine[Any, Any, T], **options: Any) -> asyncio.Task[T]:
        """As the loop's own."""
        context = copy_context()
        context.run(_whose.set, self._connection)
        task = unlisted(self._loop.create_task(work, **{"context": context, **options}))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class _LibraryConnection(aio_pika.Connection):
    """aio-pika's connection over a transport of ours, with tasks that the end of the event loop does not cancel."""

    def __init__(
        self, url: URL, transport: TransportFactory, loop: _UnlistedTasks, properties: dict[str, Any]
    ) -> None:
        super().__init__(url, client_properties=properties)
        self.kwargs |= {"transport_factory": transport, "loop": loop}


class Connection:
    """An open connection, which many share: what happens to one channel is no matter to the others.

    Once `lost` is set it is of no use any more.

    Attributes:
        lost: why it has ended; None while it is up.
        another: makes a second connection of the same kind.
        gone: a future that is done once it has ended.
        frame_max: the largest frame that the broker takes, in bytes.
        channel_max: the most channels that it may have.
    """

    def __init__(self, where: str, heartbeat: int, another: Callable[[], Awaitable[Connection]]) -> None:
        self.where = where
        self.another: Callable[[], Awaitable[Connection]] = another
        self.lost: ConnectionLost | None = None
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self._heartbeat = heartbeat
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        reader = asyncio.StreamReader(loop=self._loop)
        self._frames = FrameReader(reader, self.lose, self._loop)
        self._reader = reader
        self._client: _LibraryConnection | None = None
        self._library: AbstractConnection | None = None
        #: The channel that was opened last.
        self._number = 0
        #: Numbers of channels that are being opened.
        self._opening: set[int] = set()
        self._users = 0
        #: Locks of those who share the connection, by name.
        self.locks: dict[str, asyncio.Lock] = {}
        self._idle: list[AbstractChannel] = []
        #: The library's tasks, and those of ours that close something.
        self._work = _UnlistedTasks(self._loop, self)
        self.frame_max: int = FRAME_MAX
        self.channel_max: int = CHANNEL_MAX

    async def connect(
        self, settings: RabbitMQSettings, host: str, port: int, context: ssl.SSLContext | None, name: str
    ) -> None:
        """Connect, or raise what the client library raises; nothing is left open then."""
        transport, _ = await self._loop.create_connection(lambda: self._frames, host, port, ssl=context)
        self._transport = transport
        self._writer = asyncio.StreamWriter(transport, self._frames, self._reader, self._loop)
        connection = _LibraryConnection(
            _url(settings, host, port),
            _OpenTransport(self._reader, self._writer),
            self._work,
            {"connection_name": name, **_ABOUT},
        )
        try:
            await connection.connect()
        except BaseException:
            transport.abort()
            # There is nothing to close, but without this its finalizer starts a task, in any thread.
            await connection.close()
            raise
        self._client = connection
        assert connection.transport is not None  # it is connected
        self._library = connection.transport.connection
        tune = self._library.connection_tune
        self.frame_max = getattr(tune, "frame_max", 0) or FRAME_MAX
        self.channel_max = getattr(tune, "channel_max", 0) or CHANNEL_MAX
        self._frames.agree(getattr(tune, "frame_max", 0) or inf)
        self._declaring = asyncio.Semaphore(max(1, min(DECLARING_CHANNELS, self.channel_max // 8)))
        if self._heartbeat:
            self._watch = self._loop.call_later(self._heartbeat / 2, self._check_life)

    @property
    def blocked(self) -> str:
        """Why the broker takes no messages over this connection now; empty while it does."""
        return self._frames.blocked

    @property
    def server_version(self) -> str:
        """The broker's version; empty if it does not tell."""
        properties = {} if self._library is None else self._library.server_properties
        return str(properties.get("version", ""))

    @property
    def said(self) -> str:
        """The broker's words when it closed the connection; empty if it did not."""
        return self._frames.said

    # --- requests -----------------------------------------------------------------------------------

    async def call(self, request: Awaitable[T], what: str = "a request", *, opens: bool = False) -> T:
        """Await a request of the client library on one channel, but no longer than the connection lives.

        Parameters:
            what: names it, if it has no answer.
            opens: it opens a channel. Without an answer the connection is of no use any more, else the channel is.

        Raises:
            ConnectionLost: the connection has ended, or there was no answer.
            aiormq.AMQPError: what the broker answered.
        """
        task = asyncio.ensure_future(request)
        task.add_done_callback(_retrieve)
        ends: set[asyncio.Future[Any]] = {task, self.gone}
        try:
            done: set[asyncio.Future[Any]] = set()
            while not done:
                done, _ = await asyncio.wait(ends, timeout=CALL_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
                if not done and not self.blocked:
                    self._no_answer(f"{what} had no answer for {CALL_TIMEOUT:g} s", opens=opens)
        except BaseException:
            task.cancel()
            raise
        if self.lost is not None or task.cancelled():
            task.cancel()
            raise self.loss()
        return task.result()

    def _no_answer(self, why: str, *, opens: bool) -> None:
        # The connection itself is watched: it is the channel, or its queue.
        if self._heartbeat and self.lost is None and not opens:
            raise channel_lost(self.where, why)
        self.lose(why)
        self._transport.abort()

    async def channel(self, *, confirms: bool) -> AbstractChannel:
        """Open a channel.

        Raises:
            ConnectError: the connection has ended, or has all the channels that the broker lets it have.
        """
        if self.lost is not None or self._library is None:
            raise self.loss()
        number = self._free_number()
        self._opening.add(number)
        self._frames.opened.add(number)
        # In a task of its own: a caller that waits less than OPEN_TIMEOUT would never learn that no answer comes.
        opening = self._keep(self._open(self._library, number, confirms))
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            opening.add_done_callback(self._drop_opened)
            raise
        if opening.cancelled():
            raise self.loss()
        return cast("AbstractChannel", opening.result())

    async def _open(self, library: AbstractConnection, number: int, confirms: bool) -> AbstractChannel:
        watch = self._loop.call_later(OPEN_TIMEOUT, self._check_opening, self._loop.time())
        try:
            request = library.channel(number, publisher_confirms=confirms)
            return await self.call(request, "opening a channel", opens=True)
        except ConnectError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self.where) from error
        finally:
            watch.cancel()
            self._opening.discard(number)

    def _check_opening(self, asked: float) -> None:
        # A broker that answers others may have much to read before it comes to this; then CALL_TIMEOUT counts.
        if not self.blocked and self._frames.answered <= asked:
            self._no_answer(
                f"opening a channel had no answer for {OPEN_TIMEOUT:g} s, nor had anything else", opens=True
            )

    def _drop_opened(self, opening: asyncio.Task[AbstractChannel]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._drop(opening.result())

    def _free_number(self) -> int:
        # The library would count on past the broker's limit, which ends the connection.
        assert self._library is not None
        taken = self._library.channels.keys() | self._opening
        # One that was just given up comes last: the goodbye to it may not have left yet.
        for number in chain(range(self._number + 1, self.channel_max + 1), range(1, self._number + 1)):
            if number not in taken:
                self._number = number
                return number
        raise ConnectError(
            f"RabbitMQ at {self.where} lets a connection have {self.channel_max} channels (channel_max), and all of "
            "them are in use. Raise it in rabbitmq.conf, or use fewer consumers and producers in one process."
        )

    def join(self) -> bool:
        """Count one more consumer or producer that has a channel here; False when there is no room for it."""
        # What is left is for declarations, and for channels that replace others.
        if self._users >= max(1, self.channel_max * 3 // 4):
            return False
        self._users += 1
        return True

    def leave(self) -> None:
        """Count one less."""
        self._users -= 1

    async def request(
        self, ask: Callable[[AbstractChannel], Awaitable[T]], *, expects: tuple[type[AMQPError], ...] = ()
    ) -> T:
        """Make one request on a channel for declarations; a refusal ends that channel, and no other.

        Parameters:
            ask: begins the request.
            expects: refusals that are raised as the client library's errors.

        Raises:
            StreamToolsError: what any other refusal means, or the connection has ended.
        """
        try:
            async with self.declaring() as channel:
                return await self.call(ask(channel))
        except StreamToolsError:
            raise
        except expects:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self.where) from error

    @asynccontextmanager
    async def declaring(self) -> AsyncIterator[AbstractChannel]:
        """A channel for declarations, for one user at a time; one whose request has failed is not used again.

        Raises:
            ConnectionLost: the connection has ended.
        """
        if self.lost is not None:
            raise self.loss()
        async with self._declaring:
            channel = self._idle.pop() if self._idle else None
            if channel is None or channel.is_closed:
                channel = await self.channel(confirms=False)
            try:
                yield channel
            except BaseException:
                self._drop(channel)
                raise
            if len(self._idle) < IDLE_CHANNELS and not channel.is_closed:
                self._idle.append(channel)
            else:
                self._drop(channel)

    def _drop(self, channel: AbstractChannel) -> None:
        if not channel.is_closed:
            self._keep(channel.close())

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self._work.create_task(work)
        task.add_done_callback(_retrieve)
        return task

    # --- the hot path -------------------------------------------------------------------------------

    def attach(self, channel: FastChannel) -> None:
        """Read this channel's frames here, and tell it when the connection ends."""
        self._frames.attach(channel)
        if self.lost is not None:
            channel.fail("it was cut", connection=True)

    def discard(self, channel: FastChannel, library: AbstractChannel) -> asyncio.Task[None]:
        """Close a channel that nobody uses any more, in a task that goes on whoever waits for it."""
        return self._keep(self._discard(channel, library))

    async def _discard(self, channel: FastChannel, library: AbstractChannel) -> None:
        # Attached until it is closed: a late confirm is no business of the library's.
        try:
            if not channel.closed:  # else the library, which may not have seen it yet, says so a second time
                await library.close()
        finally:
            self._frames.detach(channel)

    def write(self, data: bytes) -> None:
        """Send whole frames."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait while the socket takes no more.

        Raises:
            ConnectionLost: the connection has ended.
        """
        try:
            await self._writer.drain()
        except OSError as error:
            raise self.loss() from error

    # --- the end ------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """It is lost, or being closed."""
        return self.lost is not None or self._closing

    def loss(self) -> ConnectionLost:
        """A new error saying why the connection has ended."""
        return ConnectionLost(str(self.lost)) if self.lost is not None else lost(self.where, "it was cut")

    def lose(self, why: str) -> None:
        """Note that the connection has ended; the first reason stands."""
        if self.lost is not None:
            return
        self.lost = lost(self.where, "it was closed by us" if self._closing else why)
        if not self.gone.done():
            self.gone.set_result(None)
        for channel in self._frames.attached():
            channel.fail(why, connection=True)

    def _check_life(self) -> None:
        silence = self._loop.time() - self._frames.heard
        # Specification 0-9-1, section 4.2.7: two heartbeats without anything, and the peer is gone.
        if silence > 2 * self._heartbeat:
            self.lose(f"nothing was heard for {silence:.0f} s (heartbeat={self._heartbeat})")
            self._transport.abort()
        elif self.lost is None:
            self._watch = self._loop.call_later(self._heartbeat / 2, self._check_life)

    async def close(self) -> None:
        """Say goodbye if the broker listens, and close; never longer than CLOSE_TIMEOUT. Safe to repeat."""
        if self._closing:
            return
        self._closing = True
        if self._watch is not None:
            self._watch.cancel()
        connection = self._client
        if connection is None:
            return
        try:
            if self.lost is None:  # not by the library: some of its tasks are listed, and may have been cancelled
                self._transport.write(GOODBYE)
                await asyncio.wait({self.gone}, timeout=CLOSE_TIMEOUT)
                if not self.gone.done():
                    log.warning(
                        "RabbitMQ at %s gave no answer to our goodbye within %g s; the connection is closed without. "
                        "What was acknowledged last may be delivered again.",
                        self.where, CLOSE_TIMEOUT,
                    )  # fmt: skip
        finally:
            self.lose("it was closed by us")
            self._transport.abort()
        # In a task of its own: the library does not always give in to a cancellation while it closes.
        goodbye = self._keep(connection.close())
        await asyncio.wait({goodbye}, timeout=CLOSE_TIMEOUT)
        goodbye.cancel()  # does nothing to one that is done
        with suppress(OSError, TimeoutError):  # how the socket ended is no matter any more
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        if tasks := set(self._work.tasks):  # they have no socket any more, and nobody else waits for them
            await asyncio.wait(tasks, timeout=END_TIMEOUT)
            await end(tasks, END_TIMEOUT)


async def open_connection(settings: RabbitMQSettings, name: str) -> Connection:
    """Connect to the first host that answers.

    Parameters:
        name: shown by the broker as the connection's name.

    Raises:
        ConnectError: none answers, or one refuses us for good (permanent=True).
        ConfigurationError: a certificate file cannot be read.
    """
    context = await client_context(settings) if settings.tls else None
    if settings.tls:
        warn_unverified(settings, *settings.addresses)
    failures: list[ConnectError] = []
    for host, port in settings.addresses:
        connection = Connection(f"{host}:{port}", settings.heartbeat, partial(open_connection, settings, name))
        try:
            async with asyncio.timeout(settings.connect_timeout):
                await connection.connect(settings, host, port, context, name)
        except asyncio.CancelledError as error:
            if asked_to_stop():  # the library cancels its callers when a connection ends
                raise
            failure = connect_error(
                ConnectionError("the connection ended at once"), settings, connection.where, connection.said
            )
            failure.__cause__ = error
        except CLIENT_ERRORS as error:
            failure = connect_error(error, settings, connection.where, connection.said)
            failure.__cause__ = error
        else:
            return connection
        if failure.permanent:
            raise failure
        failures.append(failure)
    if len(failures) == 1:
        raise failures[0]
    raise ConnectError(" ".join(str(failure) for failure in failures)) from failures[-1]


def _url(settings: RabbitMQSettings, host: str, port: int) -> URL:
    return URL.build(
        scheme="amqps" if settings.tls else "amqp",
        user=settings.username,
        password=settings.password.get_secret_value(),
        host=host,
        port=port,
        path="/" + settings.vhost,
        query={"heartbeat": str(settings.heartbeat)},
    )


def _retrieve(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


_ABOUT: Final = {"product": "streamtools"}
