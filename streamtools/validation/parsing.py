"""JSON bodies into models, within limits: no message keeps the event loop for long.

The time for a body grows with the values in it, each of which may become an object or a problem. So in a large body

- the values are counted before anything is parsed;
- the first wrong item of a sequence ends the validation, where others would be listed with all their problems;
- numbers that are chosen to have one hash are refused: a set or a dict of many of them takes minutes.
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

#: Bytes over which a body is large.
LARGE: Final = 16 * 1024
#: Bytes of a body in which values are counted at once.
PORTION: Final = 256 * 1024
#: Bytes of a body with too many values in which its first problem is looked for.
PREFIX: Final = 64 * 1024
#: Numbers of one hash that a body may have, where it has more than MANY long ones.
SAME_HASH: Final = 100
MANY: Final = 500
#: An object that is tried takes so many times as long as a value that is parsed.
WORK: Final = 2
#: Plain data may have so many times as many values as what is validated: they take as much less time.
PLAIN: Final = 5
#: So many times as many values are parsed where all types are quick ones.
QUICK: Final = 1.5
#: Python's hash of a number is the number modulo this; UUIDs are numbers too.
MODULUS: Final = (1 << 61) - 1
#: An integer or a UUID of many digits, or an IPv6 address.
_LONG_NUMBER: Final = re.compile(
    rb"(?<![0-9a-fA-F:-])(?:[0-9a-fA-F-]{19,}|[0-9a-fA-F]*:[0-9a-fA-F:]+)(?![0-9a-fA-F:])"
)
_HEX: Final = b"0123456789abcdefABCDEF"
_ONE_HASH: Final = "The body has many values with the same hash, which a set or a dict takes minutes for."


class TooManyValues(DecodeError):
    """A body has more values than are parsed."""


def check_values(body: bytes, times: float = 1) -> None:
    """Check that a JSON body has no more values than `set_body_limits` says.

    Parameters:
        times: so many times that number are allowed.

    Raises:
        TooManyValues: it has.
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
    """Whether it has more values than the limit; what stands in texts is none. It looks no further than it has to."""
    found = place = within = 0
    while place < len(body) and found <= limit:
        end = place + PORTION
        while body[end - 1 : end] == b"\\":  # an escape is not cut
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
        self._doubling = doubling(adapter.core_schema)
        self._validate = adapter.validate_json if self._doubling is None else self._validate_if_quick
        self._made: SchemaValidator | TypeAdapter[Any] | None = None
        self._hashes_numbers: bool | None = None
        self._times: float | None = None

    def __call__(self, body: bytes | str) -> Any:
        """The body as the annotation says.

        Raises:
            ValidationError: it is not JSON, or not valid; of a large body the first problems.
            DecodeError: it is beyond a limit.
        """
        return self.validate_small(body) if len(body) <= LARGE else self._large(body)

    @property
    def validate_small(self) -> Callable[[bytes | str], Any]:
        """What validates bodies of `LARGE` bytes at most."""
        return self._validate

    def _validate_if_quick(self, body: bytes | str) -> Any:
        self._check_work(_as_bytes(body))
        return self._adapter.validate_json(body)

    def _check_work(self, data: bytes) -> None:
        """Check that no more values are tried than are parsed.

        Raises:
            TooManyValues: there are more.
        """
        growth, most = self._doubling, LIMITS.values and LIMITS.values // WORK
        if growth is not None and most is not None and growth.exceeds(_without_strings(data), most):
            raise TooManyValues(
                f"The body is nested so deeply that over {most:,} values would be tried: {growth.members} types of a "
                f"union have the field {growth.field!r}, in which it stands again. Tell them apart by "
                "Field(discriminator=...)."
            )

    def first_problem(self, body: bytes | str) -> ValidationError | None:
        """The first thing that is wrong; None where that cannot be told."""
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
                # Else a model within is validated by the validator of its class, which was made of its own schema.
                self._made = SchemaValidator(failing_fast(self._adapter.core_schema), _use_prebuilt=False)
            except (SchemaError, RecursionError):  # the schema cannot be changed so
                self._made = self._adapter
        return self._made


def _as_bytes(body: bytes | str) -> bytes:
    return body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body


def failing_fast(schema: Schema) -> Schema:
    """A core schema whose sequences end at their first item that is wrong, and whose sets look at hashes first."""
    copy = with_parts(schema, failing_fast)
    if schema.get("type") in ("set", "frozenset"):
        return _with_hashes_checked(copy)
    return {**copy, "fail_fast": True} if schema.get("type") in ("list", "tuple", "deque") else copy


def _with_hashes_checked(schema: Schema) -> Schema:
    """The schema of a set: first a tuple of its items, whose hashes are counted, then the set.

    A union prefers a list to a set. It has to see a tuple therefore, which is to it as a set is. It takes a set as
    well, which a default may be.
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
    """The set of items that are not chosen to have one hash.

    Raises:
        DecodeError: they are.
    """
    try:
        if len(items) > MANY:
            _check_hashes_of(items)
        return kind(items)
    except TypeError as error:  # one has no hash
        raise PydanticKnownError("set_item_not_hashable") from error


def _check_hashes_of(items: tuple[Any, ...]) -> None:
    hashes = list(map(hash, items))
    [(most, number)] = Counter(hashes).most_common(1)
    if number > SAME_HASH:
        _check_distinct(item for item, found in zip(items, hashes, strict=True) if found == most)


def _check_distinct(items: Iterable[Any]) -> None:
    """Check that items of one hash are mostly the same ones."""
    distinct: list[Any] = []
    for item in items:
        if item not in distinct:
            distinct.append(item)
            if len(distinct) > SAME_HASH:
                raise DecodeError(_ONE_HASH)


def _has_number_keys(schema: Schema) -> bool:
    """Whether the keys of a dict may be anything but texts."""
    return any(
        key == "keys_schema" and part["type"] != "str" for node in nodes(schema) for key, _, part in parts(node)
    )


def _check_hashes(body: bytes) -> None:
    if len(body) - len(body.translate(None, _HEX)) < MANY * 8:  # too few digits for many long numbers, or addresses
        return
    if b"\\u" in body:  # what is escaped is no less a number
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
    except (ValueError, OSError):  # of more digits than Python converts; no address
        return None
