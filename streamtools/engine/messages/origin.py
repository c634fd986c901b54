"""Finds out where a failed message came from, and whether to believe it.

The message itself says where it failed, and everybody who may write to the error queue can write such a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from streamtools.errors import ConfigurationError
from streamtools.message import Message
from streamtools.validation.checks import check_name, check_not_ours

#: The characters that may stand between the name of a queue and the word `error` in the name of its error queue.
SEPARATORS: Final = (".", "-", "_", "/", ":")
#: The most characters of a queue's name that an error shows.
SHOWN: Final = 255


def failed_in_queue(message: Message) -> str | None:
    """Return the queue in which a message says that it failed; None if it names none, or a queue of this library.

    Everybody who may write to the error queue can write that. So check the queue before you move messages to it.
    """
    if message.error is None:
        return None
    try:
        check_not_ours(message.error.queue)
    except ConfigurationError:
        return None
    return message.error.queue or None


def belongs_to(error_queue: str, queue: str) -> bool:
    """Whether an error queue is named after a queue, such as `orders.error` after `orders`.

    Then it is believed that its messages failed in that queue: only the service of that queue writes to it.
    """
    return any(error_queue == f"{queue}{separator}error" for separator in SEPARATORS)


def check_failed_here(message: Message, source: str) -> None:
    """Check that a message may go to the queue in which it says that it failed, if the user has not named that queue.

    Parameters:
        source: the error queue that the message is in.

    Raises:
        ConfigurationError: the queue is not the one that the error queue belongs to.
    """
    home = failed_in_queue(message)
    if home is None or home == source or belongs_to(source, home):
        return
    name = home[:SHOWN]
    raise ConfigurationError(
        f"they say that they failed in {name!r}, but everybody who may write to {source!r} can write that. "
        f"If it is right, name the queue: failed_in=[{name!r}]"
    )


def queues_named(failed_in: Iterable[str] | None) -> frozenset[str] | None:
    """Check the parameter `failed_in` of `QueueAdmin.move`, and return its queues.

    Raises:
        ConfigurationError: it is a single name, or a queue cannot have one of the names.
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
    """Return the condition that `where` is true and that a message failed in one of the named queues."""
    if named is None:
        return where
    return lambda message: (where is None or where(message)) and failed_in_queue(message) in named
