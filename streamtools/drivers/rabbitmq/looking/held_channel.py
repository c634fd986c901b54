"""HeldChannel: receives messages unchanged, and keeps them in hand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from struct import Struct
from typing import Final

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp import frames
from streamtools.drivers.rabbitmq.amqp.channel import Channel, ignore
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.frames import HEAD, LONG, LONGLONG, METHOD, shortstr
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error
from streamtools.errors import StreamToolsError

GET: Final = 60 << 16 | 70
GET_OK: Final = 60 << 16 | 71
GET_EMPTY: Final = 60 << 16 | 72
_GET: Final = Struct(">IH")
#: Numbers of consumers; one that was cancelled leaves its number to no other.
_numbers: Final = count(1)


@dataclass(slots=True)
class Held:
    """A message in hand, in the form in which it is on the wire.

    Attributes:
        exchange: the exchange that it was published to.
        key: its routing key.
        data: the flags and values of its content header.
        topic: its routing key as text, if it came by an exchange that is not ours.
        consumer: the tag of the consumer that got it; empty if it came by basic.get.
        settled: whether it was acknowledged.
    """

    channel: HeldChannel
    tag: int
    redelivered: bool
    exchange: bytes
    key: bytes
    data: bytes
    body: bytes
    topic: str | None = None
    consumer: bytes = b""
    settled: bool = False


class HeldChannel(Channel):
    """Receives messages of one queue, and keeps them in hand until they are acknowledged or the channel is closed.

    Parameters:
        gets: whether to receive by basic.get, without a consumer; some queues are deleted with their last consumer.

    Attributes:
        due: the number of deliveries that were asked for and have not come.
    """

    topic: str | None

    def __init__(self, connection: Connection, library: AbstractChannel, queue: str, *, gets: bool) -> None:
        super().__init__(connection, library)
        self._queue = queue
        self._gets = gets
        self.due: int = 0
        self._arrived = asyncio.Event()
        self._consumers: list[str] = []
        #: Whether acknowledgements were sent one by one, which the queue may not have yet.
        self._single = False
        self._exchange = self._key = self._consumer = b""
        #: Messages that have arrived and were not returned yet; None stands for the answer "the queue is empty".
        self._buffer: deque[Held | None] = deque()

    @classmethod
    async def open(cls, connection: Connection, queue: str, *, gets: bool) -> HeldChannel:
        """Open a channel, without receiving anything yet."""
        channel = cls(connection, await connection.channels.open(confirms=False), queue, gets=gets)
        connection.attach(channel)
        return channel

    async def take(self, number: int, timeout: float | None) -> list[Held]:
        """Return up to `number` messages as soon as one has come; return none if the queue seems to be empty.

        Parameters:
            timeout: the seconds to wait for the first delivery; None for no limit. To basic.get, an empty queue
                answers at once.

        Raises:
            ConnectionLost: the channel has ended.
        """
        if self._gets:
            return await self._get(number)
        if self.due <= 0:  # a second consumer would disturb the order while the first one still has room
            self.due = number
            await self._consume(number)
        await self._arrival(timeout)
        return self.drain()

    def drain(self) -> list[Held]:
        """Return the messages that have come meanwhile."""
        found = [held for held in self._buffer if held is not None]
        self._buffer.clear()
        self.due -= len(found)
        return found

    async def _get(self, number: int) -> list[Held]:
        payload = _GET.pack(GET, 0) + shortstr(self._queue) + b"\0"
        self.connection.write((HEAD.pack(METHOD, self.number, len(payload)) + payload + b"\xce") * number)
        found: list[Held] = []
        for _ in range(number):  # wait for every answer, so that none is taken for the answer to a later request
            await self._arrival(None)
            if (held := self._buffer.popleft()) is not None:
                found.append(held)
        return found

    async def _consume(self, prefetch: int) -> None:
        tag = f"streamtools-look-{next(_numbers)}"
        await self._call(self._library.basic_qos(prefetch_count=prefetch))
        self._consumers.append(tag)
        await self._call(self._library.basic_consume(self._queue, ignore, consumer_tag=tag))

    async def cancel(self, *, flush: bool = False) -> None:
        """Stop the deliveries.

        Cancel before anything is acknowledged: an acknowledgement makes room for another message, and what a quorum
        queue hands out while the cancel is on its way reaches nobody; it goes back, counted, when the channel ends.

        Parameters:
            flush: when this returns, the queue has all acknowledgements that were sent before, also those that were
                sent one by one. For that, a consumer may have to take one more message.
        """
        if flush and self._single and not self._consumers:
            await self._consume(1)
        consumers, self._consumers = self._consumers, []
        if consumers:  # what is on its way arrives before the answer
            await self._call(self._library.basic_qos(prefetch_count=1))
            self._single = False
        for tag in consumers:
            await self._call(self._library.basic_cancel(tag))
        self.due = len(self._buffer)

    async def _arrival(self, timeout: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self._buffer and self.error is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        if not self._buffer:
            self.check()

    def acknowledge(self, held: Iterable[Held]) -> None:
        """Acknowledge messages one by one."""
        out = []
        for one in held:
            if not one.settled:
                one.settled = True
                out.append(frames.ack_frame(self.number, one.tag, multiple=False))
        self._single = self._single or bool(out)
        self.connection.write(b"".join(out))

    def acknowledge_all(self, held: Sequence[Held]) -> None:
        """Acknowledge these, by one frame: all that came before the last one is settled, or one of them."""
        for one in held:
            one.settled = True
        self.acknowledge_to(max(held, key=lambda one: one.tag))

    def acknowledge_to(self, last: Held) -> None:
        """Acknowledge a message that is not settled, and all that came before it."""
        self.connection.write(frames.ack_frame(self.number, last.tag, multiple=True))

    async def close(self) -> None:
        """Close the channel; messages that are not acknowledged go back to the front of the queue, in order."""
        if self.error is None:
            await self._call(self._library.close())

    async def _call(self, request: Awaitable[object]) -> None:
        """Await a request until it ends, even if we are cancelled.

        If a request is cancelled, the library closes the channel: the messages in hand would go back to the queue,
        which counts that.
        """
        asked = asyncio.ensure_future(self.connection.call(request))
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
            raise channel_error(error, self.connection.where) from error

    # --- what arrives -------------------------------------------------------------------------------

    def _take_method(self, data: bytes, start: int) -> bool:
        (method,) = LONG.unpack_from(data, start)
        if method == GET_EMPTY:
            self._arrive(None)
            return True
        if method not in (GET_OK, frames.DELIVER):
            return super()._take_method(data, start)
        self._consumer, position = (b"", start + 4) if method == GET_OK else _short(data, start + 4)
        (self._tag,) = LONGLONG.unpack_from(data, position)
        self._redelivered = data[position + 8] & 1 == 1
        self.topic = frames.delivered_topic(data, position + 9)
        self._exchange, position = _short(data, position + 9)
        self._key, _ = _short(data, position)
        self._method = method
        return True

    def _complete(self, body: bytes) -> None:
        self._method = 0
        data, self._properties = self._properties, b""
        where = (self._exchange, self._key)
        self._arrive(Held(self, self._tag, self._redelivered, *where, data, body, self.topic, self._consumer))

    def _arrive(self, held: Held | None) -> None:
        self._buffer.append(held)
        self._arrived.set()

    def _on_end(self) -> None:
        self._arrived.set()


def _short(data: bytes, start: int) -> tuple[bytes, int]:
    end = start + 1 + data[start]
    return data[start + 1 : end], end
