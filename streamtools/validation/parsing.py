"""Validates JSON bodies within limits, so that no message occupies the event loop for long.

Each value in a body may become an object, or a problem to report: the time grows with their number. So for a large
body

- the values are counted before anything is parsed;
- the validation of a sequence stops at its first wrong item;
- numbers that were chosen to have the same hash are refused: a set or a dict of many of them takes minutes.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError, SchemaError, SchemaValidator, from_json, to_json

from streamtools.errors import DecodeError
from streamtools.validation.bodies import LIMITS
from streamtools.validation.schemas import Schema, is_quick, nodes, parts, with_parts
from streamtools.validation.unions import doubling

#: A body of more bytes is large.
LARGE: Final = 16 * 1024
#: The values of a body are counted in pieces of this number of bytes.
PORTION: Final = 256 * 1024
#: If a body has too many values, its first problem is looked for in this number of bytes.
PREFIX: Final = 64 * 1024
#: A body that has more than MANY long numbers may have this many with the same hash.
SAME_HASH: Final = 100
MANY: Final = 500
#: To try an object as one member of a union takes this many times as long as to parse a value.
WORK: Final = 2
#: The limit of values is multiplied by this for plain data, which take less time than validated data.
PLAIN: Final = 5
#: The limit of values is multiplied by this if all types of the annotation are quick to validate.
QUICK: Final = 1.5
#: Python's hash of a number is the number modulo this; UUIDs are numbers too.
MODULUS: Final = (1 << 61) - 1
#: An integer or a UUID of many digits, or an IPv6 address.
_LONG_NUMBER: Final = re.compile(
    rb"(?<![0-9a-fA-F:-])(?:[0-9a-fA-F-]{19,}|[0-9a-fA-F]*:[0-9a-fA-F:]+)(?![0-9a-fA-F:])"
)
_HEX: Final = b"0123456789abcdefABCDEF"
_ONE_HASH: Final = "The body has many values with the same hash: a set or a dict of them would take minutes."


class TooManyValues(DecodeError):
    """A body has more values than the limit allows."""


def check_values(body: bytes, times: float = 1) -> None:
    """Check that a JSON body has no more values than `set_body_limits` allows.

    Parameters:
        times: multiplies that limit.

    Raises:
        TooManyValues: the body has more values.
    """
    if LIMITS.values is None or len(body) <= LARGE:
        return
    limit = int(LIMITS.values * times)
    if len(body) > limit and _count(body) > limit and _has_more_values(body, limit):
        raise TooManyValues(
            f"The body has over {limit:,} values, more than are parsed: split it into several messages, or have the "
            "receiving service say set_body_limits(values=...)."
        )


def _count(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _has_more_values(body: bytes, limit: int) -> bool:
    """Whether the body has more values than the limit. Commas and brackets in texts do not count."""
    found = place = within = 0
    while place < len(body) and found <= limit:
        end = place + PORTION
        while body[end - 1 : end] == b"\\":  # never cut an escape in two
            end += 1
        pieces = _without_escapes(body[place:end]).split(b'"')
        found += _count(b"".join(pieces[within::2]))
        within, place = (within + len(pieces) - 1) % 2, end
    return found > limit


def _without_escapes(body: bytes) -> bytes:
    return body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body


def _without_strings(body: bytes) -> bytes:
    return b"".join(_without_escapes(body).split(b'"')[::2])


def parse_json(body: bytes) -> Any:
    """Return the plain data of a JSON body.

    Raises:
        TooManyValues: the body has more values than the limit allows.
        ValueError: the body is not JSON.
    """
    if len(body) > LARGE:
        check_values(body, PLAIN)
    return from_json(body)


class Parser:
    """Validates JSON bodies by the handler's annotation.

    Parameters:
        adapter: pydantic's adapter of the annotation.
    """

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self._adapter = adapter
        self._doubling = doubling(adapter.core_schema)
        self._validate = adapter.validate_json if self._doubling is None else self._validate_if_quick
        self._made: SchemaValidator | TypeAdapter[Any] | None = None
        self._hashes_numbers: bool | None = None
        self._times: float | None = None

    def __call__(self, body: bytes | str) -> Any:
        """Return the body as the type of the annotation.

        Raises:
            ValidationError: the body is not JSON, or not valid; for a large body it has the first problems only.
            DecodeError: the body is beyond a limit.
        """
        return self.validate_small(body) if len(body) <= LARGE else self._large(body)

    @property
    def validate_small(self) -> Callable[[bytes | str], Any]:
        """The function that validates bodies of `LARGE` bytes at most."""
        return self._validate

    def _validate_if_quick(self, body: bytes | str) -> Any:
        self._check_work(_as_bytes(body))
        return self._adapter.validate_json(body)

    def _check_work(self, data: bytes) -> None:
        """Check that unions do not make pydantic try more values than the limit allows.

        Raises:
            TooManyValues: pydantic would try more values.
        """
        growth, most = self._doubling, LIMITS.values and LIMITS.values // WORK
        if growth is not None and most is not None and growth.exceeds(_without_strings(data), most):
            raise TooManyValues(
                f"The body is nested so deeply that over {most:,} values would be tried: {growth.members} types of a "
                f"union have the field {growth.field!r}, which holds the union again. Tell the types apart by "
                "Field(discriminator=...)."
            )

    def first_problem(self, body: bytes | str) -> ValidationError | None:
        """Return the first problem of a body; None if this validation finds none."""
        try:
            self._failing_fast.validate_json(body)
        except ValidationError as error:
            return error
        return None

    def _large(self, body: bytes | str) -> Any:
        data = _as_bytes(body)
        if self._times is None:
            self._times = QUICK if is_quick(self._adapter.core_schema) else 1
        try:
            check_values(data, self._times)
        except TooManyValues:
            self._check_beginning(data)
            raise
        self._check_work(data)
        if self._hashes_numbers is None:
            self._hashes_numbers = _has_number_keys(self._adapter.core_schema)
        if self._hashes_numbers:
            _check_hashes(data)
        return self._failing_fast.validate_json(body)

    def _check_beginning(self, data: bytes) -> None:
        """Validate the beginning of a list that is too long: a wrong item tells more than the length does.

        Raises:
            ValidationError: an item at the beginning is not valid.
        """
        try:
            found = from_json(data[:PREFIX], allow_partial=True)
        except ValueError:
            return
        if isinstance(found, list) and len(found) > 1:
            self._failing_fast.validate_json(to_json(found[:-1]))  # the last one is cut off

    @property
    def _failing_fast(self) -> SchemaValidator | TypeAdapter[Any]:
        if self._made is None:
            try:
                # With prebuilt validators, pydantic would validate each model by its class, and ignore our schema.
                self._made = SchemaValidator(failing_fast(self._adapter.core_schema), _use_prebuilt=False)
            except (SchemaError, RecursionError):  # this schema cannot be changed in this way
                self._made = self._adapter
        return self._made


def _as_bytes(body: bytes | str) -> bytes:
    return body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body


def failing_fast(schema: Schema) -> Schema:
    """Return a copy of a core schema: sequences stop at their first wrong item, and sets check hashes first."""
    copy = with_parts(schema, failing_fast)
    if schema.get("type") in ("set", "frozenset"):
        return _with_hashes_checked(copy)
    return {**copy, "fail_fast": True} if schema.get("type") in ("list", "tuple", "deque") else copy


def _with_hashes_checked(schema: Schema) -> Schema:
    """Return a schema that validates a tuple of the items, counts their hashes, and then makes the set.

    It is a tuple and not a list, because a union prefers a list to a set, but ranks a tuple as it ranks a set. The
    tuple schema also accepts a set, which a default may be.
    """
    items = {"type": "tuple", "variadic_item_index": 0, "fail_fast": True, "strict": False}
    items["items_schema"] = [schema.get("items_schema", {"type": "any"})]
    made = _checked_set if schema["type"] == "set" else _checked_frozenset
    checked = {"type": "function-after", "function": {"type": "no-info", "function": made}, "schema": items}
    counted = {name: value for name, value in schema.items() if name not in ("items_schema", "ref")}
    return {"type": "chain", "steps": [checked, counted], **{n: v for n, v in schema.items() if n == "ref"}}


def _checked_set(items: tuple[Any, ...]) -> Any:
    return _checked(items, set)


def _checked_frozenset(items: tuple[Any, ...]) -> Any:
    return _checked(items, frozenset)


def _checked(items: tuple[Any, ...], kind: Callable[[Iterable[Any]], Any]) -> Any:
    """Make the set, unless its items were chosen to have the same hash.

    Raises:
        DecodeError: too many different items have the same hash.
    """
    try:
        if len(items) > MANY:
            _check_hashes_of(items)
        return kind(items)
    except TypeError as error:  # an item has no hash
        raise PydanticKnownError("set_item_not_hashable") from error


def _check_hashes_of(items: tuple[Any, ...]) -> None:
    hashes = list(map(hash, items))
    [(most, number)] = Counter(hashes).most_common(1)
    if number > SAME_HASH:
        _check_distinct(item for item, found in zip(items, hashes, strict=True) if found == most)


def _check_distinct(items: Iterable[Any]) -> None:
    """Check that items with the same hash are mostly equal items.

    Raises:
        DecodeError: too many of them are different.
    """
    distinct: list[Any] = []
    for item in items:
        if item not in distinct:
            distinct.append(item)
            if len(distinct) > SAME_HASH:
                raise DecodeError(_ONE_HASH)


def _has_number_keys(schema: Schema) -> bool:
    """Whether a dict of the schema may have keys that are not texts."""
    return any(
        key == "keys_schema" and part["type"] != "str" for node in nodes(schema) for key, _, part in parts(node)
    )


def _check_hashes(body: bytes) -> None:
    if len(body) - len(body.translate(None, _HEX)) < MANY * 8:  # too few digits for many long numbers, or addresses
        return
    if b"\\u" in body:  # the digits of a number may be escaped
        with suppress(ValueError):
            body = to_json(from_json(body))
    found = _LONG_NUMBER.findall(body)
    if len(found) <= MANY:
        return
    hashes = Counter(number % MODULUS for number in map(_number, found) if number is not None)
    if hashes and hashes.most_common(1)[0][1] > SAME_HASH:
        raise DecodeError(_ONE_HASH)


def _number(text: bytes) -> int | None:
    digits = text.replace(b"-", b"")
    try:
        if b":" in digits:
            return int.from_bytes(socket.inet_pton(socket.AF_INET6, digits.decode()))
        return int(digits) if digits.isdigit() else int(digits, 16)
    except (ValueError, OSError):  # it has more digits than Python converts, or is not an address
        return None
