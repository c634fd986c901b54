"""Writes a Message as AMQP properties and headers, and reads it.

Fields for which AMQP has a property are sent as that property. All other metadata are sent in headers named
`streamtools-...` (see `streamtools.wire`), and user headers under their own names. The encoding follows the
specification 0-9-1, section 4.2, with the type letters that RabbitMQ and all clients agree on
(https://www.rabbitmq.com/amqp-0-9-1-errata, section 3).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, Final

from streamtools import wire
from streamtools.drivers.rabbitmq.amqp.fields import STRING, as_text, end_of, name_text
from streamtools.drivers.rabbitmq.amqp.fields import entries as field_entries
from streamtools.drivers.rabbitmq.amqp.fields import value as field_value
from streamtools.drivers.rabbitmq.amqp.frames import LONG, LONGLONG, SHORT, Unsendable, shortstr
from streamtools.message import NO_HEADERS, ErrorDetails, Message
from streamtools.text.bounded_cache import BoundedCache

PREFIX: Final = "streamtools-"
TIME: Final = PREFIX + wire.TIMES["time"]
#: Prefix for a user's header whose name has a meaning for AMQP or RabbitMQ.
ESCAPE: Final = PREFIX + "header-"
#: The queues through which our delayed messages pass have names that begin with this.
DELAY_PREFIX: Final = "streamtools.delay."
#: The bytes in x-death for "was in a queue", and for "was in one of our delay queues" (two digits follow).
IN_QUEUE: Final = b"\x05queueS"
IN_DELAY: Final = IN_QUEUE + b"\x00\x00\x00\x14" + DELAY_PREFIX.encode()

#: How often a quorum queue has delivered a message before; the broker adds this header to redeliveries.
DELIVERY_COUNT: Final = "x-delivery-count"
#: From RabbitMQ 4 on: the same, but it also counts messages that were given back in order.
ACQUIRED_COUNT: Final = "x-acquired-count"

#: Headers that RabbitMQ itself reads or writes; we never send them. With a copied x-death, RabbitMQ would drop a
#: message at its second delay, because it believes that the message goes in a circle. CC and BCC make it route
#: copies, or close the channel.
BROKER_HEADERS: Final = frozenset(
    {"cc", "bcc", "x-death", DELIVERY_COUNT, ACQUIRED_COUNT, "x-delay"}
    | {f"x-{which}-death-{what}" for which in ("first", "last") for what in ("reason", "queue", "exchange")}
)

# Flag bits, specification 0-9-1, section 4.2.6.1.
CONTENT_TYPE, CONTENT_ENCODING, HEADERS, DELIVERY_MODE, PRIORITY = 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11
CORRELATION_ID, REPLY_TO, EXPIRATION, MESSAGE_ID, TIMESTAMP = 1 << 10, 1 << 9, 1 << 8, 1 << 7, 1 << 6
TYPE, USER_ID, APP_ID, CLUSTER_ID = 1 << 5, 1 << 4, 1 << 3, 1 << 2
#: Fields for which AMQP has a property, if their values are short enough.
NATIVE: Final = frozenset(
    {"id", "type", "source", "content_type", "content_encoding", "correlation_id", "reply_to", "time"}
)
#: (flag, encoding, our field), in the order of the specification; properties for which we have no field are skipped.
_LAYOUT: Final = (
    (CONTENT_TYPE, "text", "content_type"),
    (CONTENT_ENCODING, "text", "content_encoding"),
    (HEADERS, "table", ""),
    (DELIVERY_MODE, "octet", ""),
    (PRIORITY, "octet", ""),
    (CORRELATION_ID, "text", "correlation_id"),
    (REPLY_TO, "text", "reply_to"),
    (EXPIRATION, "text", ""),
    (MESSAGE_ID, "text", "id"),
    (TIMESTAMP, "time", "time"),
    (TYPE, "text", "type"),
    (USER_ID, "text", ""),
    (APP_ID, "text", "source"),
    (CLUSTER_ID, "text", ""),
)
_PERSISTENT: Final = b"\x02"
#: The bit in the first octet of the flags for "has a priority".
_FIRST_PRIORITY: Final = PRIORITY >> 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Prioritized(Message):
    """A message that came with a priority. Its copies are sent with the same priority.

    Attributes:
        priority: 1 to 255; 0 is the same as no priority.
    """

    priority: int


def _single(text: str) -> bytes:
    """Return a short string with its length; empty bytes if the text is over 255 bytes."""
    data = text.encode()
    return bytes((len(data),)) + data if len(data) <= 255 else b""


#: `_single` with a cache, for texts that many messages share: a type, a source.
_repeated: Final[Callable[[str], bytes]] = BoundedCache(_single).__getitem__


#: Native text properties in the order of the specification, before and after the delivery mode.
_FRONT: Final[tuple[tuple[str, int, Callable[[str], bytes]], ...]] = (
    ("content_type", CONTENT_TYPE, _repeated),
    ("content_encoding", CONTENT_ENCODING, _repeated),
)
_MIDDLE: Final[tuple[tuple[str, int, Callable[[str], bytes]], ...]] = (
    ("correlation_id", CORRELATION_ID, _single),
    ("reply_to", REPLY_TO, _single),
    ("id", MESSAGE_ID, _single),
)
_BACK: Final[tuple[tuple[str, int, Callable[[str], bytes]], ...]] = (
    ("type", TYPE, _repeated),
    ("source", APP_ID, _repeated),
)


def encode(message: Message) -> bytes:
    """Return the flags and values of a message's content header.

    Raises:
        Unsendable: the name of a header is over 255 bytes, or a text is not valid Unicode.
    """
    try:
        return _encode(message)
    except UnicodeEncodeError as error:
        raise Unsendable(f"its metadata holds a lone surrogate, which cannot be sent: {error.reason}.") from None


def _encode(message: Message) -> bytes:
    long: list[str] = []
    flags, front = _texts(message, _FRONT, long)
    more, middle = _texts(message, _MIDDLE, long)
    last, back = _texts(message, _BACK, long)
    flags |= more | last | DELIVERY_MODE
    if type(message) is Prioritized:
        flags |= PRIORITY
        middle.insert(0, bytes((message.priority,)))
    if message.time is not None and 0 <= message.time < 1 << 63:
        flags |= TIMESTAMP
        middle.append(LONGLONG.pack(int(message.time)))
    if headers := _headers(message, long):
        flags |= HEADERS
        front.append(headers)
    return b"".join((SHORT.pack(flags), *front, _PERSISTENT, *middle, *back))


def _texts(
    message: Message, properties: tuple[tuple[str, int, Callable[[str], bytes]], ...], long: list[str]
) -> tuple[int, list[bytes]]:
    """Return the flags and values of these properties; add the names of those over 255 bytes to `long`."""
    flags, values = 0, []
    for name, flag, make in properties:
        if (value := getattr(message, name)) is None:
            continue
        if data := make(value):
            flags |= flag
            values.append(data)
        else:
            long.append(name)
    return flags, values


def _headers(message: Message, long: list[str]) -> bytes:
    """Return the headers as a field table: first those of the user, then ours."""
    items: list[bytes] = []
    for name, value in message.headers.items():
        lower = name.lower()
        if lower not in BROKER_HEADERS:
            items.append(_field(name, value))
        else:
            items.append(_field(ESCAPE + name, value))
    if message.time is not None:
        # The property holds whole seconds only.
        items.append(_repeated(TIME) + _longstr(f"{message.time:.6f}"))
    if _has_more(message) or long:
        meta = wire.encode_meta(message, prefix=PREFIX, skip=NATIVE - frozenset(long))
        items += [_field(name, value) for name, value in meta.items()]
    if not items:
        return b""
    table = b"".join(items)
    return LONG.pack(len(table)) + table


def _has_more(message: Message) -> bool:
    return (
        message.attempt != 1
        or message.error is not None
        or message.key is not None
        or message.handler is not None
        or message.topic is not None
        or message.version is not None
        or message.intent is not None
        or message.causation_id is not None
        or message.deliver_at is not None
        or message.expires_at is not None
    )


def _field(name: str, value: str) -> bytes:
    return shortstr(name) + _longstr(value)


def _longstr(value: str) -> bytes:
    data = value.encode()
    return b"S" + LONG.pack(len(data)) + data


# --- reading ----------------------------------------------------------------------------------------


def decode(
    data: bytes,
    body: bytes,
    queue: str,
    new_id: Callable[[], str],
    *,
    topic: str | None = None,
    redelivered: bool = True,
) -> tuple[Message, int]:
    """Return the message, and the broker's delivery count (0 if it sent none).

    This never fails, whatever a sender writes: each field is read by itself, and a field that cannot be read is left
    out.

    Parameters:
        data: flags and values of the content header.
        new_id: makes an id for a message without one.
        topic: the routing key under which another program published the message. Our own messages and their copies
            name their topic in a header.
        redelivered: whether the broker has delivered the message before. If not, a count in its headers was copied
            from another queue, and is ignored.
    """
    fields, table = _split(data)
    headers, ours, count, deaths = _sort(table)
    if ours:
        fields.update(wire.decode_meta(ours, prefix=PREFIX))
    if deaths is not None and "error" not in fields and (error := _death(deaths)) is not None:
        fields["error"] = error
    if not fields.get("id"):
        fields["id"] = new_id()
    if topic is not None:
        fields.setdefault("topic", topic)
    if data and data[0] & _FIRST_PRIORITY and (priority := _priority(data)):
        make: Callable[..., Message] = partial(Prioritized, priority=priority)
    else:
        make = Message
    message = make(body=body, queue=queue, headers=headers or NO_HEADERS, **fields)
    return message, count if redelivered else 0


@lru_cache(maxsize=256)
def _layout(flags: int) -> tuple[tuple[int, str, str], ...]:
    """Return the properties of a content header with these flags, in order: (flag, encoding, our field)."""
    return tuple((flag, how, name) for flag, how, name in _LAYOUT if flags & flag)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the properties by our field names, and the encoded headers; both end where the data is malformed.

    This does the same as `places`, but without a generator, because it runs for every message that is received.
    """
    fields: dict[str, Any] = {}
    table = b""
    end, size = 2, len(data)
    try:
        for _, how, name in _layout(*SHORT.unpack_from(data)):
            start = end
            if how == "text":
                end = start + 1 + data[start]
                if name and end <= size:
                    fields[name] = data[start + 1 : end].decode("utf-8", "backslashreplace")
            elif how == "table":
                end = start + 4 + LONG.unpack_from(data, start)[0]
                if end <= size:
                    table = data[start + 4 : end]
            elif how == "octet":
                end = start + 1
            else:
                end = start + 8
                if (seconds := wire.read_time(LONGLONG.unpack_from(data, start)[0])) is not None:
                    fields[name] = seconds
            if end > size:
                break
    except (IndexError, struct.error):
        pass
    return fields, table


