"""Messages to rows and back."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pydantic_core import from_json, to_json

from streamtools.exchange import Exchange
from streamtools.message import ErrorDetails, Message

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
        meta: a JSON array.
        bodies: all bodies, one after the other.
    """

    claim: int
    lane: int
    ids: list[int]
    counts: list[int]
    sizes: list[int]
    meta: str
    bodies: bytes

    def keep(self, number: int) -> None:
        """Let go of all but the first `number`. The ids are in order; so is the rest."""
        del self.ids[number:], self.counts[number:]

    def messages(self, queue: str) -> Iterator[tuple[Message, int | None]]:
        """Each message, and the lane that it failed in, if it did."""
        end = 0
        bodies = self.bodies
        for fields, size, _ in zip(from_json(self.meta), self.sizes, self.ids):  # noqa: B905 - ids may be fewer
            start, end = end, end + size
            yield _message(queue, fields, bodies[start:end])


def _message(queue: str, fields: dict[str, Any], body: bytes) -> tuple[Message, int | None]:
    origin = fields.pop(ORIGIN, None)
    if KEY_BYTES in fields:
        fields["key"] = b64decode(fields.pop(KEY_BYTES))
    if "error" in fields:
        fields["error"] = ErrorDetails(**fields["error"])
    return Message(body=body, queue=queue, **fields), origin


def ids_json(ids: Sequence[int]) -> str:
    """Row ids as one SQL parameter."""
    return "[" + ",".join(map(str, ids)) + "]"
