"""Checks of what users write: names, headers, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, TypeGuard

from streamtools.errors import LONGEST, ConfigurationError

#: A span of time: seconds, or a timedelta.
Seconds = float | timedelta
#: How a queue is declared: made if missing, never, or only checked.
Declare = bool | Literal["passive"]
#: User headers together are at most this long, names and values in bytes of UTF-8.
HEADERS_LIMIT: Final = 64 * 1024
#: Header names that begin so are ours.
RESERVED: Final = "streamtools-"

#: Queues whose names begin so are ours: the stages of a delay, locks, bindings, what could not be delivered.
OWN_QUEUES: Final = ("streamtools.delay", "streamtools.order.", "streamtools.bindings", "streamtools.undeliverable")


def check_name(queue: object, what: str = "queue") -> None:
    """The rule for the names of queues and groups that holds on every protocol.

    Raises:
        ConfigurationError: not a str, empty, over 255 bytes, or with control characters.
    """
    if not isinstance(queue, str) or not queue:
        raise ConfigurationError(f"A {what} needs a name of at least one character, not {queue!r}.")
    if len(queue.encode("utf-8", "replace")) > 255:
        raise ConfigurationError(f"The {what} name {queue[:40]!r}... is over 255 bytes.")
    if "://" in queue:  # not shown: it may hold a token
        raise ConfigurationError(
            f"A {what}'s name cannot be a URL: write the name first, and the address as url=...."
        )
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in queue):
        raise ConfigurationError(f"The {what} name {queue!r} has control characters.")


def check_not_ours(queue: str) -> None:
    """Check that a queue which a message names is none that only this library writes to.

    Raises:
        ConfigurationError: it is one.
    """
    if queue.lower().startswith(OWN_QUEUES):
        raise ConfigurationError(f"The queue {queue!r} takes no messages of others: streamtools keeps its own there.")


def check_topic(topic: object) -> str:
    """A topic: dotted words, 255 bytes at most, as AMQP 0-9-1 has it (section 4.2.5.3, short strings).

    Raises:
        ConfigurationError: it is none.
        TypeError: it holds a lone surrogate.
    """
    if not isinstance(topic, str):
        raise ConfigurationError(f"A topic is a text, such as 'orders.placed', not {topic!r}.")
    check_texts({"topic": topic})
    if len(topic.encode()) > 255:
        raise ConfigurationError(f"The topic {topic[:40]!r}... is over 255 bytes.")
    return topic


def check_headers(headers: Mapping[Any, Any]) -> dict[str, str]:
    """A copy of the user's headers.

    Raises:
        TypeError: a name or a value is not a str.
        ConfigurationError: a reserved or empty name, or more than 64 KiB together.
    """
    if not isinstance(headers, Mapping):
        raise TypeError(f"Headers are a mapping of str -> str, not {type(headers).__name__}.")
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"Headers are str -> str, but {name!r} is {value!r}; write str(value).")
        if not name or name.lower().startswith(RESERVED):
            raise ConfigurationError(f"The header name {name!r} is reserved; choose another.")
        try:
            size += len(name.encode()) + len(value.encode())
        except UnicodeEncodeError as error:
            raise ConfigurationError(f"The header {name!r} holds a lone surrogate, which no wire carries.") from error
    if size > HEADERS_LIMIT:
        raise ConfigurationError(f"The headers are {size} bytes; 64 KiB is the most. Put data into the payload.")
    return dict(headers)


def check_seconds(name: str, value: Seconds) -> float:
    """A number of seconds that is finite and not negative, also given as a timedelta.

    Raises:
        ConfigurationError: it is not.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if not is_number(value) or not 0 <= value < LONGEST:
        raise ConfigurationError(f"{name}={value!r} is out of range: a number of seconds from 0 to ten years.")
    return value


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        ConfigurationError: it is not.
    """
    if not is_whole(value) or value < least:
        raise ConfigurationError(f"{name}={value!r} is out of range: a whole number of at least {least}.")
    return value


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """One of a few values.

    Raises:
        ConfigurationError: it is not.
    """
    # By identity where there is one: 1 == True, and is not meant.
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ConfigurationError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def check_declare(value: object, name: str = "declare") -> None:
    """How a queue is declared.

    Raises:
        ConfigurationError: neither True, False nor "passive".
    """
    check_choice(name, value, (True, False, "passive"))


def check_place(host: object, port: object) -> None:
    """A host name and a port, or None.

    Raises:
        ConfigurationError: they cannot be such.
    """
    if host is not None and (not isinstance(host, str) or not host):
        raise ConfigurationError(f"host={host!r} is not a host's name or address.")
    if port is not None and (not is_whole(port) or not 0 <= port < 65536):
        raise ConfigurationError(f"port={port!r} is not a whole number from 0 to 65535.")


def check_texts(fields: Mapping[str, object]) -> None:
    """Metadata: each is None, or a str that a wire can carry.

    Raises:
        TypeError: one is of another type, or holds a lone surrogate.
    """
    for name, value in fields.items():
        if value is None:
            continue
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} is not a str; write {name}=str(...).")
        if not value.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in value):
            raise TypeError(f"{name}= holds a lone surrogate, which no wire carries.")


def is_whole(value: object) -> TypeGuard[int]:
    """An int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """An int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