def places(data: bytes) -> Iterator[tuple[int, str, str, int, int]]:
    """Yield each property of a content header, up to where the header is malformed.

    Yields:
        flag, encoding, our field, begin and end.
    """
    position = 2
    try:
        for flag, how, name in _layout(*SHORT.unpack_from(data)):
            if how == "text":
                end = position + 1 + data[position]
            elif how == "table":
                end = position + 4 + LONG.unpack_from(data, position)[0]
            else:
                end = position + (1 if how == "octet" else 8)
            if end > len(data):
                return
            yield flag, how, name, position, end
            position = end
    except (IndexError, struct.error):
        return


def _priority(data: bytes) -> int:
    """Return the priority in a content header; 0 if it has none."""
    return next((data[start] for flag, _, _, start, _ in places(data) if flag == PRIORITY), 0)


def _sort(table: bytes) -> tuple[dict[str, str], dict[str, str], int, object]:
    """Return the user's headers, ours, the delivery count and x-death, up to the first malformed entry."""
    headers: dict[str, str] = {}
    ours: dict[str, str] = {}
    others: dict[str, object] = {}
    position, end = 0, len(table)
    try:
        while position < end:
            start = position + 1
            begin = start + table[position]
            is_text = table[begin] == STRING  # nearly every header is
            position = begin + 5 + LONG.unpack_from(table, begin + 1)[0] if is_text else end_of(table, begin)
            if position > end:
                break
            name = name_text(table[start:begin])
            if is_text:
                value: object = table[begin + 5 : position].decode("utf-8", "backslashreplace")
            elif name == "x-death" and _only_delayed(table[begin + 5 : position]):
                continue  # decoding the deaths of a message that was only delayed would take longer than all else
            else:
                value = field_value(table, begin, position)
            if name.startswith(PREFIX):
                if name.startswith(ESCAPE):
                    headers[name[len(ESCAPE) :]] = as_text(value)
                else:
                    ours[name] = as_text(value)
            elif name.lower() in BROKER_HEADERS:
                others[name] = value
            else:
                headers[name] = as_text(value)
    except (IndexError, ValueError, struct.error):
        pass
    return headers, ours, _count(others.get(DELIVERY_COUNT)), others.get("x-death")


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) and not isinstance(value, bool) else 0


