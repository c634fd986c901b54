"""Checks of what users write: names, headers, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from streamtools.errors import LONGEST, ConfigurationError

#: How a queue is declared: made if missing, never, or only checked.
Declare = bool | Literal["passive"]
#: User headers together are at most this long, names and values in bytes of UTF-8.
HEADERS_LIMIT: Final = 64 * 1024
#: Header names that begin so are ours.
RESERVED: Final = "streamtools-"


def check_name(queue: object) -> None:
    """The rule for queue names that holds on every protocol.

    Raises:
        ConfigurationError: not a str, empty, over 255 bytes, or with control characters.
    """
    if not isinstance(queue, str) or not queue:
        raise ConfigurationError(f"A queue needs a name of at least one character, not {queue!r}.")
    if len(queue.encode("utf-8", "replace")) > 255:
        raise ConfigurationError(f"The queue name {queue[:40]!r}... is over 255 bytes.")
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in queue):
        raise ConfigurationError(f"The queue name {queue!r} has control characters.")


def check_headers(headers: Mapping[Any, Any]) -> dict[str, str]:
    """A copy of the user's headers.

    Raises:
        TypeError: a name or a value is not a str.
        ConfigurationError: a reserved or empty name, or more than 64 KiB together.
    """
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


def check_seconds(name: str, value: float) -> float:
    """A number of seconds that is finite and not negative.

    Raises:
        ConfigurationError: it is not.
    """
    if not 0 <= value < LONGEST:
        raise ConfigurationError(f"{name}={value!r} is out of range: seconds from 0 to ten years.")
    return value
