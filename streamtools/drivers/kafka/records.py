"""Messages as Kafka records, and back.

A message's key is the record's key, its time the record's timestamp. The rest stands in headers, with the names of
the CloudEvents 1.0 Kafka binding in binary mode (`ce_id`, `ce_type`, ..., `content-type`). A user header with such a
name gets the prefix `streamtools-user-`.

Other programs write headers that are no text: values of any bytes, null, or one name several times. A handler sees
them as text (`\\xff` for a byte that is no UTF-8, nothing for null, several values joined by commas). A copy of the
message has the original bytes, unless somebody has changed that text. Kafka's clients write header names in UTF-8
only: a name of other bytes becomes `\\xff...` in the first copy.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, NamedTuple

from aiokafka import TopicPartition

from streamtools.delivery import read_message
from streamtools.drivers.kafka.client.limits import MOST_HEADERS, UNREAD
from streamtools.errors import DecodeError
from streamtools.message import NO_HEADERS, LazyMessage, Message, setters
from streamtools.text.bounded_cache import BoundedCache
from streamtools.wire import (
    ATTEMPT,
    ERROR_ATTEMPTS,
    ERROR_TEXT,
    ERROR_TIMES,
    KEY_BYTES,
    TEXT,
    TIMES,
    VERSION,
    decode_meta,
    encode_meta,
    read_key,
    read_text,
    read_time,
    write_key,
)

PREFIX: Final = "ce_"
CONTENT_TYPE: Final = "content-type"
#: The prefix of a user header whose name would be taken for one of ours.
USER: Final = "streamtools-user-"
#: In a retry topic: the queue that the message belongs to.
QUEUE: Final = "streamtools-queue"
#: The group whose handler has rejected a message.
GROUP: Final = "streamtools-group"
#: The topic where retries of that group wait.
RETRIES: Final = "streamtools-retries"
#: Where a failed message was read first.
ORIGIN: Final = ("streamtools-origin-topic", "streamtools-origin-partition", "streamtools-origin-offset")
#: Bytes by which a copy may be larger than its message: why it failed, where it was read first, whose retry it is.
COPY_ROOM: Final = 64 * 1024
#: Characters at most of the reason why something was not read.
LONGEST_REASON: Final = 200
#: Digits of the largest offset, 2**63 - 1.
LONGEST_NUMBER: Final = 19
#: Seconds by which a message's time may differ from now and still be the record's timestamp. A copy of an older
#: message has its time in a header, because Kafka decides by the record's timestamp when to delete it.
RECENT: Final = 1.0

_NATIVE: Final = frozenset({"key", "content_type", "time"})
_TEXT: Final = {PREFIX + name: field for field, name in TEXT.items() if field != "key"} | {
    CONTENT_TYPE: "content_type"
}
_META: Final = frozenset(
    PREFIX + name
    for name in (*TIMES.values(), *ERROR_TEXT.values(), *ERROR_TIMES.values(), ATTEMPT, VERSION, ERROR_ATTEMPTS)
)
_IGNORED: Final = frozenset(PREFIX + name for name in ("specversion", TEXT["key"], KEY_BYTES, TEXT["content_type"]))
_SPECVERSION: Final = (PREFIX + "specversion", b"1.0")
#: Where the message's id stands.
ID: Final = PREFIX + TEXT["id"]

Header = tuple[str, bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed(Message):
    """A message for one given partition, or with a given timestamp.

    Attributes:
        partition: of its topic.
        timestamp: the record's, in seconds since the epoch.
    """

    partition: int | None = None
    timestamp: float | None = None

    @classmethod
    def of(cls, message: Message, partition: int | None, timestamp: float | None) -> Placed:
        """The same message, with partition and timestamp."""
        values = {f.name: getattr(message, f.name) for f in fields(Message)}
        return cls(**values, partition=partition, timestamp=timestamp)


class Origin(NamedTuple):
    """Where a message was read first, before any retry."""

    topic: str
    partition: int
    offset: int

    @property
    def headers(self) -> list[Header]:
        """The headers of a copy that say it."""
        return [(name, str(value).encode()) for name, value in zip(ORIGIN, self, strict=True)]


def encode_key(message: Message) -> bytes | None:
    """The record's key."""
    return None if message.key is None else write_key(message.key)


