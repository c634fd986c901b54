"""One connection to RabbitMQ: made by aio-pika, given up as a whole, never mended in place."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

import aio_pika
from aiormq.abc import AbstractChannel
from aiormq.connection import TransportFactory
from yarl import URL

from streamtools.cancelling import asked_to_stop
from streamtools.drivers.rabbitmq.channel import FrameReader, HotChannel
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, connect_error, lost
from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost
from streamtools.settings import RabbitMQSettings

T = TypeVar("T")

#: Seconds for a goodbye to the broker; after it the socket is closed without one.
CLOSE_TIMEOUT: Final = 2.0
#: Seconds for the answer to one request, unless the broker has blocked the connection.
CALL_TIMEOUT: Final = 30.0
#: A broker that names no limit (frame_max 0) takes frames of any size; this is what RabbitMQ proposes.
FRAME_MAX: Final = 131_072


class _OneLine(logging.Filter):
    """The library tells a connection that has ended with a traceback; the reason stands in our own line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave the traceback out."""
        record.exc_info = None
        return True


logging.getLogger("aiormq.connection").addFilter(_OneLine())


class _Ready(TransportFactory):
    """Hands the library a transport that is open already."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._pair = reader, writer

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._pair


class _Connection(aio_pika.Connection):
    """aio-pika's connection over a transport of ours."""

    def __init__(self, url: URL, transport: TransportFactory, properties: dict[str, Any]) -> None:
        super().__init__(url, client_properties=properties)
        self.kwargs["transport_factory"] = transport


class Link:
    """An open connection. Once `lost` is set it is of no use any more.

    Attributes:
        lost: why it has ended; None while it is up.
        another: makes a second connection of the same kind.
        gone: a future that is done once it has ended.
        frame_max: the largest frame that the broker takes, in bytes.
    """

    def __init__(self, where: str, heartbeat: int, another: Callable[[], Awaitable[Link]]) -> None:
        self.where = where
        self.another: Callable[[], Awaitable[Link]] = another
        self.lost: ConnectionLost | None = None
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self._heartbeat = heartbeat
        self._hot: list[HotChannel] = []
        self._watch: asyncio.TimerHandle | None = None
        self._closing = False
        reader = asyncio.StreamReader(loop=self._loop)
        self._frames = FrameReader(reader, self.lose, self._loop)
        self._reader = reader
        self._connection: _Connection | None = None
        self._declaring: aio_pika.abc.AbstractChannel | None = None
        self._declaring_lock = asyncio.Lock()
        #: Tasks that end by themselves, referenced until then.
        self._kept: set[asyncio.Task[Any]] = set()
        self.frame_max: int = FRAME_MAX

    async def connect(
        self, settings: RabbitMQSettings, host: str, port: int, context: ssl.SSLContext | None, name: str
    ) -> None:
        """Connect, or raise what the client library raises; nothing is left open then."""
        transport, _ = await self._loop.create_connection(lambda: self._frames, host, port, ssl=context)
        self._transport = transport
        self._writer = asyncio.StreamWriter(transport, self._frames, self._reader, self._loop)
        connection = _Connection(
            _url(settings, host, port), _Ready(self._reader, self._writer), {"connection_name": name, **_ABOUT}
        )
        try:
            await connection.connect()
        except BaseException:
            transport.abort()
            # There is nothing to close, but without this its finalizer starts a task, in any thread.
            await connection.close()
            raise
        self._connection = connection
        tune = connection.transport.connection.connection_tune if connection.transport else None
        self.frame_max = getattr(tune, "frame_max", 0) or FRAME_MAX
        if self._heartbeat:
            self._watch = self._loop.call_later(self._heartbeat / 2, self._check_life)

    @property
    def blocked(self) -> str:
        """Why the broker takes no messages over this connection now; empty while it does."""
        return self._frames.blocked

    @property
    def said(self) -> str:
        """The broker's words when it closed the connection; empty if it did not."""
        return self._frames.said

    # --- requests -----------------------------------------------------------------------------------

    async def call(self, request: Awaitable[T], what: str = "a request") -> T:
        """Await a request of the client library, but no longer than the connection lives.

        Parameters:
            what: names it, if it has no answer.

        Raises:
            ConnectionLost: the connection has ended.
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
                    self.lose(f"{what} had no answer for {CALL_TIMEOUT:g} s")
                    self._transport.abort()
        except BaseException:
            task.cancel()
            raise
        if self.lost is not None or task.cancelled():
            task.cancel()
            raise self.loss()
        return task.result()

    async def channel(self, *, confirms: bool) -> AbstractChannel:
        """Open a channel for the hot path."""
        channel = await self._open_channel(confirms)
        return await channel.get_underlay_channel()

    @asynccontextmanager
    async def declaring(self) -> AsyncIterator[AbstractChannel]:
        """The channel for declarations, one user at a time; a fresh one when the last ended in an error.

        Raises:
            ConnectionLost: the connection has ended.
        """
        async with self._declaring_lock:
            if self._declaring is None or self._declaring.is_closed:
                self._declaring = await self._open_channel(confirms=False)
            channel = await self._declaring.get_underlay_channel()
            try:
                yield channel
            except BaseException:
                self._declaring = None
                if not channel.is_closed:
                    self._keep(channel.close())
                raise

    async def _open_channel(self, confirms: bool) -> aio_pika.abc.AbstractChannel:
        if self.lost is not None or self._connection is None:
            raise self.loss()
        channel = self._connection.channel(publisher_confirms=confirms)
        try:
            await self.call(channel.initialize())
        except CLIENT_ERRORS as error:
            if isinstance(error, ConnectError):
                raise
            raise channel_error(error, self.where) from error
        return channel

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        task.add_done_callback(_retrieve)
        return task

    # --- the hot path -------------------------------------------------------------------------------

    def attach(self, channel: HotChannel) -> None:
        """Read this channel's frames here, and tell it when the connection ends."""
        self._hot.append(channel)
        self._frames.attach(channel)
        if self.lost is not None:
            channel.fail(str(self.lost))

    def discard(self, channel: HotChannel, library: AbstractChannel) -> None:
        """Close a channel that nobody uses any more."""
        self._hot.remove(channel)
        self._keep(self._discard(channel, library))

    async def _discard(self, channel: HotChannel, library: AbstractChannel) -> None:
        # Attached until it is closed: a late confirm is no business of the library's.
        await library.close()
        self._frames.detach(channel)

    def write(self, data: bytes) -> None:
        """Send whole frames."""
        self._transport.write(data)

    def rest(self, seconds: float) -> None:
        """Read nothing for so long: what arrives gathers in the socket, and is read at once."""
        if self._transport.is_closing():
            return
        self._transport.pause_reading()
        self._loop.call_later(seconds, self._read_on)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

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
        for channel in self._hot:
            channel.fail(why)

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
        connection = self._connection
        if connection is None:
            return
        # In a task of its own: the library does not always give in to a cancellation while it closes.
        goodbye = self._keep(connection.close())
        try:
            if self.lost is None:
                await asyncio.wait({goodbye}, timeout=CLOSE_TIMEOUT)
        finally:
            self.lose("it was closed by us")
            self._transport.abort()
        await asyncio.wait({goodbye}, timeout=CLOSE_TIMEOUT)
        goodbye.cancel()  # does nothing to one that is done
        with suppress(OSError, TimeoutError):  # how the socket ended is no matter any more
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._writer.wait_closed()


