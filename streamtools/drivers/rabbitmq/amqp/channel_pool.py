"""ChannelPool: opens the channels of one connection, and keeps some for declarations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import TYPE_CHECKING, Final, cast

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp.client import CHANNEL_MAX, Client
from streamtools.drivers.rabbitmq.amqp.frame_reader import FrameReader
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error
from streamtools.errors import ConnectError

if TYPE_CHECKING:  # that module imports this one
    from streamtools.drivers.rabbitmq.amqp.connection import Connection

#: If a channel is not opened within this many seconds, and nothing else is answered either, the connection is given
#: up: no queue can delay the opening of a channel.
OPEN_TIMEOUT: Final = 15.0
#: The most channels for declarations at the same time: a queue that gives no answer blocks only one of them.
DECLARING_CHANNELS: Final = 16
#: The most unused channels for declarations that stay open.
IDLE_CHANNELS: Final = 2


class ChannelPool:
    """Opens channels, and counts the consumers and producers that have one.

    Attributes:
        channel_max: the most channels that the connection may have.
    """

    def __init__(self, connection: Connection, client: Client, frames: FrameReader) -> None:
        self._connection = connection
        self._client = client
        self._frames = frames
        self.channel_max: int = CHANNEL_MAX
        #: The number of the channel that was opened last, and numbers of those that are being opened.
        self._last = 0
        self._opening: set[int] = set()
        self._users = 0
        self._idle: list[AbstractChannel] = []
        self._declaring = asyncio.Semaphore(DECLARING_CHANNELS)

    def limit(self, channel_max: int) -> None:
        """Set the number of channels that the broker allows."""
        self.channel_max = channel_max
        self._declaring = asyncio.Semaphore(max(1, min(DECLARING_CHANNELS, channel_max // 8)))

    def join(self) -> bool:
        """Count one more consumer or producer that has a channel here; return False if there is no room for it."""
        # The other channels are for declarations, and for channels that replace others.
        if self._users >= max(1, self.channel_max * 3 // 4):
            return False
        self._users += 1
        return True

    def leave(self) -> None:
        """Count one consumer or producer less."""
        self._users -= 1

    async def open(self, *, confirms: bool) -> AbstractChannel:
        """Open a channel.

        Raises:
            ConnectError: the connection has ended, or has as many channels as the broker allows.
        """
        self._connection.check()
        number = self._free_number()
        self._opening.add(number)
        self._frames.opened.add(number)
        # A separate task waits for OPEN_TIMEOUT even if the caller gives up earlier.
        opening = self._client.run(self._open(number, confirms))
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            opening.add_done_callback(self._drop_opened)
            raise
        if opening.cancelled():
            raise self._connection.loss()
        return cast("AbstractChannel", opening.result())

    async def _open(self, number: int, confirms: bool) -> AbstractChannel:
        loop = asyncio.get_running_loop()
        watch = loop.call_later(OPEN_TIMEOUT, self._check_opening, loop.time())
        try:
            request = self._client.channel(number, confirms=confirms)
            channel: AbstractChannel = await self._connection.call(request, "opening a channel", opens=True)
        except ConnectError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self._connection.where) from error
        finally:
            watch.cancel()
            self._opening.discard(number)
        return channel

    def _check_opening(self, asked: float) -> None:
        # If the broker answers other requests, it is only busy; then CALL_TIMEOUT limits the wait.
        if not self._connection.blocked and self._frames.answered <= asked:
            why = f"the broker has not answered the opening of a channel, or anything else, for {OPEN_TIMEOUT:g} s"
            self._connection.give_up(why)

    def _drop_opened(self, opening: asyncio.Task[AbstractChannel]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._drop(opening.result())

    def _drop(self, channel: AbstractChannel) -> None:
        if not channel.is_closed:
            self._client.run(channel.close())

    def _free_number(self) -> int:
        # The library itself would exceed the broker's limit, and the broker would close the connection.
        taken = {*self._client.channel_numbers, *self._opening}
        # The number of a channel that was just closed is tried last: its close frame may not have been sent yet.
        for number in chain(range(self._last + 1, self.channel_max + 1), range(1, self._last + 1)):
            if number not in taken:
                self._last = number
                return number
        raise ConnectError(
            f"RabbitMQ at {self._connection.where} allows {self.channel_max} channels in a connection (channel_max), "
            "and all are in use. Raise it in rabbitmq.conf, or use fewer consumers and producers in one process."
        )

    @asynccontextmanager
    async def declaring(self) -> AsyncIterator[AbstractChannel]:
        """Yield a channel for declarations, to one user at a time; after a failed request the channel is closed.

        Raises:
            ConnectionLost: the connection has ended.
        """
        self._connection.check()
        async with self._declaring:
            channel = self._idle.pop() if self._idle else None
            if channel is None or channel.is_closed:
                channel = await self.open(confirms=False)
            try:
                yield channel
            except BaseException:
                self._drop(channel)
                raise
            if len(self._idle) < IDLE_CHANNELS and not channel.is_closed:
                self._idle.append(channel)
            else:
                self._drop(channel)
