"""FastChannel: reads the frames of one channel, which the client library would read more slowly."""

from __future__ import annotations

from streamtools.drivers.rabbitmq.amqp import frames
from streamtools.drivers.rabbitmq.amqp.frames import BODY, HEADER, LONG, LONGLONG, METHOD


class FastChannel:
    """Reads the frames of one channel, and calls the methods of a subclass with complete messages and confirms.

    Attributes:
        closed: whether the broker has closed the channel.
        topic: the routing key of the last message, if it came by an exchange.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed: bool = False
        self._method = 0
        self._tag = 0
        self._redelivered = False
        self.topic: str | None = None
        self._routing_key = ""
        self._properties = b""
        self._parts: list[bytes] = []
        self._left = 0

    @property
    def receiving(self) -> bool:
        """Whether a message has arrived only in part."""
        return self._method != 0

    def deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        """Handle a message that arrived."""
        raise ValueError("a delivery on a channel that receives nothing")

    def returned(self, routing_key: str, properties: bytes, body: bytes) -> None:
        """Handle a published message that came back because no queue takes it."""

    def confirm(self, tag: int, *, multiple: bool, held: bool) -> None:
        """Handle the broker's answer whether it holds the message that was published under `tag`."""

    def fail(self, why: str, *, connection: bool = False) -> None:
        """Handle the end of the channel, or of the whole connection."""

    def refuse(self, code: int, text: str) -> None:
        """Handle that the broker has closed the channel."""
        self.fail(f"the broker closed it: {code} {text}")

    def frame(self, kind: int, data: bytes, start: int, stop: int) -> bool:
        """Read one frame, whose payload is `data[start:stop]`; return False to leave it to the library.

        Raises:
            ValueError: the frame must not come here.
        """
        if kind == METHOD:
            if self._method:
                raise ValueError("a method before the whole message had come")
            return self._take_method(data, start)
        if self._method == 0:
            raise ValueError(f"a frame of type {kind} without a method before it")
        if kind == HEADER:
            self._left = LONGLONG.unpack_from(data, start + 4)[0]
            self._properties = data[start + 12 : stop]
            if self._left == 0:
                self._complete(b"")
        elif kind == BODY:
            self._take_body(data[start:stop])
        else:
            raise ValueError("a heartbeat on a channel")
        return True

    def _take_body(self, part: bytes) -> None:
        self._left -= len(part)
        if self._left < 0:
            raise ValueError("a body that is longer than its header says")
        if self._left > 0:
            self._parts.append(part)
        elif self._parts:
            self._parts.append(part)
            body = b"".join(self._parts)
            self._parts = []
            self._complete(body)
        else:
            self._complete(part)

    def _take_method(self, data: bytes, start: int) -> bool:
        (method,) = LONG.unpack_from(data, start)
        if method == frames.DELIVER:
            position = start + 5 + data[start + 4]  # after the consumer tag
            (self._tag,) = LONGLONG.unpack_from(data, position)
            self._redelivered = data[position + 8] & 1 == 1
            self.topic = frames.delivered_topic(data, position + 9)
            self._method = method
            return True
        if method in (frames.ACK, frames.NACK):
            (tag,) = LONGLONG.unpack_from(data, start + 4)
            self.confirm(tag, multiple=data[start + 12] & 1 == 1, held=method == frames.ACK)
            return True
        if method == frames.RETURN:
            self._method = method
            self._routing_key = frames.returned_key(data, start + 4)
            return True
        self._method = 0
        if method == frames.CANCEL:
            self.fail("it cancelled the consumer: the queue was deleted, or moved to another node")
        elif method == frames.CHANNEL_CLOSE:
            self.closed = True
            self.refuse(*frames.close_reason(data, start + 4))
        return False

    def _complete(self, body: bytes) -> None:
        method, self._method = self._method, 0
        properties, self._properties = self._properties, b""
        if method == frames.DELIVER:
            self.deliver(self._tag, self._redelivered, properties, body)
        else:
            self.returned(self._routing_key, properties, body)
