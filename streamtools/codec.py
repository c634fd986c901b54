"""Payloads to bytes and back: by content type, and by what the handler's annotation asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from streamtools.errors import DecodeError
from streamtools.message import Message

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
BINARY: Final = "application/octet-stream"
#: Media types whose bodies are read as JSON where they are JSON, else left as bytes: SSI agents' messages are
#: either, and `curl -d` calls every body a form.
PERHAPS_JSON: Final = frozenset({"application/ssi-agent-wire", "application/x-www-form-urlencoded"})

#: Turns a message into the payload that a handler asked for.
Decoder = Callable[[Message], Any]


def encode(payload: object) -> tuple[bytes, str]:
    """The body and its content type: `str` as UTF-8 text, `bytes` untouched, all else as JSON.

    Raises:
        TypeError: the payload has no JSON form.
    """
    if isinstance(payload, str):
        return _utf8(payload), TEXT
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload), BINARY
    try:
        # Infinity and NaN have no JSON form: as strings they come back as the same float, where
        # the default (null) would lose them.
        return to_json(payload, inf_nan_mode="strings"), JSON
    except (PydanticSerializationError, UnicodeEncodeError) as error:
        raise TypeError(
            f"A payload of type {type(payload).__name__} cannot be sent: {error}. "
            "Send a pydantic model, a dataclass, plain JSON data, str or bytes."
        ) from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"A text with a lone surrogate cannot be sent as UTF-8: {error}. Send bytes.") from error


def decode(message: Message) -> Any:
    """The payload by content type: JSON data, text, or bytes.

    Without a content type, and with one of `PERHAPS_JSON`, a body that is JSON is read as JSON (as
    CloudEvents does), any other is left as bytes.

    Raises:
        DecodeError: the body is not what its content type says.
    """
    media = _media_type(message.content_type)
    if media == JSON or media.endswith("+json"):
        return _decode_json(message)
    if media.startswith("text/"):
        return _decode_text(message)
    if media and media not in PERHAPS_JSON:
        return message.body
    try:
        return from_json(message.body)
    except ValueError:
        return message.body


def decoder(annotation: Any) -> Decoder:
    """The decoder for a handler whose first parameter has this annotation.

    `bytes` gets the body untouched, `Message` the envelope, no annotation (or Any, object) the
    payload by content type, anything else is validated straight from the bytes by pydantic.

    Raises:
        pydantic.PydanticUserError: pydantic cannot validate this annotation.
    """
    if annotation is bytes:
        return lambda message: message.body
    if annotation is Message:
        return lambda message: message
    if annotation is Any or annotation is object:
        return decode
    return _validator(TypeAdapter(annotation), annotation)


def _validator(adapter: TypeAdapter[Any], annotation: Any) -> Decoder:
    validate_json = adapter.validate_json

    def validate(message: Message) -> Any:
        try:
            if message.content_type is not None and message.content_type.startswith("text/"):
                return _validate_text(adapter, message)
            return validate_json(message.body)
        except ValidationError as error:
            raise _invalid(error, annotation) from error
        except ValueError as error:
            raise DecodeError(f"The body cannot be decoded: {error}") from error

    return validate


def _validate_text(adapter: TypeAdapter[Any], message: Message) -> Any:
    # "5" sent as text is a str for a handler that wants str, and the number 5 for one that wants int.
    try:
        return adapter.validate_python(_decode_text(message))
    except ValidationError:
        return adapter.validate_json(message.body)


def _invalid(error: ValidationError, annotation: Any) -> DecodeError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    name = getattr(annotation, "__name__", str(annotation))
    first = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:5])
    return DecodeError(f"The body is not a valid {name}: {first}", errors=[dict(p) for p in problems])


def _decode_json(message: Message) -> Any:
    try:
        return from_json(message.body)
    except ValueError as error:
        raise DecodeError(f"The body says {message.content_type} but is not JSON: {error}") from error


def _decode_text(message: Message) -> str:
    try:
        return message.body.decode(_charset(message.content_type))
    except (UnicodeDecodeError, LookupError) as error:
        raise DecodeError(f"The body says {message.content_type} but does not decode: {error}") from error


def _media_type(content_type: str | None) -> str:
    return "" if content_type is None else content_type.partition(";")[0].strip().lower()


def _charset(content_type: str | None) -> str:
    _, _, parameters = (content_type or "").lower().partition("charset=")
    return parameters.partition(";")[0].strip(" \"'") or "utf-8"
