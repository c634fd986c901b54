"""Channel: the base of our channels, for receiving and for publishing."""

from __future__ import annotations

import asyncio

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.errors import channel_lost, lost
from streamtools.errors import ConnectionLost


class Channel(FastChannel):
    """A channel with one user. When the channel or its connection ends, another channel replaces it.

    Parameters:
        connection: the connection of the channel.
        library: the client library's channel with the same number.

    Attributes:
        error: why the channel has ended; None while it is open.
        code: the broker's code if the broker closed the channel, else 0.
    """

    def __init__(self, connection: Connection, library: AbstractChannel) -> None:
        super().__init__(library.number)
        self.connection = connection
        self.error: ConnectionLost | None = None
        self.code: int = 0
        self._library = library

    def fail(self, why: str, *, connection: bool = False) -> None:
        if self.error is None:
            self.error = (lost if connection else channel_lost)(self.connection.where, why)
            self._on_end()

    def _on_end(self) -> None:
        """Wake the tasks that wait for something on this channel."""

    def refuse(self, code: int, text: str) -> None:
        self.code = code
        super().refuse(code, text)

    def check(self) -> None:
        """Raise ConnectionLost if the channel has ended."""
        if self.error is not None:
            raise ConnectionLost(str(self.error))

    def discard(self, why: str = "it was closed by us") -> asyncio.Task[None]:
        """Start a task that closes the channel, and return it; it goes on if the caller is cancelled."""
        self.fail(why)
        return self.connection.discard(self, self._library)


async def ignore(message: object) -> None:
    """The callback that the client library requires; it is never called, because we read the deliveries ourselves."""
