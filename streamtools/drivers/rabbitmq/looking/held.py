"""Two channels for looking: one takes messages as they are on the wire, one publishes them again, byte for byte."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, cast

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp import frames
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.amqp.frames import END, HEAD, LONG, LONGLONG, METHOD
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, channel_lost, lost
from streamtools.errors import ConnectionLost, StreamToolsError

GET: Final = 60 << 16 | 70
GET_OK: Final = 60 << 16 | 71
GET_EMPTY: Final = 60 << 16 | 72
_GET: Final = Struct(">IH")
_PUBLISH: Final = Struct(">IH")
PUBLISH: Final = 60 << 16 | 40
_MANDATORY: Final = b"\x01"
#: Codes with which a channel is closed: there is no such queue; it is not given out so; permission, and arguments.
NOT_FOUND: Final = 404
LOCKED: Final = 405
REFUSED: Final = 403
#: Messages written before the socket is waited for.
PIECE: Final = 100


@dataclass(slots=True)
class Held:
    """A message in hand, as it is on the wire.

    Attributes:
        exchange: where it was published to.
        key: its routing key.
        data: flags and values of its content header.
        topic: its routing key as a text, where it came by an exchange that is not ours.
        settled: it is acknowledged.
    """

    channel: HoldingChannel
    tag: int
    redelivered: bool
    exchange: bytes
    key: bytes
    data: bytes
    body: bytes
    topic: str | None = None
    settled: bool = False


class HoldingChannel(FastChannel):
    """Takes messages of one queue, and keeps them in hand until they are acknowledged or it is closed."""

    def __init__(self, connection: Connection, channel: AbstractChannel, queue: str) -> None:
        super().__init__(channel.number)
        self._connection = connection
        self._library = channel
        self._queue = queue
        self._arrived = asyncio.Event()
        self._consumers: list[str] = []
        self._exchange = self._key = b""
        #: The broker's code when it closed the channel; 0 when it did not.
        self.code: int = 0
        #: What has arrived and was not taken out yet; None for "the queue is empty".
        self.buffer: deque[Held | None] = deque()

    @classmethod
    async def open(cls, connection: Connection, queue: str) -> HoldingChannel:
        """Open a channel; nothing is taken yet."""
        holding = cls(connection, await connection.channel(confirms=False), queue)
        connection.attach(holding)
        return holding

    def get(self, number: int) -> None:
        """Ask for so many messages: as many arrive, or None for each that is not there (basic.get)."""
        name = self._queue.encode()
        payload = _GET.pack(GET, 0) + bytes((len(name),)) + name + b"\0"
        self._connection.write((HEAD.pack(METHOD, self.number, len(payload)) + payload + b"\xce") * number)

    async def consume(self, prefetch: int) -> None:
        """Have so many more messages delivered, beside those that were asked for before."""
        tag = f"streamtools-look-{len(self._consumers)}"
        await self._call(self._library.basic_qos(prefetch_count=prefetch))
        self._consumers.append(tag)
        await self._call(self._library.basic_consume(self._queue, _never, consumer_tag=tag))

    async def cancel(self) -> None:
        """Have no more delivered. Acknowledgements that were sent before are with the queue when this returns."""
        consumers, self._consumers = self._consumers, []
        for tag in consumers:
            await self._call(self._library.basic_cancel(tag))

    async def arrival(self, timeout: float | None = None) -> bool:
        """Wait until something is in the buffer; False when nothing came in time.

        Raises:
            StreamToolsError: the channel has ended.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self.buffer and self.error is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return False
        if not self.buffer and self.error is not None:
            raise ConnectionLost(str(self.error))
        return True

    def acknowledge(self, held: Iterable[Held]) -> None:
        """Acknowledge these, each by itself."""
        out = []
        for one in held:
            if not one.settled:
                one.settled = True
                out.append(frames.ack_frame(self.number, one.tag, multiple=False))
        self._connection.write(b"".join(out))

    def acknowledge_to(self, last: Held) -> None:
        """Acknowledge this one, which is not settled, and all that came before it."""
        self._connection.write(frames.ack_frame(self.number, last.tag, multiple=True))

    async def close(self) -> None:
        """Close the channel: what is not acknowledged goes back to the front of its queue, in order."""
        if self.error is None:
            await self._call(self._library.close())

    # --- what arrives -------------------------------------------------------------------------------

    def refuse(self, code: int, text: str) -> None:
        self.code = code
        super().refuse(code, text)

    def fail(self, why: str, *, connection: bool = False) -> None:
        if self.error is None:
            self.error: ConnectionLost | None = (lost if connection else channel_lost)(self._connection.where, why)
        self._arrived.set()

    def _take_method(self, data: bytes, start: int) -> bool:
        (method,) = LONG.unpack_from(data, start)
        if method == GET_EMPTY:
            self._arrive(None)
            return True
        if method not in (GET_OK, frames.DELIVER):
            return super()._take_method(data, start)
        position = start + 4 if method == GET_OK else start + 5 + data[start + 4]
        (self._tag,) = LONGLONG.unpack_from(data, position)
        self._redelivered = data[position + 8] & 1 == 1
        self.topic: str | None = frames.delivered_topic(data, position + 9)
        self._exchange, position = _short(data, position + 9)
        self._key, _ = _short(data, position)
        self._method = method
        return True

    def _complete(self, body: bytes) -> None:
        self._method = 0
        data, self._properties = self._properties, b""
        self._arrive(Held(self, self._tag, self._redelivered, self._exchange, self._key, data, body, self.topic))

    def _arrive(self, held: Held | None) -> None:
        self.buffer.append(held)
        self._arrived.set()

    async def _call(self, request: object) -> None:
        # The library closes a channel whose request is cancelled; what is in hand would go back, and be counted.
        asked = asyncio.ensure_future(self._connection.call(cast("asyncio.Future[object]", request)))
        try:
            await asyncio.shield(asked)
        except asyncio.CancelledError:
            await asyncio.wait({asked})
            if not asked.cancelled():
                asked.exception()
            raise
        except StreamToolsError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self._connection.where) from error


