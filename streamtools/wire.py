"""Writes and reads the metadata of messages as text, under the names of CloudEvents 1.0.

If a protocol has a field of its own for some metadata, the driver uses that field. It sends all other metadata under
these names with a prefix (`ce-` on HTTP, `ce_` on Kafka, `streamtools-` on AMQP). The names are the context
attributes of CloudEvents 1.0 and of its partitioning extension, and follow its rule: lower-case letters and digits
only, no dots or dashes.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from streamtools.message import ErrorDetails, Message
from streamtools.validation.checks import check_texts

#: Fields of Message that are sent as they are: field -> name on the wire.
TEXT: Final = {
    "id": "id",
    "type": "type",
    "source": "source",
    "content_type": "datacontenttype",
    "content_encoding": "datacontentencoding",
    "correlation_id": "correlationid",
    "causation_id": "causationid",
    "reply_to": "replyto",
    "intent": "intent",
    "handler": "handler",
    "topic": "topic",
    "key": "partitionkey",
}
#: A key that is not text is sent under this name, in base64, and not as `partitionkey`.
KEY_BYTES: Final = "partitionkeybytes"
#: Fields that are times: a Message has seconds since the epoch, the wire has RFC 3339.
TIMES: Final = {"time": "time", "deliver_at": "deliverytime", "expires_at": "expirytime"}
#: Fields of ErrorDetails.
ERROR_TEXT: Final = {
    "queue": "errorqueue",
    "handler": "errorhandler",
    "exception": "errortype",
    "reason": "errormessage",
    "traceback": "errortraceback",
    "omitted": "erroromitted",
}
ERROR_TIMES: Final = {"first_failed": "errorfirst", "last_failed": "errorlast"}
ATTEMPT: Final = "attempt"
VERSION: Final = "dataversion"
ERROR_ATTEMPTS: Final = "errorattempts"
#: The first and the last whole second that RFC 3339 can name: the years 1 to 9999.
FIRST: Final = -62135596800.0
LAST: Final = 253402300799.0
#: A count that is greater than this is read as this.
MOST: Final = 999_999_999
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def to_rfc3339(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, in UTC with microseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_rfc3339(text: str) -> float | None:
    """Return the seconds since the epoch of a time in RFC 3339, or of a number of seconds; None for anything else.

    Also None for a time that could not be written again: see `read_time`.
    """
    if text[10:11] == "." and (seconds := read_time(text)) is not None:
        return seconds  # 1700000000.000000, as the AMQP driver writes it: quicker than to try a date first
    try:
        moment = datetime.fromisoformat(text)
        return read_time((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return read_time(text)


def read_time(value: object) -> float | None:
    """Return seconds since the epoch that another program wrote; None if that is not a time in the years 1 to 9999.

    So every time that was read can be written again. Milliseconds, NaN, infinity and the greatest date of another
    language are read as None.
    """
    if isinstance(value, bool):
        return None
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if FIRST <= seconds <= LAST else None  # false for NaN and infinity


def read_text(value: str | bytes) -> str:
    """Return a text that another program wrote, in a form that every protocol can carry.

    Bytes that are not UTF-8, and lone surrogates, are replaced by escapes such as `\\xff`.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if value.isascii() or _SURROGATE.search(value) is None:
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def read_key(value: bytes) -> str | bytes:
    """Return a key as a str if it is UTF-8 without control characters, else as bytes.

    `write_key` returns the same bytes for both.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value
    return value if _CONTROL.search(text) else text


def checked_key(key: object) -> str | bytes | None:
    """Return a user's key as the receiver will read it: bytes that are plain text become a str.

    Raises:
        TypeError: the key is neither str nor bytes, or holds a lone surrogate.
    """
    if isinstance(key, bytes):
        return read_key(key)
    check_texts({"key": key})
    return key  # type: ignore[return-value]


def write_key(key: str | bytes) -> bytes:
    """Return the bytes of a key."""
    return key if isinstance(key, bytes) else key.encode()


def key_text(key: str | bytes | None) -> str:
    """Return a key as a text to show or to compare: bytes as `0x...`, no key as an empty text."""
    return f"0x{key.hex()}" if isinstance(key, bytes) else key or ""


def encode_meta(message: Message, *, prefix: str = "", skip: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return the metadata of `message` as text, without fields that are not set.

    Parameters:
        prefix: goes before each name.
        skip: fields of Message that the protocol carries natively.
    """
    meta = {}
    for field, name in TEXT.items():
        if field not in skip and (value := getattr(message, field)) is not None:
            meta[prefix + name] = value
    if isinstance(message.key, bytes) and "key" not in skip:
        del meta[prefix + TEXT["key"]]
        meta[prefix + KEY_BYTES] = base64.b64encode(message.key).decode()
    for field, name in TIMES.items():
        if field not in skip and (seconds := getattr(message, field)) is not None:
            try:
                meta[prefix + name] = to_rfc3339(seconds)
            except (TypeError, ValueError, OverflowError, OSError):
                why = f"{field}={seconds!r} is no time of the years 1 to 9999, in seconds since the epoch"
                raise ValueError(why) from None
    if message.attempt != 1:
        meta[prefix + ATTEMPT] = str(message.attempt)
    if message.version is not None:
        meta[prefix + VERSION] = str(message.version)
    if message.error is not None:
        meta.update(_encode_error(message.error, prefix))
    return meta


