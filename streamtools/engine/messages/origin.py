"""Where a failed message came from, and whether that is believed.

It stands in the message, so whoever may write to the error queue may have written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from streamtools.errors import ConfigurationError
from streamtools.message import Message
from streamtools.validation.checks import check_name, check_not_ours

#: What stands between the name of a queue and the word that says that its failures are there.
SEPARATORS: Final = (".", "-", "_", "/", ":")
#: Characters of a queue's name that are shown.
SHOWN: Final = 255


def failed_in_queue(message: Message) -> str | None:
    """The queue that a message says it failed in; None where it does not say, or names none that can fail a message.

    Whoever may write to the error queue may have written it: who moves messages there has to know the queue.
    """
    if message.error is None:
        return None
    try:
        check_not_ours(message.error.queue)
    except ConfigurationError:
        return None
    return message.error.queue or None


def belongs_to(error_queue: str, queue: str) -> bool:
    """Whether an error queue bears a queue's name, as `orders.error` that of `orders`.

    Whoever may write to a queue's own error queue is that queue's own service.
    """
    return any(error_queue == f"{queue}{separator}error" for separator in SEPARATORS)


def check_failed_here(message: Message, source: str) -> None:
    """Check that a message may go where it says that it failed, though nobody has named that queue.

    Parameters:
        source: where it is now.

    Raises:
        ConfigurationError: it may not.
    """
    home = failed_in_queue(message)
    if home is None or home == source or belongs_to(source, home):
        return
    name = home[:SHOWN]
    raise ConfigurationError(
        f"they say that they failed in {name!r}, which whoever may write to {source!r} may have written. "
        f"If it is right, name the queue: failed_in=[{name!r}]"
    )


def queues_named(failed_in: Iterable[str] | None) -> frozenset[str] | None:
    """The queues of `failed_in`, as `QueueAdmin.move` takes it.

    Raises:
        ConfigurationError: it is one name, or none that a queue can have.
    """
    if failed_in is None:
        return None
    if isinstance(failed_in, str):
        raise ConfigurationError(f"failed_in={failed_in!r} is one queue: write failed_in=[{failed_in!r}].")
    named = frozenset(failed_in)
    for queue in named:
        check_name(queue)
    return named


def failed_there(
    named: frozenset[str] | None, where: Callable[[Message], bool] | None
) -> Callable[[Message], bool] | None:
    """The condition `where`, and that a message failed in one of the named queues."""
    if named is None:
        return where
    return lambda message: (where is None or where(message)) and failed_in_queue(message) in named