class CopyChannel(FastChannel):
    """Publishes with confirms what was taken as it is on the wire."""

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(number)
        self._connection = connection
        self._next = 1
        self._low = 1
        #: Tags that the broker has not answered yet, and those that it did not take.
        self._open: set[int] = set()
        self._refused: set[int] = set()
        self._answered = asyncio.Event()
        #: Messages that reached no queue.
        self.unroutable: int = 0
        #: The broker's code when it closed the channel; 0 when it did not.
        self.code: int = 0

    @classmethod
    async def open(cls, connection: Connection) -> CopyChannel:
        """Open a channel for publishing on this connection."""
        channel = await connection.channel(confirms=True)
        copies = cls(connection, channel.number)
        connection.attach(copies)
        return copies

    async def publish(self, messages: Sequence[tuple[str, bytes, bytes, bytes]], timeout: float) -> set[int]:
        """Publish these, in order; the places of those that no queue has taken.

        Parameters:
            messages: exchange, routing key, content header and body of each.
            timeout: seconds without an answer after which this gives up.

        Raises:
            TimeoutError: the broker has stopped to answer.
            ConnectionLost: the channel has ended.
        """
        first = self._next
        self._next += len(messages)
        self._open.update(range(first, self._next))
        self._refused.clear()
        for start in range(0, len(messages), PIECE):
            self._connection.write(b"".join(self._frames(*message) for message in messages[start : start + PIECE]))
            await self._connection.drain()
        while self._open:
            self._check()
            self._answered.clear()
            async with asyncio.timeout(timeout):
                await self._answered.wait()
        return {tag - first for tag in self._refused}

    def _check(self) -> None:
        if self.error is not None:
            raise ConnectionLost(str(self.error))

    def _frames(self, exchange: str, key: bytes, data: bytes, body: bytes) -> bytes:
        name = exchange.encode()
        payload = b"".join(
            (_PUBLISH.pack(PUBLISH, 0), bytes((len(name),)), name, bytes((len(key),)), key, _MANDATORY)
        )
        method = HEAD.pack(METHOD, self.number, len(payload)) + payload + bytes((END,))
        size = self._connection.frame_max
        return (
            method
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
        """It reached no queue, though the broker confirms it."""
        self.unroutable += 1

    def refuse(self, code: int, text: str) -> None:
        self.code = code
        super().refuse(code, text)

    def fail(self, why: str, *, connection: bool = False) -> None:
        if self.error is None:
            self.error: ConnectionLost | None = (lost if connection else channel_lost)(self._connection.where, why)
        self._answered.set()


def _short(data: bytes, start: int) -> tuple[bytes, int]:
    end = start + 1 + data[start]
    return data[start + 1 : end], end


async def _never(message: object) -> None:
    """The library's callback: deliveries of this channel never get there."""