def _encode_error(error: ErrorDetails, prefix: str) -> dict[str, str]:
    meta = {prefix + name: text for field, name in ERROR_TEXT.items() if (text := getattr(error, field))}
    meta[prefix + ERROR_TEXT["queue"]] = error.queue  # also if it is empty: by this name the details are found
    meta |= {prefix + name: to_rfc3339(getattr(error, field)) for field, name in ERROR_TIMES.items()}
    meta[prefix + ERROR_ATTEMPTS] = str(error.attempts)
    return meta


def decode_meta(meta: Mapping[str, str], *, prefix: str = "") -> dict[str, Any]:
    """Return the fields for `Message(...)` that `meta` contains; malformed values are left out."""
    texts, times = _by_name(prefix)
    fields: dict[str, Any] = {}
    others = False
    for name, text in meta.items():  # most messages have only one or two of the names
        if (field := texts.get(name)) is not None:
            fields[field] = read_text(text)
        elif (field := times.get(name)) is None:
            others = True
        elif text and (seconds := from_rfc3339(text)) is not None:
            fields[field] = seconds
    if others:
        fields.update(_decode_others(meta, prefix))
    return fields


@lru_cache(maxsize=16)
def _by_name(prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return two mappings, for texts and for times: name on the wire -> field of Message."""
    return {prefix + n: f for f, n in TEXT.items()}, {prefix + n: f for f, n in TIMES.items()}


def _decode_others(meta: Mapping[str, str], prefix: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if (key := _key_bytes(meta.get(prefix + KEY_BYTES))) is not None:
        fields["key"] = key
    if (attempt := _count(meta.get(prefix + ATTEMPT))) is not None:
        fields["attempt"] = max(1, attempt)
    if (version := _count(meta.get(prefix + VERSION))) is not None:
        fields["version"] = version
    if (error := _decode_error(meta, prefix)) is not None:
        fields["error"] = error
    return fields


def _decode_error(meta: Mapping[str, str], prefix: str) -> ErrorDetails | None:
    queue = meta.get(prefix + ERROR_TEXT["queue"])
    if queue is None:
        return None
    text: dict[str, Any] = {f: read_text(meta.get(prefix + n, "")) for f, n in ERROR_TEXT.items()}
    times: dict[str, Any] = {f: from_rfc3339(meta.get(prefix + n, "")) or 0.0 for f, n in ERROR_TIMES.items()}
    attempts = _count(meta.get(prefix + ERROR_ATTEMPTS)) or 0
    return ErrorDetails(**text, **times, attempts=attempts)


def _count(text: str | None) -> int | None:
    # int() alone would accept underscores, signs and digits of other scripts, at any length.
    return min(int(text), MOST) if text and text.isascii() and text.isdigit() and len(text) <= 18 else None


def _key_bytes(text: str | None) -> str | bytes | None:
    if text is None:
        return None
    try:
        return read_key(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error):  # it is not base64, or not ASCII
        return None
