"""Message: one message with its metadata, frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import count
from secrets import token_hex
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar, overload

if TYPE_CHECKING:
    from streamtools.exchange import Exchange

Data = TypeVar("Data")

#: The header mapping of a message without headers; shared, so that it costs nothing.
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def sets_slots(cls: type[Data]) -> type[Data]:
    """Give a frozen, slotted dataclass an `__init__` that sets its fields at once.

    The one that it has asks `object.__setattr__` for each: 3 us for a Message, of which one is made for each that is
    sent or received. This takes a third of it: while its fields are set, a new object belongs to a subclass that is
    not frozen. Objects of other classes keep theirs meanwhile; their slots are set one by one, by `_set_all`. A
    default factory is asked once, for all.
    """
    thawed = {"__slots__": (), "__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
    names: dict[str, Any] = {"cls": cls, "thawed": type(cls.__name__, (cls,), thawed), "set": object.__setattr__}
    parameters = []
    for each in fields(cls):  # type: ignore[arg-type]
        names[f"set_{each.name}"] = getattr(cls, each.name).__set__
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if default is not MISSING:
            names[f"default_{each.name}"] = default
        parameters.append(each.name if default is MISSING else f"{each.name}=default_{each.name}")
    if all(each.kw_only for each in fields(cls)):  # type: ignore[arg-type]
        parameters.insert(0, "*")
    of = [each.name for each in fields(cls)]  # type: ignore[arg-type]
    # B102, exec: of field names alone, as dataclass itself does.
    exec(_setting(of, ", ".join(parameters)), names)  # nosec B102
    names["__init__"].__qualname__ = f"{cls.__qualname__}.__init__"
    names["__init__"].__annotations__ = cls.__init__.__annotations__
    cls.__init__ = names["__init__"]  # type: ignore[method-assign]
    cls._set_all = names["_set_all"]  # type: ignore[attr-defined]
    return cls


def _setting(of: list[str], parameters: str) -> str:
    """The code of `__init__` and `_set_all` for fields of these names."""
    lines = [
        f"def _set_all(self, {parameters}):",
        *(f"    set_{name}(self, {name})" for name in of),
        f"def __init__(self, {parameters}):",
        "    if self.__class__ is not cls:",
        f"        return _set_all(self, {', '.join(f'{name}={name}' for name in of)})",
        "    set(self, '__class__', thawed)",
        *(f"    self.{name} = {name}" for name in of),
        "    self.__class__ = cls",
    ]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """Why a message failed. Its retries, and its copy in the error queue, carry these details.

    Attributes:
        queue: the queue that it was received from.
        handler: the name of the handler that failed.
        exception: the exception's qualified class name.
        reason: the exception's text, shortened to 2 KiB.
        traceback: the end of the formatted traceback, 8 KiB at most.
        attempts: how many attempts there were.
        first_failed: when it first failed, in seconds since the epoch.
        last_failed: when it last failed, in seconds since the epoch.
        place: on Kafka: the partition and offset at which it was first read, as a text. It is not sent with the
            message.
        omitted: what this copy lacks because the broker did not accept it, as a text.
    """

    queue: str
    handler: str = ""
    exception: str = ""
    reason: str = ""
    traceback: str = ""
    attempts: int = 0
    first_failed: float = 0.0
    last_failed: float = 0.0
    place: str = field(default="", compare=False)
    omitted: str = ""


@sets_slots
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message: the body, which is the payload alone, and the metadata.

    Attributes:
        body: the payload's bytes; None is a tombstone, which says that what its key names was deleted (only with
            `Features.tombstones`).
        queue: where the message goes, or where it was received; a topic if `exchange` is set.
        id: unique; stays the same through retries, delays, the error queue and a redrive.
        exchange: where the message goes by its topic, to every queue bound there; None to the queue itself,
            and on all that was received.
        mandatory: a message that reaches no queue is an error; otherwise it is forgotten. Not on the wire.
        type: the name of the kind of payload, such as `orders.Placed`.
        version: the version of that type, if there are several.
        source: who sent it (the producer's `client_id`).
        time: when it was sent, in seconds since the epoch.
        content_type: the body's media type; None when the sender did not say.
        content_encoding: a further encoding of the body, when there is one.
        correlation_id: common to all messages of one conversation.
        causation_id: the id of the message whose handler sent this one.
        reply_to: the address for a reply.
        intent: `command`, `event`, `request` or `reply`, or None.
        handler: the one handler that runs it, if there are several; on copies for a retry.
        topic: the topic that it was published to, for a subscriber of `orders.*`; None if it was sent to a queue.
        key: messages with the same key keep their order if the consumer asks for it; bytes if it is not plain UTF-8
            text.
        headers: the user's own, `str -> str`, never mixed with ours.
        attempt: the number of the attempt; the first is 1.
        deliver_at: the earliest time of delivery, in seconds since the epoch.
        expires_at: the time after which it is not handled any more, in seconds since the epoch.
        error: why it failed before, if it did.
    """

    #: Sets every field of a message that other threads may see: see `sets_slots`.
    _set_all: ClassVar[Callable[..., None]]

    body: bytes | None
    queue: str
    id: str
    exchange: Exchange | None = None
    mandatory: bool = True
    type: str | None = None
    version: int | None = None
    source: str | None = None
    time: float | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    reply_to: str | None = None
    intent: str | None = None
    handler: str | None = None
    topic: str | None = None
    key: str | bytes | None = None
    # Not in the repr: a webhook's authorization stands there.
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS, repr=False)
    attempt: int = 1
    deliver_at: float | None = None
    expires_at: float | None = None
    error: ErrorDetails | None = None

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        return replace(self, **changes)

    @property
    def expired(self) -> bool:
        """Whether its `expires_at` has passed."""
        return self.expires_at is not None and self.expires_at <= time.time()

    @property
    def enveloped(self) -> bool:
        """Its body is a CloudEvent with its attributes (structured mode); handlers get the event in it."""
        content_type = self.content_type
        return content_type is not None and content_type[:28].lower() == "application/cloudevents+json"

    def __hash__(self) -> int:
        """By id: headers are a mapping, which has no hash."""
        return hash(self.id)


