"""A Message as AMQP properties and headers, and back.

Native properties carry what AMQP has a place for; the rest of the metadata travels in headers named
`streamtools-...` (see `streamtools.wire`); user headers stand under their own names. The encoding is
that of the specification 0-9-1, section 4.2, with the type letters that RabbitMQ and every client
agree on (https://www.rabbitmq.com/amqp-0-9-1-errata, section 3).
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
#: Prefix for a user's header whose name AMQP or RabbitMQ would act upon.
ESCAPE: Final = PREFIX + "header-"
#: How the names of our queues begin that delayed messages pass through.
DELAY_PREFIX: Final = "streamtools.delay."
#: Bytes of x-death that say that a message was in a queue, and in one of those queues (two digits follow).
IN_QUEUE: Final = b"\x05queueS"
IN_DELAY: Final = IN_QUEUE + b"\x00\x00\x00\x14" + DELAY_PREFIX.encode()

#: How often a quorum queue has delivered a message before: the broker writes it on what it delivers again.
DELIVERY_COUNT: Final = "x-delivery-count"
#: The same from RabbitMQ 4 on, which also counts messages that were given back in order.
ACQUIRED_COUNT: Final = "x-acquired-count"

#: Headers that RabbitMQ itself reads or writes. A copied x-death makes the second trip through a
#: delay level vanish as a cycle, CC and BCC route copies (or close the channel): none is ever sent.
BROKER_HEADERS: Final = frozenset(
    {"cc", "bcc", "x-death", DELIVERY_COUNT, ACQUIRED_COUNT, "x-delay"}
    | {f"x-{which}-death-{what}" for which in ("first", "last") for what in ("reason", "queue", "exchange")}
)

# Flag bits, specification 0-9-1, section 4.2.6.1.
CONTENT_TYPE, CONTENT_ENCODING, HEADERS, DELIVERY_MODE, PRIORITY = 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11
CORRELATION_ID, REPLY_TO, EXPIRATION, MESSAGE_ID, TIMESTAMP = 1 << 10, 1 << 9, 1 << 8, 1 << 7, 1 << 6
TYPE, USER_ID, APP_ID, CLUSTER_ID = 1 << 5, 1 << 4, 1 << 3, 1 << 2
#: Fields that AMQP has a property for, where they are short enough.
NATIVE: Final = frozenset(
    {"id", "type", "source", "content_type", "content_encoding", "correlation_id", "reply_to", "time"}
)
#: (flag, encoding, our field), in the order of the specification; a property without a field of ours is skipped.
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
#: That there is a priority, in the first octet of the flags.
_FIRST_PRIORITY: Final = PRIORITY >> 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Prioritized(Message):
    """A message that came with a priority. Its copies are sent with the same priority.

    Attributes:
        priority: 1 to 255. 0 is the same as none.
    """

    priority: int


def _single(text: str) -> bytes:
    """A short string; empty when it is not short."""
    data = text.encode()
    return bytes((len(data),)) + data if len(data) <= 255 else b""


#: A short string that most messages share: a type, a source.
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
    """The flags and values of a message's content header.

    Raises:
        Unsendable: a header's name is over 255 bytes, or a text is no valid Unicode.
    """
    try:
        return _encode(message)
    except UnicodeEncodeError as error:
        raise Unsendable(f"its metadata holds a lone surrogate, which no wire carries: {error.reason}.") from None


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
    """Flags and values of these properties; the names of those over 255 bytes are added to `long`."""
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
    """The headers as a field table: the user's own, then ours."""
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
    """The message, and the broker's delivery count (0 where it sent none).

    It never fails, whatever a sender may write: each field is read by itself, and what cannot be read is left out.

    Parameters:
        data: flags and values of the content header.
        new_id: gives an id to a message that came without one.
        topic: what another program published it under. Our own messages name their topic in a header, and so do
            their copies.
        redelivered: the broker has delivered it before. If not, a count in its headers was copied from another queue,
            and is ignored.
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
    """The properties of a content header with these flags, in order: (flag, encoding, our field)."""
    return tuple((flag, how, name) for flag, how, name in _LAYOUT if flags & flag)


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The native properties by our field names, and the encoded headers; both end where the data is malformed.

    This does the same as `places` without a generator, because it runs for every message that is received.
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
    """Each property of a content header, up to where the header is malformed.

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
    """The priority in a content header; 0 where it has none."""
    return next((data[start] for flag, _, _, start, _ in places(data) if flag == PRIORITY), 0)


def _sort(table: bytes) -> tuple[dict[str, str], dict[str, str], int, object]:
    """The user's headers, ours, the delivery count and x-death, up to the first entry whose end is unknown."""
    headers: dict[str, str] = {}
    ours: dict[str, str] = {}
    others: dict[str, object] = {}
    position, end = 0, len(table)
    try:
        while position < end:
            start = position + 1
            begin = start + table[position]
            is_text = table[begin] == STRING  # as nearly every header is
            position = begin + 5 + LONG.unpack_from(table, begin + 1)[0] if is_text else end_of(table, begin)
            if position > end:
                break
            name = name_text(table[start:begin])
            if is_text:
                value: object = table[begin + 5 : position].decode("utf-8", "backslashreplace")
            elif name == "x-death" and _only_delayed(table[begin + 5 : position]):
                continue  # to decode the deaths of a message that was only delayed would take longer than all else
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
    """The broker has done nothing with the message but hold it until it was due."""
    return array.count(IN_QUEUE) == array.count(IN_DELAY)


def _death(deaths: object) -> ErrorDetails | None:
    """Why the broker itself dead-lettered the message; passing through our delay queues does not count."""
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


# --- what is published again as it came -----------------------------------------------------------------


def without_counts(data: bytes, *, user: str | None = None, routed: bool = True) -> bytes:
    """The content header for publishing a message again, without what the broker has written into it.

    Parameters:
        data: flags and values, as they came.
        user: who publishes; the broker refuses a message that names somebody else (user_id).
        routed: keep CC, by which the broker would route copies.
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
