"""Encodes payloads into bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Final

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import (
    PydanticSerializationError,
    to_json,
    to_jsonable_python,
)

from streamtools.codec.codecs import encoder_of
from streamtools.codec.media import BINARY, JSON, TEXT

#: Payloads of these types are sent unchanged.
_BYTES_LIKE: Final = (bytes, bytearray, memoryview)
#: The text that pydantic writes for secrets.
MASK: Final = b"*" * 10


def encode(payload: object, content_type: str | None = None) -> tuple[bytes, str]:
    """Return the body and its content type: `str` as UTF-8 text, `bytes` unchanged, everything else as JSON.

    Parameters:
        content_type: encode everything else as this content type instead of JSON, by the codec registered for it.

    Raises:
        TypeError: the payload has no JSON form.
        ConfigurationError: no codec encodes that content type.
    """
    if type(payload) is bytes:
        return payload, BINARY
    if type(payload) is not dict:
        if isinstance(payload, str):
            return _utf8(payload), TEXT
        if isinstance(payload, _BYTES_LIKE):
            return bytes(payload), BINARY
    try:
        if content_type is not None and content_type != JSON:
            body = encoder_of(content_type)(to_jsonable_python(payload))
            if MASK in body:
                _check_secrets(payload)
            return body, content_type
        # Infinity and NaN have no JSON form. Written as strings they are read back as the same float; pydantic's
        # default, null, would lose them.
        body = to_json(payload, inf_nan_mode="strings")
        if body.find(b"null") >= 0:  # find takes half the time of `in`
            # A model writes NaN as null, whatever mode we ask for. Its plain data follow our mode.
            body = to_json(to_jsonable_python(payload), inf_nan_mode="strings")
        if body.find(MASK) >= 0:
            _check_secrets(payload)
        return body, JSON
    except (PydanticSerializationError, UnicodeEncodeError) as error:
        raise TypeError(
            f"A payload of type {type(payload).__name__} cannot be sent: {error}. "
            "Send a pydantic model, a dataclass, plain JSON data, str or bytes."
        ) from error


def _check_secrets(payload: object, place: str = "the payload") -> None:
    """Check that the payload has no secrets: the receiver would get asterisks instead of the value.

    Raises:
        TypeError: the payload has a `SecretStr`, a `SecretBytes` or a `Secret`.
    """
    if isinstance(payload, SecretStr | SecretBytes | Secret):
        raise TypeError(
            f"{place} is a {type(payload).__name__}, which is written as asterisks: send what "
            "get_secret_value() returns if the receiver needs it, or leave the field out (Field(exclude=True))."
        )
    for where, part in _parts(payload, place):
        _check_secrets(part, where)


def _parts(payload: object, place: str) -> Iterable[tuple[str, object]]:
    """Return the parts of a payload, each with a text that says where it stands."""
    kind = type(payload).__name__
    if isinstance(payload, BaseModel):
        sent = (name for name, described in type(payload).model_fields.items() if not described.exclude)
        return [(f"{kind}.{name}", getattr(payload, name, None)) for name in sent]
    if is_dataclass(payload):
        return [(f"{kind}.{part.name}", getattr(payload, part.name, None)) for part in fields(payload)]
    if isinstance(payload, Mapping):
        return [(f"{place}[{name!r}]", part) for name, part in payload.items()]
    if isinstance(payload, list | tuple | set | frozenset):
        return [(f"an item of {place}", part) for part in payload]
    return ()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"A text with a lone surrogate cannot be sent as UTF-8: {error}. Send bytes.") from error
