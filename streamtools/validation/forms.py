"""Forms: bodies of `application/x-www-form-urlencoded`, and queries, which are written the same way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlencode

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

FORM: Final = "application/x-www-form-urlencoded"

#: Fields of one form, at most.
MOST: Final = 10_000
#: `curl -d` calls every body a form. A real one begins with a name and "="; XML, YAML and plain text do not.
_FORM: Final = re.compile(rb"[^\s<>\"{}=]*=")
#: As many escapes as follow each other.
_ESCAPED: Final = re.compile(rb"(?:%[0-9A-Fa-f]{2})+")
#: Problems to ignore where one value stands for a list of one.
_LISTS: Final = frozenset({"list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type", "sequence_str"})


def is_form(body: bytes) -> bool:
    """Whether a body that is called a form looks like one."""
    return not body or _FORM.match(body) is not None


def read_form(body: bytes) -> dict[str, str | list[str]]:
    """The fields by name; those of a name that comes several times are a list.

    Raises:
        ValueError: it is not percent-encoded UTF-8, or has too many fields.
    """
    return _by_name(read_pairs(body))


def read_pairs(body: bytes) -> list[tuple[str, str]]:
    """The fields in order.

    Raises:
        ValueError: it is not percent-encoded UTF-8, or has too many fields.
    """
    # Not urllib's parse_qsl, which takes far longer for each "%" and for each byte beyond ASCII. Some programs leave
    # characters beyond ASCII as they are.
    if body.count(b"&") >= MOST:
        raise ValueError(f"the form has over {MOST:,} fields")
    pieces = (piece.partition(b"=") for piece in body.split(b"&") if piece)
    return [(_decoded(name), _decoded(value)) for name, _, value in pieces]


def _decoded(text: bytes) -> str:
    text = text.replace(b"+", b" ")
    return (_ESCAPED.sub(_unescaped, text) if b"%" in text else text).decode()


def _unescaped(found: re.Match[bytes]) -> bytes:
    return bytes.fromhex(found[0].replace(b"%", b"").decode())


def write_form(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Fields as a form; names and values that need it are percent-encoded."""
    return urlencode(list(pairs)).encode()


def validate_form(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """The fields validated by a handler's annotation; a single value is a list of one where a list is expected.

    Raises:
        ValidationError: they do not fit.
        ValueError: it is not percent-encoded UTF-8.
    """
    fields: dict[str, Any] = read_form(body)
    try:
        return adapter.validate_json(to_json(fields))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        names = {p["loc"][0] for p in problems if p["loc"] and p["type"] in _LISTS}
        single = {name: [value] for name, value in fields.items() if name in names and isinstance(value, str)}
        if not single:
            raise
        return adapter.validate_json(to_json(fields | single))


def _by_name(pairs: Iterable[tuple[str, str]]) -> dict[str, str | list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
