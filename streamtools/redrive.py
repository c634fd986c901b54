"""Tools for operators: find out which messages failed and why, redrive them, or delete them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from streamtools.admin import QueueAdmin
from streamtools.engine.messages.origin import failed_there, queues_named
from streamtools.errors import ConfigurationError, suggest
from streamtools.message import ErrorDetails, Message
from streamtools.wire import key_text

#: Called with the number of messages looked at so far.
Progress = Callable[[int], None]
#: Name in a filter -> function that returns the value of a message to compare.
FIELDS: Final[dict[str, Callable[[Message, ErrorDetails], str]]] = {
    "queue": lambda message, error: error.queue or message.queue,
    "exception": lambda message, error: error.exception,
    "handler": lambda message, error: error.handler,
    "reason": lambda message, error: error.reason,
    "type": lambda message, error: message.type or "",
    "id": lambda message, error: message.id,
    "key": lambda message, error: key_text(message.key),
    "source": lambda message, error: message.source or "",
}
#: In a filter, this precedes the name of a user's header.
HEADER: Final = "header."
NO_DETAILS: Final = ErrorDetails(queue="")

Condition = Callable[[Message], bool]


class ErrorFilter:
    """Chooses messages of an error queue: returns true for those that meet every condition.

    `name=value` compares a field: queue, exception (its full name or the last part), handler, reason, type,
    id, key, source, or header.NAME. `*` and `?` in a value stand for any characters. A reason matches if it contains
    the value. A word without `=` is searched in the reason and in the body.

    Parameters:
        conditions: each text has one condition or several, with blanks between them; quote a value that contains
            blanks.

    Raises:
        ConfigurationError: a condition has an unknown name, or a quote that is not closed.
    """

    def __init__(self, conditions: Iterable[str] = ()) -> None:
        self._texts = [word for text in conditions for word in _words(text)]
        self._conditions: list[Condition] = [_condition(text) for text in self._texts]

    def __call__(self, message: Message) -> bool:
        return all(condition(message) for condition in self._conditions)

    def __bool__(self) -> bool:
        return bool(self._conditions)

    def __repr__(self) -> str:
        return f"ErrorFilter({self._texts})"


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"The filter {text!r} cannot be read: {error}.") from None


def _condition(text: str) -> Condition:
    name, equals, value = text.partition("=")
    if not equals:
        return _containing(text)
    if name.startswith(HEADER):
        header = name.removeprefix(HEADER)
        return lambda message: fnmatchcase(message.headers.get(header, ""), value)
    if name not in FIELDS:
        raise ConfigurationError(f"A filter has no {name!r}. {suggest(name, [*FIELDS, HEADER + 'NAME'])}")
    read, fits = FIELDS[name], _fits(name, value)
    return lambda message: fits(read(message, message.error or NO_DETAILS))


def _fits(name: str, value: str) -> Callable[[str], bool]:
    if name == "reason":
        return lambda text: value in text or fnmatchcase(text, value)
    if name == "exception":
        return lambda text: fnmatchcase(text, value) or fnmatchcase(text.rpartition(".")[2], value)
    return lambda text: fnmatchcase(text, value)


def _containing(text: str) -> Condition:
    body = text.encode()
    return lambda message: body in (message.body or b"") or text in (message.error or NO_DETAILS).reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Messages that failed in one queue with one exception.

    Attributes:
        queue: where they failed.
        exception: the exception's name; empty if they were rejected without one.
        count: how many.
        first_failed: the earliest first failure, in seconds since the epoch.
        last_failed: the latest last failure.
        reason: the text of the latest failure.
        example: the id of the message that failed latest.
    """

    queue: str
    exception: str
    count: int
    first_failed: float
    last_failed: float
    reason: str
    example: str


def group_errors(messages: Iterable[Message]) -> list[ErrorGroup]:
    """Group the messages by source queue and exception, the largest group first."""
    groups: dict[tuple[str, str], list[Message]] = {}
    for message in messages:
        error = message.error or NO_DETAILS
        groups.setdefault((error.queue, error.exception), []).append(message)
    found = [_group(queue, exception, members) for (queue, exception), members in groups.items()]
    return sorted(found, key=lambda group: (-group.count, group.queue, group.exception))


def _group(queue: str, exception: str, members: Sequence[Message]) -> ErrorGroup:
    details = [message.error or NO_DETAILS for message in members]
    latest = max(range(len(members)), key=lambda place: details[place].last_failed)
    return ErrorGroup(
        queue=queue,
        exception=exception,
        count=len(members),
        first_failed=min(error.first_failed for error in details),
        last_failed=details[latest].last_failed,
        reason=details[latest].reason,
        example=members[latest].id,
    )


async def redrive(
    admin: QueueAdmin,
    queue: str,
    *,
    where: Condition = lambda message: True,
    target: str | None = None,
    failed_in: Iterable[str] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Put failed messages back into their queue, as attempt 1, with their body, id and headers; return how many.

    The target queue confirms each message before the message leaves the error queue: a crash in between can repeat a
    message, but never lose one.

    Parameters:
        queue: the error queue.
        where: choose only messages for which this returns true.
        target: the queue to put the messages into; None for the queue in which each message failed.
        failed_in: choose only messages that failed in one of these queues. A message itself says where it failed, and
            everybody who may write to the error queue can write that. So without a `target`, messages go only to
            queues that are named here. If this is None too, messages go only to the queue that the error queue
            belongs to, such as `orders` for `orders.error`; all others stay.
        limit: the most messages to put back.
        progress: called with the number of messages looked at so far.

    Raises:
        QueueError: there is no such queue.
        ConfigurationError: there is no target, and a message does not say where it failed, or failed in a queue that
            is not named.
        SendError: a target queue refused a message, which stays in the error queue.
    """
    named = queues_named(failed_in)
    chosen = _counted(failed_there(named, where) or where, limit, progress)
    return await admin.move(queue, target, failed_in=named, where=chosen)


async def discard(
    admin: QueueAdmin,
    queue: str,
    *,
    where: Condition = lambda message: True,
    limit: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Delete messages of an error queue for good, and return how many. The parameters are those of `redrive`.

    Raises:
        QueueError: there is no such queue.
    """
    return await admin.discard(queue, where=_counted(where, limit, progress))


def _counted(where: Condition, limit: int | None, progress: Progress | None) -> Condition:
    """Return `where` as a condition that counts: it is false once it was true `limit` times."""
    seen = found = 0

    def choose(message: Message) -> bool:
        nonlocal seen, found
        seen += 1
        if progress is not None:
            progress(seen)
        if limit is not None and found >= limit:
            return False
        chosen = where(message)
        found += chosen
        return chosen

    return choose
