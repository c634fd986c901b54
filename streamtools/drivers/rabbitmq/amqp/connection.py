"""One connection to RabbitMQ. If anything is wrong with it, the whole connection is given up, never repaired."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, Final, TypeVar

from aiormq.abc import AbstractChannel
from aiormq.exceptions import AMQPError

from streamtools.drivers.rabbitmq.amqp.channel_pool import ChannelPool
from streamtools.drivers.rabbitmq.amqp.client import Client, connection_url, retrieve
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.amqp.frame_reader import FrameReader
from streamtools.drivers.rabbitmq.amqp.frames import FRAME_MAX, GOODBYE
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, channel_lost, connect_error, lost
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.engine.tls import client_context, warn_unverified
from streamtools.errors import ConnectError, ConnectionLost, StreamToolsError
from streamtools.settings import RabbitMQSettings

T = TypeVar("T")

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds to wait for the broker's answer to our goodbye, before the socket is closed without it.
CLOSE_TIMEOUT: Final = 2.0
#: Seconds to wait for the answer to one request, not counting the time in which the broker blocks the connection.
CALL_TIMEOUT: Final = 30.0


class Connection:
    """An open connection that many users share: an error on one channel does not affect the others.

    A connection that is lost is never used again.

    Attributes:
        where: host and port.
        another: opens a second connection to the same address.
        lost: why the connection has ended; None while it is open.
        gone: a future that is done when the connection has ended.
        client: the client library's part of the connection.
        channels: opens channels.
        locks: the locks of the users of this connection, by name.
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
        self._frames = FrameReader(asyncio.StreamReader(loop=self._loop), self.lose, self._loop)
        self.client: Client = Client()
        self.channels: ChannelPool = ChannelPool(self, self.client, self._frames)
        self.locks: dict[str, asyncio.Lock] = {}

    async def connect(
        self, settings: RabbitMQSettings, host: str, port: int, context: ssl.SSLContext | None, name: str
    ) -> None:
        """Connect. If that fails, raise the client library's error and leave nothing open."""
        reader = self._frames.reader
        self._transport, _ = await self._loop.create_connection(lambda: self._frames, host, port, ssl=context)
        self._writer = asyncio.StreamWriter(self._transport, self._frames, reader, self._loop)
        await self.client.connect(connection_url(settings, host, port), reader, self._writer, name)
        self._frames.agree(self.client.frame_max or inf)
        self.channels.limit(self.client.channel_max)
        if self._heartbeat:
            self._watch = self._loop.call_later(self._heartbeat / 2, self._check_life)

    @property
    def frame_max(self) -> int:
        """The largest frame that is sent, in bytes."""
        return self.client.frame_max or FRAME_MAX

    @property
    def blocked(self) -> str:
        """Why the broker accepts no messages over this connection now; empty while it accepts them."""
        return self._frames.blocked

    @property
    def said(self) -> str:
        """The broker's text if the broker closed the connection; else empty."""
        return self._frames.said

    # --- requests -----------------------------------------------------------------------------------

    async def request(
        self, ask: Callable[[AbstractChannel], Awaitable[T]], *, expects: tuple[type[AMQPError], ...] = ()
    ) -> T:
        """Make one request on a channel for declarations; if the broker refuses, it closes only that channel.

        Parameters:
            ask: makes the request.
            expects: errors of the client library that are raised unchanged.

        Raises:
            StreamToolsError: the broker refused for another reason, or the connection has ended.
        """
        try:
            async with self.channels.declaring() as channel:
                return await self.call(ask(channel))
        except StreamToolsError:
            raise
        except expects:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self.where) from error

    async def call(self, request: Awaitable[T], what: str = "a request", *, opens: bool = False) -> T:
        """Await a request of the client library on one channel, until the connection ends.

        Parameters:
            what: names the request in the error for a missing answer.
            opens: whether the request opens a channel. If such a request gets no answer, the connection is given up;
                if another one gets none, only its channel is.

        Raises:
            ConnectionLost: the connection has ended, or the broker did not answer.
            aiormq.AMQPError: the broker refused the request.
        """
        task = asyncio.ensure_future(request)
        task.add_done_callback(retrieve)
        ends: set[asyncio.Future[Any]] = {task, self.gone}
        try:
            done: set[asyncio.Future[Any]] = set()
            while not done:
                done, _ = await asyncio.wait(ends, timeout=CALL_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
                if not done and not self.blocked:
                    self._no_answer(f"{what} got no answer for {CALL_TIMEOUT:g} s", opens=opens)
        except BaseException:
            task.cancel()
            raise
        if self.lost is not None or task.cancelled():
            task.cancel()
            raise self.loss()
        return task.result()

    def _no_answer(self, why: str, *, opens: bool) -> None:
        # The heartbeat shows that the connection works, so the channel or its queue is the cause.
        if self._heartbeat and self.lost is None and not opens:
            raise channel_lost(self.where, why)
        self.give_up(why)

    # --- channels -----------------------------------------------------------------------------------

    def attach(self, channel: FastChannel) -> None:
        """Deliver the frames of a channel to it, and tell it if the connection ends."""
        self._frames.attach(channel)
        if self.lost is not None:
            channel.fail("it was cut", connection=True)

    def discard(self, channel: FastChannel, library: AbstractChannel) -> asyncio.Task[None]:
        """Close a channel that nobody uses any more, in a task that goes on if its caller is cancelled."""
        return self.client.run(self._discard(channel, library))

    async def _discard(self, channel: FastChannel, library: AbstractChannel) -> None:
        # The channel stays attached until it is closed, so that no late confirm reaches the library.
        try:
            if not channel.closed:  # if the broker closed it, the library may not know yet, and would close it again
                await library.close()
        finally:
            self._frames.detach(channel)

    def write(self, data: bytes) -> None:
        """Send complete frames."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the socket accepts more data.

        Raises:
            ConnectionLost: the connection has ended.
        """
        try:
            await self._writer.drain()
        except OSError as error:
            raise self.loss() from error

    # --- the end ------------------------------------------------------------------------------------

    def loss(self) -> ConnectionLost:
        """Return a new error that says why the connection has ended."""
        return ConnectionLost(str(self.lost)) if self.lost is not None else lost(self.where, "it was cut")

    def check(self) -> None:
        """Raise ConnectionLost if the connection has ended."""
        if self.lost is not None:
            raise self.loss()

    def lose(self, why: str) -> None:
        """Note that the connection has ended; the first reason counts."""
        if self.lost is not None:
            return
        self.lost = lost(self.where, "it was closed by us" if self._closing else why)
        self.client.has_ended = True
        if not self.gone.done():
            self.gone.set_result(None)
        for channel in self._frames.attached():
            channel.fail(why, connection=True)

    def give_up(self, why: str) -> None:
        """Abort the connection, because the broker does not answer."""
        self.lose(why)
        self._transport.abort()

    def _check_life(self) -> None:
        silence = self._loop.time() - self._frames.heard
        # If nothing comes for two heartbeat intervals, the peer is dead (specification 0-9-1, section 4.2.7).
        if silence > 2 * self._heartbeat:
            self.give_up(f"nothing was received for {silence:.0f} s (heartbeat={self._heartbeat})")
        elif self.lost is None:
            self._watch = self._loop.call_later(self._heartbeat / 2, self._check_life)

    async def close(self) -> None:
        """Say goodbye to the broker, and close the connection; each takes CLOSE_TIMEOUT at most. Safe to repeat."""
        if self._closing:
            return
        self._closing = self.client.has_ended = True
        if self._watch is not None:
            self._watch.cancel()
        try:
            if self.lost is None:  # we do it ourselves: the library's tasks for it may have been cancelled
                await self._say_goodbye()
        finally:
            self.give_up("it was closed by us")
        await self.client.close(CLOSE_TIMEOUT)
        with suppress(OSError, TimeoutError):  # errors of the socket do not matter any more
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        await self.client.end_tasks()

    async def _say_goodbye(self) -> None:
        self._transport.write(GOODBYE)
        await asyncio.wait({self.gone}, timeout=CLOSE_TIMEOUT)
        if not self.gone.done():
            log.warning(
                "RabbitMQ at %s did not answer our goodbye within %g s; the connection is closed without an answer. "
                "The messages that were acknowledged last may be delivered again.",
                self.where, CLOSE_TIMEOUT,
            )  # fmt: skip


async def open_connection(settings: RabbitMQSettings, name: str) -> Connection:
    """Connect to the first host that answers.

    Parameters:
        name: shown by the broker as the connection's name.

    Raises:
        ConnectError: no host answers, or one refuses the connection permanently (permanent=True).
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
            if asked_to_stop():  # if not, the library has cancelled us because the connection ended
                raise
            failure = _failure(ConnectionError("the connection ended at once"), settings, connection)
            failure.__cause__ = error
        except CLIENT_ERRORS as error:
            failure = _failure(error, settings, connection)
            failure.__cause__ = error
        else:
            return connection
        if failure.permanent:
            raise failure
        failures.append(failure)
    if len(failures) == 1:
        raise failures[0]
    raise ConnectError(" ".join(str(failure) for failure in failures)) from failures[-1]


def _failure(error: BaseException, settings: RabbitMQSettings, connection: Connection) -> ConnectError:
    return connect_error(error, settings, connection.where, connection.said)
