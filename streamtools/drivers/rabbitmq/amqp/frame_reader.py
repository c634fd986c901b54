"""FrameReader: splits the byte stream from the broker into frames, and passes each to its channel or to the library.

aio-pika and aiormq connect, declare, and keep the heartbeat. They need three awaits, a queue and a decoded object for
each frame, and one task for each delivery. So this stream protocol stands between the socket and the library's
reader. It takes the deliveries and confirms of attached channels out of the byte stream, as they arrive.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

from streamtools.drivers.rabbitmq.amqp import frames
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.amqp.frames import (
    BODY,
    END,
    FRAME_MAX,
    HEAD,
    HEADER,
    HEADER_MAX,
    HEARTBEAT,
    HEARTBEAT_FRAME,
    LONG,
    METHOD,
    METHOD_MAX,
    OVERHEAD,
)

#: If the library has got no frame for this many seconds because all were ours, it gets a heartbeat: it believes that
#: a connection without frames is dead.
HEARTBEAT_INTERVAL: Final = 1.0


class _ClosedChannel(FastChannel):
    """Receives late frames for a channel that the broker has closed, until its number is used again."""

    def frame(self, kind: int, data: bytes, start: int, stop: int) -> bool:
        """Drop messages and confirms, and leave all other methods to the library."""
        if kind != METHOD:
            return True
        (method,) = LONG.unpack_from(data, start)
        return method in (frames.DELIVER, frames.RETURN, frames.ACK, frames.NACK)


class FrameReader(asyncio.StreamReaderProtocol):
    """Splits the byte stream into frames; passes those of attached channels to them, and all others to the library.

    An impossible frame ends the connection at once: after it nobody knows where the next frame begins.

    Parameters:
        reader: the stream that the library reads.
        on_lost: called with the reason when the connection has ended.
    """

    def __init__(
        self, reader: asyncio.StreamReader, on_lost: Callable[[str], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(reader, loop=loop)
        self.reader = reader
        self._channels: dict[int, FastChannel] = {}
        self._on_lost = on_lost
        self._time = loop.time
        self._rest = b""
        self._foreign = False
        self._began = False
        #: Type of a frame -> the most bytes of its payload.
        self._most: dict[int, float] = {METHOD: METHOD_MAX, HEADER: HEADER_MAX, HEARTBEAT: 0}
        self.agree(FRAME_MAX)
        #: The numbers of all channels that were opened so far. A frame for any other channel is impossible; a frame
        #: for a closed channel is only late.
        self.opened: set[int] = set()
        self._transport_to_abort: asyncio.BaseTransport | None = None
        #: When the last complete frame arrived, on the loop's clock. Bytes alone do not show that the broker lives.
        self.heard: float = loop.time()
        #: When the last complete frame that is not a heartbeat arrived.
        self.answered: float = self.heard
        self._shown = self.heard
        #: The broker's text when it closed the connection.
        self.said: str = ""
        #: Why the broker accepts no messages now ("low on memory"); empty while it accepts them.
        self.blocked: str = ""

    def agree(self, frame_max: float) -> None:
        """Set the size, in bytes, of the largest frame that the broker sends; content headers may be larger."""
        self._most[BODY] = frame_max - OVERHEAD

    def attached(self) -> list[FastChannel]:
        """Return the attached channels."""
        return list(self._channels.values())

    def attach(self, channel: FastChannel) -> None:
        """Pass the frames of this channel to it from now on."""
        self._channels[channel.number] = channel

    def detach(self, channel: FastChannel) -> None:
        """Pass the frames of this channel to the library again."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport_to_abort = transport
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(f"{exc}" if exc is not None and str(exc) else "the other side closed it without a word")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._foreign:
            super().data_received(data)
            return
        try:
            self._split(self._rest + data if self._rest else data)
        except (IndexError, ValueError, struct.error) as error:
            self._broken(error)
            return
        if self.heard - self._shown > HEARTBEAT_INTERVAL:
            self._pass(HEARTBEAT_FRAME)

    def _split(self, data: bytes) -> None:
        position, end, heartbeats = 0, len(data), 0
        channels, most = self._channels, self._most
        while end - position >= OVERHEAD:
            kind, number, size = HEAD.unpack_from(data, position)
            stop = position + size + OVERHEAD
            if size > most.get(kind, -1):
                if kind in most or self._began:
                    raise ValueError(f"a frame of type {kind} and {size} bytes")
                # This is a greeting, not a frame: the other side speaks another protocol or version.
                self._foreign = True
                self._pass(data[position:])
                return
            if stop > end:
                break
            if data[stop - 1] != END:
                raise ValueError(f"a frame of type {kind} without its end octet")
            channel = channels.get(number)
            if channel is None:
                self._check(kind, number, data, position + 7)
                heartbeats += kind == HEARTBEAT
                self._pass(frames.readable(data[position:stop]))
            elif not channel.frame(kind, data, position + 7, stop - 1):
                self._pass(frames.readable(data[position:stop]))
                if channel.closed:  # drop late frames until the number is used again
                    self._channels[number] = _ClosedChannel(number)
            position = stop
        self._rest = data[position:]
        if position:
            self._note_life(is_answer=position > heartbeats * OVERHEAD)

    def _note_life(self, *, is_answer: bool) -> None:
        self._began = True
        self.heard = self._time()
        if is_answer:
            self.answered = self.heard

    def _pass(self, data: bytes) -> None:
        self._shown = self._time()
        super().data_received(data)

    def _check(self, kind: int, number: int, data: bytes, start: int) -> None:
        """Check a frame that is not for an attached channel.

        Raises:
            ValueError: the frame is impossible.
        """
        if kind == HEARTBEAT:
            if number:
                raise ValueError("a heartbeat on a channel")
        elif number == 0:
            if kind != METHOD:
                raise ValueError("content on channel 0")
            self._note(data, start)
        elif number not in self.opened:
            raise ValueError(f"a frame for channel {number}, which was never opened")

    def _note(self, data: bytes, start: int) -> None:
        """Note what the broker says about the connection; the library answers it."""
        (method,) = LONG.unpack_from(data, start)
        if method == frames.CONNECTION_CLOSE:
            code, text = frames.close_reason(data, start + 4)
            self.said = f"{code} {text}"
            self._on_lost(f"the broker closed it: {self.said}")
        elif method == frames.CONNECTION_CLOSE_OK:
            self._on_lost("it was closed by us")
        elif method == frames.CONNECTION_BLOCKED:
            self.blocked = frames.text_at(data, start + 4) or "an alarm"
        elif method == frames.CONNECTION_UNBLOCKED:
            self.blocked = ""

    def _broken(self, error: Exception) -> None:
        self._on_lost(f"the broker sent bytes that are not AMQP: {error}")
        if isinstance(self._transport_to_abort, asyncio.WriteTransport):
            self._transport_to_abort.abort()
