"""The channels of one connection: their numbers, how they are opened, and those for declarations."""

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

if TYPE_CHECKING:  # which has one of these
    from streamtools.drivers.rabbitmq.amqp.connection import Connection

#: Seconds for a channel to be opened while nothing else is answered: no queue holds that up, so it is the connection.
OPEN_TIMEOUT: Final = 15.0
#: Channels for declarations at once: a queue that gives no answer holds one of them up, not the others.
DECLARING_CHANNELS: Final = 16
#: Channels for declarations that are kept open.
IDLE_CHANNELS: Final = 2


class ChannelPool:
    """Opens channels, and counts those who have one.

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
        """The broker allows so many."""
        self.channel_max = channel_max
        self._declaring = asyncio.Semaphore(max(1, min(DECLARING_CHANNELS, channel_max // 8)))

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

    async def open(self, *, confirms: bool) -> AbstractChannel:
        """Open a channel.

        Raises:
            ConnectError: the connection has ended, or has all the channels that the broker lets it have.
        """
        self._connection.check()
        number = self._free_number()
        self._opening.add(number)
        self._frames.opened.add(number)
        # In a task of its own: a caller that waits less than OPEN_TIMEOUT would never learn that no answer comes.
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
        # A broker that answers others may have much to read before it comes to this; then CALL_TIMEOUT counts.
        if not self._connection.blocked and self._frames.answered <= asked:
            why = f"opening a channel had no answer for {OPEN_TIMEOUT:g} s, nor had anything else"
            self._connection.give_up(why)

    def _drop_opened(self, opening: asyncio.Task[AbstractChannel]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._drop(opening.result())

    def _drop(self, channel: AbstractChannel) -> None:
        if not channel.is_closed:
            self._client.run(channel.close())

    def _free_number(self) -> int:
        # The library would count on past the broker's limit, which ends the connection.
        taken = {*self._client.channel_numbers, *self._opening}
        # The number of a channel that was just closed comes last: the goodbye to it may not have been sent yet.
        for number in chain(range(self._last + 1, self.channel_max + 1), range(1, self._last + 1)):
            if number not in taken:
                self._last = number
                return number
        raise ConnectError(
            f"RabbitMQ at {self._connection.where} lets a connection have {self.channel_max} channels (channel_max), "
            "and all of them are in use. Raise it in rabbitmq.conf, or use fewer consumers and producers in one "
            "process."
        )

    @asynccontextmanager
    async def declaring(self) -> AsyncIterator[AbstractChannel]:
        """A channel for declarations, for one user at a time; one whose request has failed is not used again.

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
