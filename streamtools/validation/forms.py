"""Reads forms: bodies of `application/x-www-form-urlencoded`, and queries of URLs, which have the same syntax."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlencode

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

FORM: Final = "application/x-www-form-urlencoded"

#: The most fields of one form.
MOST: Final = 10_000
#: `curl -d` calls every body a form. A real one begins with a name and "="; XML, YAML and plain text do not.
_FORM: Final = re.compile(rb"[^\s<>\"{}=]*=")
#: Percent-encoded bytes that follow each other.
_ESCAPED: Final = re.compile(rb"(?:%[0-9A-Fa-f]{2})+")
#: Validation errors that say: a list is expected, and the form has a single value.
_LISTS: Final = frozenset({"list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type", "sequence_str"})


def is_form(body: bytes) -> bool:
    """Whether a body with the content type of forms looks like a form."""
    return not body or _FORM.match(body) is not None


def read_form(body: bytes) -> dict[str, str | list[str]]:
    """Return the fields by name; a name that stands several times has a list of values.

    Raises:
        ValueError: the form is not percent-encoded UTF-8, or has too many fields.
    """
    return _by_name(read_pairs(body))


def read_pairs(body: bytes) -> list[tuple[str, str]]:
    """Return the names and values of the fields, in their order.

    Raises:
        ValueError: the form is not percent-encoded UTF-8, or has too many fields.
    """
    # urllib's parse_qsl takes far longer for each "%" and for each byte beyond ASCII, which some programs do not
    # percent-encode.
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
    """Return the fields as a form, percent-encoded where necessary."""
    return urlencode(list(pairs)).encode()


def validate_form(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """Validate the fields by a handler's annotation; where it takes a list, a single value becomes a list of one.

    Raises:
        ValidationError: the fields do not fit the annotation.
        ValueError: the form is not percent-encoded UTF-8, or has too many fields.
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
