"""Writes and reads the AMQP 0-9-1 frames of the message path: publish, ack, nack, deliveries and confirms.

The client library handles all other frames (handshake, declarations, heartbeats). A frame has a type octet, a channel
number, a length, a payload and an end octet (specification 0-9-1, section 2.3.5). Methods are numbered as class *
65536 + method. The properties of a message are in `properties`.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

#: A frame's type, channel and payload length.
HEAD: Final = Struct(">BHI")
#: The bytes of a frame in addition to its payload.
OVERHEAD: Final = 8
END: Final = 0xCE
_END: Final = b"\xce"

METHOD: Final = 1
HEADER: Final = 2
BODY: Final = 3
HEARTBEAT: Final = 8
#: A whole heartbeat frame.
HEARTBEAT_FRAME: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"

#: The largest frame that RabbitMQ proposes; before both sides have agreed on a size, we read no larger one.
FRAME_MAX: Final = 131_072
#: The largest method that we read: a broker's methods have a few short strings, and the first one has a table.
METHOD_MAX: Final = 8192
#: The largest content header that we read. RabbitMQ never splits a header, and with the fields that it adds (x-death)
#: a header may be larger than a frame. No message is larger than this.
HEADER_MAX: Final = 512 * 1024 * 1024

LONG: Final = Struct(">I")
SHORT: Final = Struct(">H")
LONGLONG: Final = Struct(">Q")

CONNECTION_CLOSE: Final = 10 << 16 | 50
CONNECTION_CLOSE_OK: Final = 10 << 16 | 51
CONNECTION_BLOCKED: Final = 10 << 16 | 60
CONNECTION_UNBLOCKED: Final = 10 << 16 | 61
#: A whole frame that closes the connection: code 200, no text, and no method at fault.
GOODBYE: Final = b"\x01\x00\x00\x00\x00\x00\x0b" + LONG.pack(CONNECTION_CLOSE) + b"\x00\xc8\x00\x00\x00\x00\x00\xce"
CHANNEL_CLOSE: Final = 20 << 16 | 40
CANCEL: Final = 60 << 16 | 30
RETURN: Final = 60 << 16 | 50
DELIVER: Final = 60 << 16 | 60
ACK: Final = 60 << 16 | 80
NACK: Final = 60 << 16 | 120

#: The exchanges through which our delayed messages pass have names that begin with this.
OWN_EXCHANGES: Final = b"streamtools.delay."

_PUBLISH: Final = Struct(">HHH")
_CONTENT: Final = Struct(">BHIHHQ")
_SETTLE: Final = Struct(">BHIIQBB")
_MANDATORY: Final = b"\x01"
#: basic.nack's bits: multiple = 1, requeue = 2.
_REQUEUE: Final = 2


def readable(frame: bytes) -> bytes:
    """Return the frame with a text that the client library can decode: the broker may have cut it in a character."""
    if frame[0] != METHOD or LONG.unpack_from(frame, 7)[0] not in (CHANNEL_CLOSE, CONNECTION_CLOSE):
        return frame
    start = 14  # after the head, the method, the code and the length of the text
    stop = start + frame[start - 1]
    try:
        frame[start:stop].decode()
    except UnicodeDecodeError:
        text = bytes(byte if byte < 128 else ord("?") for byte in frame[start:stop])
        return frame[:start] + text + frame[stop:]
    return frame


class Unsendable(ValueError):
    """A message that no AMQP frame can carry; the text says why."""


def shortstr(text: str | bytes) -> bytes:
    """Return a string of at most 255 bytes, preceded by its length.

    Raises:
        Unsendable: the string is longer.
    """
    data = text if isinstance(text, bytes) else text.encode()
    if len(data) > 255:
        raise Unsendable(f"{text[:40]!r}... is {len(data)} bytes long; AMQP allows 255 there.")
    return bytes((len(data),)) + data


def publish_frame(channel: int, exchange: str | bytes, routing_key: str | bytes) -> bytes:
    """Return a complete basic.publish frame, mandatory: a message that reaches no queue comes back.

    Raises:
        Unsendable: a name is over 255 bytes.
    """
    payload = _PUBLISH.pack(60, 40, 0) + shortstr(exchange) + shortstr(routing_key) + _MANDATORY
    return HEAD.pack(METHOD, channel, len(payload)) + payload + _END


def header_frame(channel: int, properties: bytes, body_size: int, frame_max: int) -> bytes:
    """Return a complete content header frame.

    Parameters:
        properties: flags and values, as `properties.encode` returns them.
        frame_max: the largest frame that the broker accepts, in bytes.

    Raises:
        Unsendable: the properties do not fit into a frame, and a header cannot be split.
    """
    size = len(properties) + 12
    if size + OVERHEAD > frame_max:
        raise Unsendable(
            f"its headers and properties are {len(properties)} bytes; this broker allows {frame_max - OVERHEAD - 12} "
            "(frame_max). Put data into the payload."
        )
    return _CONTENT.pack(HEADER, channel, size, 60, 0, body_size) + properties + _END


def body_frames(channel: int, body: bytes, frame_max: int) -> bytes:
    """Return the body in as many frames as it needs; an empty body needs none."""
    size = len(body)
    most = frame_max - OVERHEAD
    if 0 < size <= most:
        return HEAD.pack(BODY, channel, size) + body + _END
    parts: list[bytes] = []
    for start in range(0, size, most):
        part = body[start : start + most]
        parts += (HEAD.pack(BODY, channel, len(part)), part, _END)
    return b"".join(parts)


def ack_frame(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Return a complete basic.ack frame, for this delivery or for all up to it."""
    return _SETTLE.pack(METHOD, channel, 13, ACK, tag, multiple, END)


def release_frame(channel: int, tag: int) -> bytes:
    """Return a complete basic.nack frame that gives one delivery back to its queue."""
    return _SETTLE.pack(METHOD, channel, 13, NACK, tag, _REQUEUE, END)


def delivered_topic(data: bytes, start: int) -> str | None:
    """Return the routing key of a basic.deliver that came by an exchange; None if by none, or by one of our delays.

    Parameters:
        start: the position of the exchange's name.
    """
    if not data[start]:
        return None
    key = start + 1 + data[start]
    if data.startswith(OWN_EXCHANGES, start + 1, key):
        return None
    return data[key + 1 : key + 1 + data[key]].decode("utf-8", "backslashreplace") or None


def returned_key(data: bytes, start: int) -> str:
    """Return the routing key of a basic.return, which stands after code, text and exchange."""
    text = start + 2
    exchange = text + 1 + data[text]
    key = exchange + 1 + data[exchange]
    return data[key + 1 : key + 1 + data[key]].decode("utf-8", "replace")


def close_reason(data: bytes, start: int) -> tuple[int, str]:
    """Return the code and the text of a connection.close or channel.close.

    Parameters:
        start: the position of the method's arguments.
    """
    (code,) = SHORT.unpack_from(data, start)
    return code, text_at(data, start + 2)


def text_at(data: bytes, start: int) -> str:
    """Return the short string at a position."""
    return data[start + 1 : start + 1 + data[start]].decode("utf-8", "replace")
