"""Messages to rows and back.

Other programs may have written any row: each is read for itself, and what is wrong in one is that one's alone.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from pydantic_core import CoreSchema, SchemaValidator, ValidationError, core_schema, from_json, to_json

from streamtools.delivery import read_message
from streamtools.errors import DecodeError
from streamtools.exchange import Exchange
from streamtools.message import Drafts, ErrorDetails, Message
from streamtools.wire import FIRST, LAST, MOST

#: Fields of Message that are kept in `meta`, where they are set; the body has its own column and
#: the queue is the lane's.
FIELDS: Final = (
    "id", "type", "source", "time", "content_type", "content_encoding", "correlation_id", "causation_id",
    "reply_to", "intent", "key", "handler", "topic", "version", "deliver_at", "expires_at",
)  # fmt: skip
#: How `meta` begins.
_HEAD: Final = '{"id":'
#: In `meta` instead of the key, where it is no text: the key in base64.
KEY_BYTES: Final = "key_bytes"
#: In `meta` beside them: the lane that a message in an error queue failed in, for its way back.
ORIGIN: Final = "origin"
#: Stands between the `meta` of rows that are read together: no JSON has it.
BETWEEN: Final = "\x1e"
_BETWEEN: Final = BETWEEN.encode()
#: Instead of it each row stands in an array of its own, and on a line of its own: neither the end of a string that is
#: missing in one nor a bracket too many reaches into the next without being seen.
_BROKEN_ARRAYS: Final = b"],\n["


def _object(fields: Mapping[str, CoreSchema]) -> CoreSchema:
    return core_schema.typed_dict_schema(
        {n: core_schema.typed_dict_field(kind, required=n in ("id", "queue")) for n, kind in fields.items()}
    )


_TEXT: Final = core_schema.str_schema(strict=True)
_TIME: Final = core_schema.float_schema(strict=True, ge=FIRST, le=LAST, allow_inf_nan=False)
_COUNT: Final = core_schema.int_schema(strict=True, ge=0, le=MOST)
_BASE64: Final = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
#: ErrorDetails as `meta` has them.
_ERROR_FIELDS: Final[Mapping[str, CoreSchema]] = {
    **dict.fromkeys(("queue", "handler", "exception", "reason", "traceback", "omitted", "place"), _TEXT),
    **dict.fromkeys(("first_failed", "last_failed"), _TIME),
    "attempts": _COUNT,
}
_TIMES: Final = frozenset({"time", "deliver_at", "expires_at", "first_failed", "last_failed"})
#: `meta` as we write it.
_META_FIELDS: Final[Mapping[str, CoreSchema]] = {
    **dict.fromkeys(FIELDS, _TEXT),
    **dict.fromkeys(("time", "deliver_at", "expires_at"), _TIME),
    **dict.fromkeys(("version", ORIGIN), _COUNT),
    "id": core_schema.str_schema(strict=True, min_length=1),
    "attempt": core_schema.int_schema(strict=True, ge=1, le=MOST),
    KEY_BYTES: core_schema.str_schema(strict=True, pattern=f"^{_BASE64}$"),
    "headers": core_schema.dict_schema(_TEXT, _TEXT),
    "error": _object(_ERROR_FIELDS),
}
#: All rows of a claim at once: as fast as reading them as plain data.
_METAS: Final = SchemaValidator(
    core_schema.list_schema(core_schema.tuple_schema([_object(_META_FIELDS)], strict=False))
)


@dataclass(slots=True, eq=False)
class Target:
    """Where rows go, and when; one for all messages that are sent together and differ in body and id alone.

    Attributes:
        queue: the queue, or the topic where there is an exchange.
        key: for order by key.
        due: when it may be delivered, in seconds since the epoch; None for at once.
        exchange: where it goes by its topic.
        mandatory: that it reaches no queue is an error.
        lane: the one lane that it goes to; all lanes of the queue when None.
        clash: the type that its exchange has instead of the one asked for.
    """

    queue: str
    key: str | bytes | None = None
    due: float | None = None
    exchange: Exchange | None = None
    mandatory: bool = True
    lane: int | None = None
    clash: str | None = None


@dataclass(slots=True, eq=False)
class Rows:
    """Messages ready to be written, all to the same place.

    Attributes:
        target: where they go.
        metas: JSON of each.
        bodies: the payload of each.
        messages: what they are the rows of, for errors.
    """

    target: Target
    metas: Sequence[str]
    bodies: Sequence[bytes]
    messages: Sequence[Message]


def size_of(batches: Iterable[Rows]) -> int:
    """Bytes that rows take, about."""
    return sum([sum(map(len, rows.metas)) + sum(map(len, rows.bodies)) for rows in batches])


def encode_all(batch: Sequence[Message]) -> list[Rows]:
    """The rows of messages; of those that have all but body and id in common, the rest is made once.

    Raises:
        ValueError: as `encode` does.
    """
    if not isinstance(batch, Drafts):
        return [*map(encode, batch)]
    first = encode(batch[0])
    tail = first.metas[0][len(_HEAD) + len(to_json(batch.ids[0]).decode()) :]
    ids = to_json(batch.ids).decode()[1:-1].split(",")  # we have made them: none has a comma
    return [Rows(first.target, [f"{_HEAD}{id_}{tail}" for id_ in ids], batch.bodies, batch)]


def encode(message: Message, *, lane: int | None = None, origin: int | None = None) -> Rows:
    """The row of one message.

    Parameters:
        lane: the one lane that it goes to.
        origin: the lane that it failed in.

    Raises:
        ValueError: a text in it has no UTF-8 form, or it has no body.
    """
    if message.body is None:
        raise ValueError("SQLite cannot carry a message without a body (a tombstone); kafka:// can")
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
    target = Target(message.queue, message.key, message.deliver_at, message.exchange, message.mandatory, lane)
    return Rows(target, (to_json(fields).decode(),), (message.body,), (message,))


@dataclass(slots=True)
class Claimed:
    """What a claim took, still as it came from the file: decoded outside the database thread.

    Attributes:
        claim: the number of the claim.
        lane: where from.
        ids: row ids.
        counts: deliveries before without a verdict.
        sizes: lengths of the bodies.
        meta: JSON of each, with BETWEEN between them.
        bodies: all bodies, one after the other.
    """

    claim: int
    lane: int
    ids: list[int]
    counts: list[int]
    sizes: list[int]
    meta: bytes
    bodies: bytes

    def keep(self, number: int) -> None:
        """Let go of all but the first `number`. The ids are in order; so is the rest."""
        del self.ids[number:], self.counts[number:]

    def messages(self, queue: str) -> list[tuple[Message, DecodeError | None, int | None]]:
        """Each message, what is wrong with it, if anything is, and the lane that it failed in, if it did."""
        found: list[tuple[Message, DecodeError | None, int | None]] = []
        end = 0
        bodies = self.bodies
        for (meta,), size, row in zip(self._metas(), self.sizes, self.ids):  # noqa: B905 - ids may be fewer
            start, end = end, end + size
            body = bodies[start:end]
            if isinstance(meta, bytes):
                found.append(_read_one(queue, meta, body, row))
            else:
                message, origin = _message(queue, meta, body)
                found.append((message, None, origin))
        return found

    def _metas(self) -> Sequence[tuple[Any]]:
        """The `meta` of each row, by itself: read, or where one of them is odd, all as bytes."""
        try:
            found = _METAS.validate_json(b"[[" + self.meta.replace(_BETWEEN, _BROKEN_ARRAYS) + b"]]")
            if len(found) == len(self.sizes):
                return found  # type: ignore[no-any-return]
        except ValueError:
            pass
        return [(meta,) for meta in self.meta.split(_BETWEEN)]


def _message(queue: str, fields: Any, body: bytes) -> tuple[Message, int | None]:
    origin = fields.pop(ORIGIN) if ORIGIN in fields else None
    if KEY_BYTES in fields:
        fields["key"] = b64decode(fields.pop(KEY_BYTES))
    if "error" in fields:
        fields["error"] = ErrorDetails(**fields["error"])
    return Message(body=body, queue=queue, **fields), origin


def _read_one(queue: str, meta: bytes, body: bytes, row: int) -> tuple[Message, DecodeError | None, int | None]:
    id_, place = f"{queue}-{row}", f"row {row} of {queue!r}"
    origin: int | None = None

    def read() -> Message:
        nonlocal origin
        fields = _readable(from_json(meta), _META_FIELDS)
        fields.setdefault("id", id_)
        message, origin = _message(queue, fields, body)
        return message

    message, trouble = read_message(read, body=body, queue=queue, id=id_, place=place)
    return message, trouble, origin


def _readable(given: Any, fields: Mapping[str, CoreSchema]) -> dict[str, Any]:
    """What stands in `meta` as it should; what does not is left out, as on other protocols."""
    if not isinstance(given, dict):
        raise TypeError(f"its meta is not a JSON object but {type(given).__name__}")
    found: dict[str, Any] = {}
    for name, kind in fields.items():
        value = given.get(name)
        if name == "headers" and isinstance(value, dict):
            value = {header: text for header, text in value.items() if isinstance(text, str)}
        elif name == "error" and isinstance(value, dict):
            value = _readable(value, _ERROR_FIELDS)
        elif type(value) is int and name not in _TIMES:
            value = min(value, MOST)
        with suppress(ValidationError):
            found[name] = SchemaValidator(kind).validate_python(value)
    return found
