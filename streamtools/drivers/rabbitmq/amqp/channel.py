"""A channel of ours on a connection: for receiving, or for publishing."""

from __future__ import annotations

import asyncio

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.errors import channel_lost, lost
from streamtools.errors import ConnectionLost


class Channel(FastChannel):
    """A channel with one user. It ends alone, or with its connection, and is then replaced by another one.

    Parameters:
        connection: the connection that it is on.
        library: the client library's channel of the same number.

    Attributes:
        error: why it has ended; None while it is open.
        code: the broker's code when it closed the channel; 0 when it did not.
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
        """Wake whoever waits for something on this channel."""

    def refuse(self, code: int, text: str) -> None:
        self.code = code
        super().refuse(code, text)

    def check(self) -> None:
        """Raise ConnectionLost when the channel has ended."""
        if self.error is not None:
            raise ConnectionLost(str(self.error))

    def discard(self, why: str = "it was closed by us") -> asyncio.Task[None]:
        """Begin to close the channel, in a task that goes on if its caller is cancelled."""
        self.fail(why)
        return self.connection.discard(self, self._library)


async def ignore(message: object) -> None:
    """A callback for the client library, which never gets a delivery of these channels."""
