"""Reads AMQP field tables: finds where each value ends, and converts it to text.

A table holds names and values. A letter before each value is its type; RabbitMQ and all clients agree on the letters
(https://www.rabbitmq.com/amqp-0-9-1-errata, section 3). Headers of a `Message` are text. Other values become text by
these rules:

- bytes that are not UTF-8 are escaped, such as `\\xff`, in values and in names;
- numbers, decimals and floats are written in decimal; true, false and void as in JSON;
- a timestamp as in RFC 3339; one outside the years 1 to 9999 as its number of seconds;
- a table or an array becomes JSON, in which the same rules hold; deeper levels than `DEEPEST` become `"..."`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Final

from streamtools.drivers.rabbitmq.amqp.frames import LONG

#: The most levels of tables and arrays that are read.
DEEPEST: Final = 32
#: Replaces values that are nested deeper.
TOO_DEEP: Final = "..."
#: The most bytes of a name (specification 0-9-1, section 4.2.5.3).
LONGEST_NAME: Final = 255
#: The bytes of the hash in a name that was cut because it was too long.
HASH: Final = 8

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: Types with a length before their bytes.
_SIZED: Final = frozenset(b"SxFA")
#: Types of a fixed size.
_NUMBERS: Final[dict[int, struct.Struct]] = {
    ord(letter): struct.Struct(layout)
    for letter, layout in {
        "t": ">?", "b": ">b", "B": ">B", "s": ">h", "U": ">h", "u": ">H", "I": ">i", "i": ">I",
        "l": ">q", "L": ">q", "f": ">f", "d": ">d", "T": ">q", "D": ">Bi",
    }.items()
}  # fmt: skip
STRING, _BYTES, _TABLE, _ARRAY, _VOID, _TIME, _DECIMAL = b"SxFAVTD"


def entries(table: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield for each entry of a table where it begins, where its value begins (with its letter), and where it ends.

    Raises:
        ValueError: the table is malformed, so that the end of an entry is unknown.
    """
    position, end = 0, len(table)
    while position < end:
        value = position + 1 + table[position]
        stop = end_of(table, value) if value < end else end + 1
        if stop > end:
            raise ValueError(f"the table ends within the value at {value}")
        yield position, value, stop
        position = stop


def end_of(data: bytes, start: int) -> int:
    """Return the end of the value that begins at `start` with its letter; beyond the data if the value is cut off.

    Raises:
        ValueError: no type has this letter.
    """
    letter = data[start]
    if letter in _SIZED:
        if start + 5 > len(data):
            return len(data) + 1
        return start + 5 + int(LONG.unpack_from(data, start + 1)[0])
    if letter == _VOID:
        return start + 1
    if (number := _NUMBERS.get(letter)) is None:
        raise ValueError(f"there is no type {chr(letter)!r}")
    return start + 1 + number.size


def name_text(data: bytes) -> str:
    """Return a header's name as text that AMQP can carry again; if it is too long, cut it and append its hash."""
    try:
        return data.decode()  # it is short enough, because its length is one octet
    except UnicodeDecodeError:
        name = data.decode("utf-8", "backslashreplace")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    kept = name.encode()[: LONGEST_NAME - 2 * HASH - 1].decode("utf-8", "ignore")
    return f"{kept}~{blake2b(data, digest_size=HASH).hexdigest()}"


def value(data: bytes, start: int, stop: int, depth: int = 0) -> object:
    """Return the value, of any type, that begins at `start` with its letter. It never fails.

    In a malformed array or table, everything from the first malformed value on is left out.
    """
    letter = data[start]
    if letter == STRING:
        return data[start + 5 : stop].decode("utf-8", "backslashreplace")
    if letter == _BYTES:
        return data[start + 5 : stop]
    if letter in (_TABLE, _ARRAY):
        if depth >= DEEPEST:
            return TOO_DEEP
        inner = data[start + 5 : stop]
        return _table(inner, depth + 1) if letter == _TABLE else _array(inner, depth + 1)
    if letter == _VOID:
        return None
    read: tuple[Any, ...] = _NUMBERS[letter].unpack_from(data, start + 1)
    return _SPECIAL.get(letter, _plain)(*read)


def _table(data: bytes, depth: int) -> dict[str, object]:
    found: dict[str, object] = {}
    _until_malformed(
        (
            (name_text(data[start + 1 : begin]), value(data, begin, stop, depth))
            for start, begin, stop in entries(data)
        ),
        lambda item: found.__setitem__(*item),
    )
    return found


def _array(data: bytes, depth: int) -> list[object]:
    found: list[object] = []
    _until_malformed((value(data, start, stop, depth) for start, stop in _values(data)), found.append)
    return found


def _values(data: bytes) -> Iterator[tuple[int, int]]:
    position = 0
    while position < len(data):
        stop = end_of(data, position)
        if stop > len(data):
            raise ValueError(f"the array ends within the value at {position}")
        yield position, stop
        position = stop


def _until_malformed(items: Iterator[Any], keep: Callable[[Any], object]) -> None:
    try:
        for item in items:
            keep(item)
    except ValueError:
        return


def _plain(number: object) -> object:
    return number


def _time(seconds: int) -> object:
    try:
        return EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return seconds


def _decimal(scale: int, unscaled: int) -> Decimal:
    return Decimal(unscaled).scaleb(-scale)


_SPECIAL: Final[dict[int, Callable[..., object]]] = {_TIME: _time, _DECIMAL: _decimal}


def as_text(found: object) -> str:
    """Return a value of any AMQP type as text, by the rules in the docstring of this module."""
    if isinstance(found, str):
        return found
    if isinstance(found, bytes):
        return found.decode("utf-8", "backslashreplace")
    if isinstance(found, Mapping | list):
        return json.dumps(found, default=as_text, ensure_ascii=False)
    if found is None or isinstance(found, bool):
        return json.dumps(found)
    return found.isoformat() if isinstance(found, datetime) else str(found)
