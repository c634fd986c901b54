"""Messages to rows and back."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pydantic_core import from_json, to_json

from streamtools.delivery import unreadable
from streamtools.errors import DecodeError
from streamtools.exchange import Exchange
from streamtools.message import ErrorDetails, Message
from streamtools.wire import MOST, read_text, read_time

#: Fields of Message that are kept in `meta`, where they are set; the body has its own column and
#: the queue is the lane's.
FIELDS: Final = (
    "id", "type", "source", "time", "content_type", "content_encoding", "correlation_id", "causation_id",
    "reply_to", "intent", "key", "handler", "topic", "version", "deliver_at", "expires_at",
)  # fmt: skip
#: In `meta` instead of the key, where it is no text: the key in base64.
KEY_BYTES: Final = "key_bytes"
#: In `meta` beside them: the lane that a message in an error queue failed in, for its way back.
ORIGIN: Final = "origin"


@dataclass(slots=True)
class Row:
    """A message ready to be written.

    Attributes:
        queue: its target.
        key: for order by key.
        due: when it may be delivered, in seconds since the epoch; None for at once.
        meta: JSON.
        body: the payload.
        id: the message's id, for errors.
        exchange: where it goes by its topic, which then is `queue`.
        mandatory: that it reaches no queue is an error.
        clash: the type that its exchange has instead of the one asked for.
        lane: the one lane that it goes to; all lanes of the queue when None.
    """

    queue: str
    key: str | bytes | None
    due: float | None
    meta: str
    body: bytes
    id: str
    exchange: Exchange | None = None
    mandatory: bool = True
    lane: int | None = None
    clash: str | None = None

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.body) + len(self.meta)


def encode(message: Message, *, lane: int | None = None, origin: int | None = None) -> Row:
    """The row of a message.

    Parameters:
        lane: the one lane that it goes to.
        origin: the lane that it failed in.

    Raises:
        ValueError: a text in it has no UTF-8 form, or it has no body.
    """
    if message.body is None:
        raise ValueError("a message without a body (a tombstone) has no place in SQLite; kafka:// has them")
    fields: dict[str, Any] = {}
    for name in FIELDS:
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if isinstance(message.key, bytes):
        del fields["key"]
        fields[KEY_BYTES] = b64encode(message.key).decode()
    if message.attempt != 1:
        fields["attempt"] = message.attempt
    if message.headers:
        fields["headers"] = dict(message.headers)
    if message.error is not None:
        fields["error"] = asdict(message.error)
    if origin is not None:
        fields[ORIGIN] = origin
    meta = to_json(fields).decode()
    return Row(
        message.queue, message.key, message.deliver_at, meta, message.body, message.id, message.exchange,
        message.mandatory, lane,
    )  # fmt: skip


@dataclass(slots=True)
class Claimed:
    """What a claim took, still as it came from the file: decoded outside the database thread.

    Attributes:
        claim: the number of the claim.
        lane: where from.
        ids: row ids.
        counts: deliveries before without a verdict.
        sizes: lengths of the bodies.
        parts: lengths of the metadata, as a JSON array.
        meta: that of all, JSON each, with a comma between.
        bodies: all bodies, one after the other.
    """

    claim: int
    lane: int
    ids: list[int]
    counts: list[int]
    sizes: list[int]
    parts: str
    meta: bytes
    bodies: bytes

    def keep(self, number: int) -> None:
        """Let go of all but the first `number`. The ids are in order; so is the rest."""
        del self.ids[number:], self.counts[number:]

    def messages(self, queue: str) -> Iterator[tuple[Message, DecodeError | None, int | None]]:
        """Each message, what is wrong with it, and the lane that it failed in, if it did."""
        end = 0
        bodies = self.bodies
        for row, fields, size in zip(self.ids, self._fields(), self.sizes):  # noqa: B905 - ids may be fewer
            start, end = end, end + size
            body = bodies[start:end]
            try:
                message, lane, trouble = *_message(queue, row, fields, body), None
            except Exception as error:  # whatever is wrong in it, it is this message's alone
                name, place = _name(queue, row), f"row {row} of {queue!r}"
                message, trouble = unreadable(error, body=body, queue=queue, id=name, place=place)
                lane = None
            yield message, trouble, lane

    def _fields(self) -> Sequence[Any]:
        """The metadata of each: a dict, or the bytes of what is none."""
        number = len(self.sizes)
        try:
            found = from_json(b"[%b]" % self.meta)
        except ValueError:
            found = []
        if len(found) == number:
            return found  # type: ignore[no-any-return]
        # One that is no JSON, which somebody else has written, makes the array none.
        place, each = 0, []
        for size in from_json(self.parts):
            each.append(_alone(self.meta[place : place + size]))
            place += size + 1
        return each


def _alone(meta: bytes) -> Any:
    try:
        return from_json(meta)
    except ValueError:
        return meta


def _message(queue: str, row: int, fields: Any, body: bytes) -> tuple[Message, int | None]:
    """The message of a row, and the lane that it failed in, if it did.

    Raises:
        ValueError: the metadata are no JSON object.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"its meta is no JSON object: {fields!r:.80}")
    found: dict[str, Any] = {}
    for field, value in fields.items():
        read = _READ.get(field)
        if read is not None and (value := read(value)) is not None:
            found[field] = value
    if "id" not in found:
        found["id"] = _name(queue, row)
    if KEY_BYTES in fields:
        found["key"] = b64decode(fields[KEY_BYTES])
    origin = fields.get(ORIGIN)
    return Message(body=body, queue=queue, **found), origin if isinstance(origin, int) else None


def _name(queue: str, row: int) -> str:
    """The id of a message that came without one."""
    return f"{queue}-{row}"


def _text(value: object) -> str | None:
    return read_text(value) if isinstance(value, str) and value else None


def _some_text(value: object) -> str | None:
    return read_text(value) if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return max(0, min(value, MOST)) if type(value) is int else None


def _attempt(value: object) -> int:
    return max(1, _count(value) or 1)


def _headers(value: object) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    return {read_text(name): read_text(text) for name, text in value.items() if isinstance(text, str)}


def _error(value: object) -> ErrorDetails | None:
    if not isinstance(value, dict) or not isinstance(value.get("queue"), str):
        return None
    read = {name: _READ_ERROR[name](part) for name, part in value.items() if name in _READ_ERROR}
    return ErrorDetails(**{name: part for name, part in read.items() if part is not None})


#: How each field is read; what is none of its kind is left out.
_READ: Final[dict[str, Callable[[object], Any]]] = {
    **dict.fromkeys(FIELDS, _some_text),
    **dict.fromkeys(("time", "deliver_at", "expires_at"), read_time),
    "id": _text, "version": _count, "attempt": _attempt, "headers": _headers, "error": _error,
}  # fmt: skip
_READ_ERROR: Final[dict[str, Callable[[object], Any]]] = {
    **dict.fromkeys(("queue", "handler", "exception", "reason", "traceback", "place", "omitted"), _some_text),
    "attempts": _count, "first_failed": read_time, "last_failed": read_time,
}  # fmt: skip


def ids_json(ids: Sequence[int]) -> str:
    """Row ids as one SQL parameter."""
    return "[" + ",".join(map(str, ids)) + "]"