async def open_link(settings: RabbitMQSettings, name: str) -> Link:
    """Connect to the first host that answers.

    Parameters:
        name: shown by the broker as the connection's name.

    Raises:
        ConnectError: none answers, or one refuses us for good (permanent=True).
        ConfigurationError: a certificate file cannot be read.
    """
    context = await asyncio.to_thread(_context, settings) if settings.tls else None
    failures: list[ConnectError] = []
    for host, port in settings.addresses:
        link = Link(f"{host}:{port}", settings.heartbeat, partial(open_link, settings, name))
        try:
            async with asyncio.timeout(settings.connect_timeout):
                await link.connect(settings, host, port, context, name)
        except asyncio.CancelledError as error:
            if asked_to_stop():  # the library cancels its callers when a connection ends
                raise
            failure = connect_error(ConnectionError("the connection ended at once"), settings, link.where, link.said)
            failure.__cause__ = error
        except CLIENT_ERRORS as error:
            failure = connect_error(error, settings, link.where, link.said)
            failure.__cause__ = error
        else:
            return link
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


def _context(settings: RabbitMQSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.cafile)
        if settings.certfile:
            context.load_cert_chain(settings.certfile, settings.keyfile)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(f for f in (settings.cafile, settings.certfile, settings.keyfile) if f)
        raise ConfigurationError(
            f"The TLS files cannot be used ({files}): {error}. cafile=, certfile= and keyfile= name files in PEM."
        ) from error
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _retrieve(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


_ABOUT: Final = {"product": "streamtools"}
