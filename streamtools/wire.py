"""Metadata as text: the CloudEvents 1.0 names for what travels beside a body.

A driver puts what its protocol has a native place for there, and the rest under these names with
a prefix of its own (`ce-` on HTTP, `ce_` on Kafka, `streamtools-` on AMQP). Names follow the
CloudEvents 1.0 context attributes and its partitioning extension; attribute names there are
lower-case letters and digits only, hence no dots or dashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from streamtools.message import ErrorDetails, Message

#: Fields of Message that travel as text as they are.
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
    "key": "partitionkey",
}
#: Fields that are times: seconds since the epoch in a Message, RFC 3339 on the wire.
TIMES: Final = {"time": "time", "deliver_at": "deliverytime", "expires_at": "expirytime"}
#: Fields of ErrorDetails.
ERROR_TEXT: Final = {
    "queue": "errorqueue",
    "handler": "errorhandler",
    "exception": "errortype",
    "reason": "errormessage",
    "traceback": "errortraceback",
}
ERROR_TIMES: Final = {"first_failed": "errorfirst", "last_failed": "errorlast"}
ATTEMPT: Final = "attempt"
VERSION: Final = "dataversion"
ERROR_ATTEMPTS: Final = "errorattempts"


def to_rfc3339(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, in UTC with microseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_rfc3339(text: str) -> float | None:
    """RFC 3339, or a plain number of seconds, as seconds since the epoch; None when it is neither."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return _number(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def encode_meta(message: Message, *, prefix: str = "", skip: frozenset[str] = frozenset()) -> dict[str, str]:
    """The metadata of `message` as text, without what is unset.

    Parameters:
        prefix: goes before each name.
        skip: fields of Message that the protocol carries natively.
    """
    meta = {}
    for field, name in TEXT.items():
        if field not in skip and (value := getattr(message, field)) is not None:
            meta[prefix + name] = value
    for field, name in TIMES.items():
        if field not in skip and (seconds := getattr(message, field)) is not None:
            meta[prefix + name] = to_rfc3339(seconds)
    if message.attempt != 1:
        meta[prefix + ATTEMPT] = str(message.attempt)
    if message.version is not None:
        meta[prefix + VERSION] = str(message.version)
    if message.error is not None:
        meta.update(_encode_error(message.error, prefix))
    return meta


def _encode_error(error: ErrorDetails, prefix: str) -> dict[str, str]:
    meta = {prefix + name: getattr(error, field) for field, name in ERROR_TEXT.items() if getattr(error, field)}
    meta |= {prefix + name: to_rfc3339(getattr(error, field)) for field, name in ERROR_TIMES.items()}
    meta[prefix + ERROR_ATTEMPTS] = str(error.attempts)
    return meta


def decode_meta(meta: Mapping[str, str], *, prefix: str = "") -> dict[str, Any]:
    """The fields for `Message(...)` that stand in `meta`; what is malformed there is left out."""
    fields: dict[str, Any] = {f: meta[prefix + n] for f, n in TEXT.items() if prefix + n in meta}
    for field, name in TIMES.items():
        if (text := meta.get(prefix + name)) and (seconds := from_rfc3339(text)) is not None:
            fields[field] = seconds
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
    text: dict[str, Any] = {f: meta.get(prefix + n, "") for f, n in ERROR_TEXT.items()}
    times: dict[str, Any] = {f: from_rfc3339(meta.get(prefix + n, "")) or 0.0 for f, n in ERROR_TIMES.items()}
    attempts = _count(meta.get(prefix + ERROR_ATTEMPTS)) or 0
    return ErrorDetails(**text, **times, attempts=attempts)


def _count(text: str | None) -> int | None:
    # Not int(): that takes underscores, signs and digits of other scripts, at any length.
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 9 else None
