"""JSON bodies into models, within limits: no message keeps the event loop for long.

The time for a body grows with the values in it, each of which may become an object or a problem. So in a large body

- the values are counted before anything is parsed;
- the first wrong item of a sequence ends the validation, where others would be listed with all their problems;
- numbers that are chosen to have one hash are refused: a set or a dict of many of them takes minutes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaError, SchemaValidator, from_json, to_json

from streamtools.bodies import LIMITS
from streamtools.errors import DecodeError

#: Bytes over which a body is large.
LARGE: Final = 16 * 1024
#: Bytes of a body with too many values in which its first problem is looked for.
PREFIX: Final = 64 * 1024
#: Numbers of one hash that a body may have, where it has more than MANY long ones.
SAME_HASH: Final = 100
MANY: Final = 500
#: Plain data may have so many times as many values as what is validated: they take as much less time.
PLAIN: Final = 5
#: Python's hash of a number is the number modulo this; UUIDs are numbers too.
MODULUS: Final = (1 << 61) - 1
_LONG_NUMBER: Final = re.compile(rb"(?<![0-9a-fA-F-])[0-9a-fA-F-]{19,}")


class TooManyValues(DecodeError):
    """A body has more values than are parsed."""


def check_values(body: bytes, times: int = 1) -> None:
    """Check that a JSON body has no more values than `set_body_limits` says.

    Parameters:
        times: so many times that number are allowed.

    Raises:
        TooManyValues: it has.
    """
    if LIMITS.values is None or len(body) <= LARGE:
        return
    limit = LIMITS.values * times
    if len(body) > limit and _count(body) > limit and _count(_without_strings(body)) > limit:
        raise TooManyValues(
            f"The body has over {limit:,} values, more than are parsed: split it into several messages, or have the "
            "receiving service say set_body_limits(values=...)."
        )


def _count(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _without_strings(body: bytes) -> bytes:
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def parse_json(body: bytes) -> Any:
    """A JSON body as plain data.

    Raises:
        TooManyValues: it has more values than are parsed.
        ValueError: it is not JSON.
    """
    if len(body) > LARGE:
        check_values(body, PLAIN)
    return from_json(body)


class Parser:
    """Validates JSON bodies by an adapter.

    Parameters:
        adapter: of the handler's annotation.
    """

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self._adapter = adapter
        self._validate = adapter.validate_json
        self._made: SchemaValidator | TypeAdapter[Any] | None = None
        self._hashes_numbers: bool | None = None

    def __call__(self, body: bytes | str) -> Any:
        """The body as the annotation says.

        Raises:
            ValidationError: it is not JSON, or not valid; of a large body the first problems.
            DecodeError: it is beyond a limit.
        """
        return self._validate(body) if len(body) <= LARGE else self._large(body)

    def first_problem(self, body: bytes | str) -> ValidationError | None:
        """The first thing that is wrong; None where that cannot be told."""
        try:
            self._failing_fast.validate_json(body)
        except ValidationError as error:
            return error
        return None

    def _large(self, body: bytes | str) -> Any:
        data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
        try:
            check_values(data)
        except TooManyValues:
            self._check_beginning(data)
            raise
        if self._hashes_numbers is None:
            self._hashes_numbers = _has_number_keys(self._adapter.core_schema)
        if self._hashes_numbers:
            _check_hashes(data)
        return self._failing_fast.validate_json(body)

    def _check_beginning(self, data: bytes) -> None:
        """The first problem of a list that is too long: that it is wrong says more than its length."""
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
                self._made = SchemaValidator(failing_fast(self._adapter.core_schema))
            except (SchemaError, RecursionError):  # the schema cannot be changed so
                self._made = self._adapter
        return self._made


def failing_fast(schema: Any) -> Any:
    """A core schema whose sequences end at their first item that is wrong."""
    if isinstance(schema, list):
        return [failing_fast(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: failing_fast(part) for name, part in schema.items()}
    return {**copy, "fail_fast": True} if schema.get("type") in ("list", "set", "frozenset", "tuple") else copy


def _has_number_keys(schema: Any) -> bool:
    """Whether a set, or the keys of a dict, may be anything but texts."""
    if isinstance(schema, list):
        return any(map(_has_number_keys, schema))
    if not isinstance(schema, dict):
        return False
    keys = {"set": "items_schema", "frozenset": "items_schema", "dict": "keys_schema"}.get(str(schema.get("type")))
    if keys is not None and isinstance(schema.get(keys), dict) and schema[keys].get("type") != "str":
        return True
    return any(_has_number_keys(part) for part in schema.values())


def _check_hashes(body: bytes) -> None:
    found = _LONG_NUMBER.findall(body)
    if len(found) <= MANY:
        return
    hashes = Counter(number % MODULUS for number in map(_number, found) if number is not None)
    if hashes and hashes.most_common(1)[0][1] > SAME_HASH:
        raise DecodeError("The body has many numbers with the same hash, which a set or a dict takes minutes for.")


def _number(text: bytes) -> int | None:
    digits = text.replace(b"-", b"")
    try:
        return int(digits) if digits.isdigit() else int(digits, 16)
    except ValueError:  # of more digits than Python converts
        return None
