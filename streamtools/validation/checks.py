"""Checks of what users write: names, headers, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, TypeGuard

from streamtools.errors import LONGEST, ConfigurationError

#: A span of time: seconds, or a timedelta.
Seconds = float | timedelta
#: Whether a queue is created if it is missing (True), never (False), or only looked for ("passive").
Declare = bool | Literal["passive"]
#: The most bytes of all user headers together: names and values, in UTF-8.
HEADERS_LIMIT: Final = 64 * 1024
#: Header names that begin with this are reserved for this library.
RESERVED: Final = "streamtools-"

#: Queue names that begin with these are reserved for this library's own queues: delay levels, locks, bindings, and
#: messages that could not be delivered.
OWN_QUEUES: Final = ("streamtools.delay", "streamtools.order.", "streamtools.bindings", "streamtools.undeliverable")


def check_name(queue: object, what: str = "queue") -> None:
    """Check that a queue or a group can have this name on every protocol.

    Raises:
        ConfigurationError: the name is not a str, is empty, is over 255 bytes, is a URL, or has control characters.
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
    """Check that a message does not name a queue that is reserved for this library.

    Raises:
        ConfigurationError: the queue is reserved.
    """
    if queue.lower().startswith(OWN_QUEUES):
        raise ConfigurationError(
            f"The queue {queue!r} is reserved for streamtools' own messages: name another queue."
        )


def check_topic(topic: object) -> str:
    """Check a topic: words with dots between them, at most 255 bytes (AMQP 0-9-1, section 4.2.5.3, short strings).

    Raises:
        ConfigurationError: the topic is not a str, or is too long.
        TypeError: the topic holds a lone surrogate.
    """
    if not isinstance(topic, str):
        raise ConfigurationError(f"A topic is a text, such as 'orders.placed', not {topic!r}.")
    check_texts({"topic": topic})
    if len(topic.encode()) > 255:
        raise ConfigurationError(f"The topic {topic[:40]!r}... is over 255 bytes.")
    return topic


def check_headers(headers: Mapping[Any, Any]) -> dict[str, str]:
    """Check the user's headers, and return a copy of them.

    Raises:
        TypeError: a name or a value is not a str.
        ConfigurationError: a name is reserved or empty, or all headers together are over 64 KiB.
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
    """Check a number of seconds, or a timedelta, and return it in seconds.

    Raises:
        ConfigurationError: the value is not a number, is negative, or is ten years or more.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if not is_number(value) or not 0 <= value < LONGEST:
        raise ConfigurationError(f"{name}={value!r} is out of range: a number of seconds from 0 to ten years.")
    return value


def check_count(name: str, value: int, least: int = 1) -> int:
    """Check that a value is a whole number of at least `least`, and return it.

    Raises:
        ConfigurationError: the value is not such a number.
    """
    if not is_whole(value) or value < least:
        raise ConfigurationError(f"{name}={value!r} is out of range: a whole number of at least {least}.")
    return value


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that a value is one of the choices.

    Raises:
        ConfigurationError: the value is none of them.
    """
    # Compares by identity, because 1 == True; only texts are compared by value.
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ConfigurationError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def check_declare(value: object, name: str = "declare") -> None:
    """Check a value of `declare`.

    Raises:
        ConfigurationError: the value is neither True, False nor "passive".
    """
    check_choice(name, value, (True, False, "passive"))


def check_place(host: object, port: object) -> None:
    """Check a host and a port; either may be None.

    Raises:
        ConfigurationError: the host is not a text, or the port is not from 0 to 65535.
    """
    if host is not None and (not isinstance(host, str) or not host):
        raise ConfigurationError(f"host={host!r} is not a host's name or address.")
    if port is not None and (not is_whole(port) or not 0 <= port < 65536):
        raise ConfigurationError(f"port={port!r} is not a whole number from 0 to 65535.")


def check_texts(fields: Mapping[str, object]) -> None:
    """Check that each field is None, or a str that every protocol can carry.

    Raises:
        TypeError: a field is of another type, or holds a lone surrogate.
    """
    for name, value in fields.items():
        if value is None:
            continue
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} is not a str; write {name}=str(...).")
        if not value.isascii() and any(0xD800 <= ord(c) < 0xE000 for c in value):
            raise TypeError(f"{name}= holds a lone surrogate, which no wire carries.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