def _only_delayed(array: bytes) -> bool:
    """Whether all deaths of a message happened in our delay queues, so that it was only delayed."""
    return array.count(IN_QUEUE) == array.count(IN_DELAY)


def _death(deaths: object) -> ErrorDetails | None:
    """Return why the broker itself dead-lettered the message; None if it only passed through our delay queues."""
    for death in deaths if isinstance(deaths, list) else ():
        if not isinstance(death, Mapping):
            continue
        queue = as_text(death.get("queue", ""))
        if queue and not queue.startswith(DELAY_PREFIX):
            return _details(queue, death)
    return None


def _details(queue: str, death: Mapping[str, Any]) -> ErrorDetails:
    reason = as_text(death.get("reason", "unknown"))
    when = death.get("time")
    number = death.get("count")
    seconds = (wire.read_time(when.timestamp()) if isinstance(when, datetime) else None) or 0.0
    return ErrorDetails(
        queue=queue,
        reason=f"the broker moved it here from {queue!r}: {_REASONS.get(reason, reason)}",
        attempts=min(max(0, number), wire.MOST) if isinstance(number, int) else 0,
        first_failed=seconds,
        last_failed=seconds,
    )


#: https://www.rabbitmq.com/docs/dlx
_REASONS: Final = {
    "rejected": "a consumer rejected it (rejected)",
    "expired": "its time to live was over (expired)",
    "maxlen": "the queue was full (maxlen)",
    "delivery_limit": "it was redelivered more often than the queue allows (delivery_limit)",
}