def encode_headers(message: Message, *, time_apart: bool, read: Iterable[Header] = ()) -> list[Header]:
    """The record's headers.

    Parameters:
        time_apart: the message's time is not the record's timestamp, and needs a header.
        read: the headers of the record that this is a copy of.
    """
    headers: list[Header] = []
    if message.type is not None and message.source is not None:  # else CloudEvents calls it no event
        headers.append(_SPECVERSION)
    if _is_plain(message) and not time_apart:
        headers.append((ID, _utf8(message.id)))
    else:
        skip = _NATIVE - {"time"} if time_apart else _NATIVE
        meta = encode_meta(message, prefix=PREFIX, skip=skip)
        headers += [(name, _utf8(value)) for name, value in meta.items()]
    if message.content_type is not None:
        headers.append((CONTENT_TYPE, _utf8(message.content_type)))
    if message.headers:
        headers += _user_headers(message.headers, _by_name(read))
    return headers


def timestamp(message: Message, now: float) -> tuple[int, bool]:
    """The record's timestamp in milliseconds, and whether the message's own time is another."""
    if message.time is not None and abs(now - message.time) <= RECENT:
        return int(message.time * 1000), False
    return int(now * 1000), message.time is not None


def decode_record(record: Any, place: TopicPartition, queue: str | None = None) -> Message:
    """The message of a record.

    Parameters:
        record: the client library's: offset, timestamp (in ms), key, value, headers.
        place: where it was read.
        queue: the message's queue; the topic when None.
    """
    _check_headers(record.headers)
    found: dict[str, Any] = {}
    meta: dict[str, str] = {}
    user: dict[str, str] = {}
    repeated: dict[str, list[str]] = {}
    for name, raw in record.headers:
        field = _TEXT.get(name)
        if field is not None:
            if raw is not None:
                found[field] = read_text(raw)
        elif name in _META:
            meta[name] = read_text(raw or b"")
        elif name not in _IGNORED and (own := _user_name(name)) is not None:
            value = read_text(raw or b"")
            if own in user:
                repeated.setdefault(own, [user[own]]).append(value)
            else:
                user[own] = value
    _join(user, repeated)
    if meta:
        found |= _decode_meta(meta, record)
    if not found.get("id"):
        found["id"] = id_of(place, record.offset)
    if record.timestamp is not None and record.timestamp >= 0:  # the oldest format has none
        found.setdefault("time", read_time(record.timestamp / 1000))
    return Message(
        body=record.value,
        queue=place.topic if queue is None else queue,
        key=None if record.key is None else read_key(record.key),
        headers=user or NO_HEADERS,
        **found,
    )


def _check_headers(headers: Sequence[Header]) -> None:
    """Check that there are not too many headers, and that none of them replaces what was not read.

    Raises:
        DecodeError: there are too many, or something was not read.
    """
    if not headers:
        return
    if len(headers) > MOST_HEADERS:
        raise DecodeError(f"it has {len(headers):,} headers, and {MOST_HEADERS:,} are read at most")
    name, why = headers[0]
    if name == UNREAD:
        raise DecodeError(read_text(why or b"")[:LONGEST_REASON])


def _join(headers: dict[str, str], repeated: Mapping[str, Sequence[str]]) -> None:
    """Set the values of repeated headers: all values of a name at once, as there may be very many."""
    for name, values in repeated.items():
        headers[name] = ", ".join(values)


def decode_plain(record: Any, place: TopicPartition) -> Message | None:
    """The message of a record with no other headers than id and content type; None for any other record."""
    headers, content_type = record.headers, None
    if headers:
        if not (len(headers) == 2 and headers[0][0] == ID and headers[1][0] == CONTENT_TYPE and headers[0][1]):
            return None
        told = headers[1][1]
        if told is not None and (content_type := _content_types[told]) is None:
            return None
    message = _new(Plain)
    _set_source(message, record if headers else (record, place))
    _set_body(message, record.value)
    _set_queue(message, place.topic)
    _set_content_type(message, content_type)
    return message


def _outside_envelope(told: bytes) -> str | None:
    """The content type; None if the body is an envelope, which contains the message's other fields."""
    return None if told[:23].lower() == b"application/cloudevents" else read_text(told)


_content_types: Final = BoundedCache(_outside_envelope)