class LazyMessage(Message):
    """A Message of which some fields are set; the others are when one of them is asked for. It is a Message then.

    Making a Message takes 1.6 us, most of it for fields that nobody reads where batches are sent or pulled. Make
    one by `cls.__new__(cls)` and `setters()`; a subclass says in `_all` what its fields are.
    """

    __slots__ = ()

    def _all(self, source: Any) -> Mapping[str, Any]:
        """All fields, by name.

        Parameters:
            source: as it was set.
        """
        raise NotImplementedError

    @property
    def error(self) -> None:  # the source waits in its slot
        """It has none: what has one is made at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_complete(self), name)

    def __eq__(self, other: object) -> bool:
        return _complete(self) == other

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return repr(_complete(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _complete(self).__reduce_ex__(protocol)


def setters(*names: str) -> tuple[Callable[[Message, Any], None], ...]:
    """What sets the fields of a lazy message, after its source: (message, value) -> None."""
    return _SOURCE.__set__, *(Message.__dict__[name].__set__ for name in names)


_SOURCE: Final = Message.__dict__["error"]


def _complete(message: LazyMessage) -> Message:
    kind, source = type(message), _SOURCE.__get__(message)
    # Another thread may ask at the same time. Whichever of this it sees, both set the same; the source goes last.
    if source is not None and issubclass(kind, LazyMessage):
        Message._set_all(message, **kind._all(message, source))
    object.__setattr__(message, "__class__", Message)
    return message


class Draft(LazyMessage):
    """One of many that are sent together, and differ in body and id alone. Its source is all else, by name."""

    __slots__ = ()

    def _all(self, source: Any) -> dict[str, Any]:
        return {**source, "body": self.body, "id": self.id}


_new_draft: Final = Draft.__new__
_set_common, _set_body, _set_id, _set_queue = setters("body", "id", "queue")


class Drafts(Sequence[Message]):
    """Messages that are sent together, and differ in body and id alone; they are made when one is asked for.

    Parameters:
        common: their other fields, by name.
        bodies: in order.
        ids: as many.
    """

    __slots__ = ("_made", "bodies", "common", "ids")

    def __init__(self, common: dict[str, Any], bodies: Sequence[bytes], ids: Sequence[str]) -> None:
        self.common: dict[str, Any] = common
        self.bodies: Sequence[bytes] = bodies
        self.ids: Sequence[str] = ids
        self._made: list[Message] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Message]:
        return iter(self._all())

    @overload
    def __getitem__(self, place: int) -> Message: ...
    @overload
    def __getitem__(self, place: slice) -> list[Message]: ...
    def __getitem__(self, place: int | slice) -> Message | list[Message]:
        if isinstance(place, slice) or self._made:
            return self._all()[place]
        return self._draft(self.bodies[place], self.ids[place])

    def _all(self) -> list[Message]:
        if not self._made:
            self._made = [self._draft(body, id) for body, id in zip(self.bodies, self.ids, strict=True)]
        return self._made

    def _draft(self, body: bytes, id: str) -> Draft:  # noqa: A002 - the field's name everywhere
        draft = _new_draft(Draft)
        _set_common(draft, self.common)
        _set_body(draft, body)
        _set_id(draft, id)
        _set_queue(draft, self.common["queue"])
        return draft


#: The last two digits of the ids of a batch.
_LAST_DIGITS: Final = [f"{number:02x}" for number in range(256)]


class IdGenerator:
    """A source of unique message ids: 32 hex digits, random in the first half, counted in the second.

    One random number serves a producer's whole life, so that an id costs no system call. Safe in several threads.
    """

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        self._prefix = token_hex(8)
        self._numbers = count(1)

    def __call__(self) -> str:
        """The next id."""
        return f"{self._prefix}{next(self._numbers):014x}00"

    def take(self, number: int) -> list[str]:
        """The next so many ids: a number is counted for each 256 of them, and its text made once."""
        found: list[str] = []
        for start in range(0, number, len(_LAST_DIGITS)):
            head = f"{self._prefix}{next(self._numbers):014x}"
            found += [head + last for last in _LAST_DIGITS[: number - start]]
        return found


def id_generator() -> IdGenerator:
    """A source of unique message ids."""
    return IdGenerator()


#: The older name.
ids = id_generator