# --- messages that are published again unchanged --------------------------------------------------------


def without_counts(data: bytes, *, user: str | None = None, routed: bool = True) -> bytes:
    """Return the content header for publishing a message again, without the counts that the broker has added.

    Parameters:
        data: flags and values, as they were received.
        user: the user who publishes; the broker refuses a message that names another user (user_id).
        routed: whether to keep the header CC, by which the broker routes copies.
    """
    dropped = {DELIVERY_COUNT.encode(), ACQUIRED_COUNT.encode()} | (set() if routed else {b"CC"})
    flags = SHORT.unpack_from(data)[0]
    parts: list[bytes] = []
    for flag, how, _, start, end in places(data):
        part = data[start:end]
        if flag == USER_ID and part[1:] != (user or "").encode():
            flags &= ~flag
            continue
        if how == "table":
            table = _kept(part[4:], dropped)
            if not table:
                flags &= ~flag
                continue
            part = LONG.pack(len(table)) + table
        parts.append(part)
    return SHORT.pack(flags) + b"".join(parts)


def _kept(table: bytes, dropped: set[bytes]) -> bytes:
    kept: list[bytes] = []
    with suppress(ValueError, IndexError):  # malformed from there on
        for start, value, end in field_entries(table):
            if table[start + 1 : value] not in dropped:
                kept.append(table[start:end])
    return b"".join(kept)