class Plain(LazyMessage):
    """A message that has body, queue and content type; the rest is decoded when it is asked for.

    Its source is the record, together with the partition if the message's id is made from that.
    """

    __slots__ = ()

    # Asked of every message, and never set on this one: decoding all for it would take longer than its handler.
    deliver_at: float | None = None
    expires_at: float | None = None
    reply_to: str | None = None
    content_encoding: str | None = None
    expired = False
    enveloped = False

    def _all(self, source: Any) -> dict[str, Any]:
        record, place = source if isinstance(source, tuple) else (source, TopicPartition(self.queue, -1))
        message = decode_record(record, place)
        return {name: getattr(message, name) for name in ("body", "queue", "id", "time", "content_type", "key")}


def id_of(place: TopicPartition, offset: int) -> str:
    """The id of a message that came without one."""
    return f"{place.topic}-{place.partition}-{offset}"


_new: Final = Plain.__new__
_set_source, _set_body, _set_queue, _set_content_type = setters("body", "queue", "content_type")


def _decode_meta(meta: dict[str, str], record: Any) -> dict[str, Any]:
    found = decode_meta(meta, prefix=PREFIX)
    if "error" in found:
        found["error"] = replace(found["error"], place=_place(record))
    return found


def read_record(record: Any, place: TopicPartition, queue: str | None = None) -> tuple[Message, DecodeError | None]:
    """The message of a record, and the error if it cannot be decoded; this raises nothing."""
    return read_message(
        decode_record, record, place, queue, body=record.value, queue=queue or place.topic,
        id=id_of(place, record.offset), place=f"{place.topic}-{place.partition}, offset {record.offset}",
    )  # fmt: skip


def decode_origin(record: Any, place: TopicPartition) -> Origin:
    """Where the message of this record was read first."""
    return told_origin(record) or Origin(place.topic, place.partition, record.offset)


def told_origin(record: Any) -> Origin | None:
    """The same if the record is a copy, which tells it; else None."""
    found = header_texts(record.headers, ORIGIN)
    topic, partition, offset = (found.get(name, "") for name in ORIGIN)
    if topic and _is_number(partition) and _is_number(offset):
        return Origin(topic, int(partition), int(offset))
    return None


def _is_number(text: str) -> bool:
    """A number that can be an offset: other programs may write digits of any script and length."""
    return text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER


def _place(record: Any) -> str:
    origin = told_origin(record)
    return "" if origin is None else f"partition {origin.partition}, offset {origin.offset}"


def header_texts(headers: Iterable[Header], names: Sequence[str]) -> dict[str, str]:
    """The headers of these names, as text."""
    return {name: read_text(raw) for name, raw in headers if name in names and raw is not None}


def _is_plain(message: Message) -> bool:
    return (
        message.attempt == 1
        and message.error is None
        and message.type is None
        and message.source is None
        and message.deliver_at is None
        and message.expires_at is None
        and message.correlation_id is None
        and message.causation_id is None
        and message.reply_to is None
        and message.intent is None
        and message.version is None
        and message.handler is None
        and message.content_encoding is None
    )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # the text of an exception may contain anything


def _user_headers(headers: Mapping[str, str], read: Mapping[str, Sequence[bytes | None]]) -> list[Header]:
    found: list[Header] = []
    for name, value in headers.items():
        there = read.get(name)
        if there is None or ", ".join(read_text(raw or b"") for raw in there) != value:
            there = (_utf8(value),)
        found += [(USER + name if _is_ours(name) else name, raw) for raw in there]
    return found


def _by_name(read: Iterable[Header]) -> dict[str, list[bytes | None]]:
    found: dict[str, list[bytes | None]] = {}
    for name, raw in read:
        if (own := _user_name(name)) is not None:
            found.setdefault(own, []).append(raw)
    return found


def _is_ours(name: str) -> bool:
    return name.startswith((PREFIX, "streamtools-")) or name == CONTENT_TYPE


def _user_name(name: str) -> str | None:
    """The name of a header as users see it; None for one of ours."""
    if not name.startswith("streamtools-"):
        return name
    return name.removeprefix(USER) if name.startswith(USER) else None


def now_ms() -> int:
    """The time now, in milliseconds since the epoch."""
    return int(time.time() * 1000)
