"""CopyChannel: publishes messages again, byte for byte as they were received."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp import frames
from streamtools.drivers.rabbitmq.amqp.channel import Channel
from streamtools.drivers.rabbitmq.amqp.connection import Connection

#: After this many messages, we wait until the socket has room.
PIECE: Final = 100


class Copy(NamedTuple):
    """A message in the form in which it is on the wire.

    Attributes:
        data: the flags and values of its content header.
    """

    exchange: str
    key: bytes
    data: bytes
    body: bytes


class CopyChannel(Channel):
    """Publishes with confirms.

    Attributes:
        unroutable: the number of messages that reached no queue.
    """

    def __init__(self, connection: Connection, library: AbstractChannel) -> None:
        super().__init__(connection, library)
        self._next = 1
        self._low = 1
        #: The tags that the broker has not answered yet, and the tags that it refused.
        self._open: set[int] = set()
        self._refused: set[int] = set()
        self._answered = asyncio.Event()
        self.unroutable: int = 0

    @classmethod
    async def open(cls, connection: Connection) -> CopyChannel:
        """Open a channel for publishing on this connection."""
        copies = cls(connection, await connection.channels.open(confirms=True))
        connection.attach(copies)
        return copies

    async def publish(self, messages: Sequence[Copy], timeout: float) -> set[int]:
        """Publish messages in order, and return the positions of those that the broker refused.

        Parameters:
            timeout: give up after this many seconds without an answer.

        Raises:
            TimeoutError: the broker has stopped answering.
            ConnectionLost: the channel has ended.
        """
        first = self._next
        self._next += len(messages)
        self._open.update(range(first, self._next))
        self._refused.clear()
        for start in range(0, len(messages), PIECE):
            self.connection.write(b"".join(map(self._frames, messages[start : start + PIECE])))
            await self.connection.drain()
        while self._open:
            self.check()
            self._answered.clear()
            async with asyncio.timeout(timeout):
                await self._answered.wait()
        return {tag - first for tag in self._refused}

    def _frames(self, message: Copy) -> bytes:
        exchange, key, data, body = message
        size = self.connection.frame_max
        return (
            frames.publish_frame(self.number, exchange, key)
            + frames.header_frame(self.number, data, len(body), size)
            + frames.body_frames(self.number, body, size)
        )

    def confirm(self, tag: int, *, multiple: bool, held: bool) -> None:
        tags = self._open.intersection(range(self._low, tag + 1) if multiple else (tag,))
        if not held:
            self._refused |= tags
        self._open -= tags
        if multiple:
            self._low = tag + 1
        self._answered.set()

    def returned(self, routing_key: str, properties: bytes, body: bytes) -> None:
        """Count a message that reached no queue; the broker confirms it nevertheless."""
        self.unroutable += 1

    def _on_end(self) -> None:
        self._answered.set()
