"""Payloads to bytes and back: by content type, and by what the handler's annotation asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, get_origin

from pydantic import InstanceOf, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from streamtools.errors import ConfigurationError, DecodeError, near
from streamtools.message import Message

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
BINARY: Final = "application/octet-stream"
#: Media types whose bodies are read as JSON where they are JSON, else left as bytes: SSI agents' messages are
#: either, and `curl -d` calls every body a form.
PERHAPS_JSON: Final = frozenset({"application/ssi-agent-wire", "application/x-www-form-urlencoded"})

#: Turns a message into the payload that a handler asked for.
Decoder = Callable[[Message], Any]


@dataclass(frozen=True, slots=True)
class Codec:
    """How the bodies of one content type are read and written.

    Attributes:
        decode: body -> plain data; any exception of it means that the body is not of this type.
        encode: plain data, as JSON knows it -> body; None where bodies are only read.
    """

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes] | None = None


#: Media type -> codec, beside JSON, text and bytes.
_CODECS: Final[dict[str, Codec]] = {}


def register_codec(
    content_type: str, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes] | None = None
) -> None:
    """Read bodies of this content type from now on, for every handler in this process; replaces an earlier one.

    ```python
    register_codec("application/yaml", yaml.safe_load, lambda data: yaml.safe_dump(data).encode())
    ```

    Handlers have their models from such bodies as they have them from JSON.

    Parameters:
        content_type: a media type, without parameters.
        decode: body -> plain data.
        encode: plain data -> body, for `Bus(content_type=...)`.

    Raises:
        ConfigurationError: it is no media type, or JSON, which is read straight into a handler's model.
    """
    media = _media_type(content_type)
    if "/" not in media or ";" in content_type or media == JSON:
        raise ConfigurationError(f"{content_type!r} is no media type of yours: write one as in 'application/yaml'.")
    _CODECS[media] = Codec(decode, encode)


def check_content_type(content_type: str | None) -> None:
    """What a bus is to send: None, or a content type that has an encoder.

    Raises:
        ConfigurationError: it has none.
    """
    if content_type is not None and content_type != JSON:
        _encoder(content_type)


def _encoder(content_type: str) -> Callable[[Any], bytes]:
    found = _CODECS.get(_media_type(content_type))
    if found is None or found.encode is None:
        raise ConfigurationError(
            f"Nothing encodes {content_type!r}: register_codec({content_type!r}, decode, encode) first. "
            + near(content_type, [JSON, *(media for media, codec in _CODECS.items() if codec.encode)])
        )
    return found.encode


def encode(payload: object, content_type: str | None = None) -> tuple[bytes, str]:
    """The body and its content type: `str` as UTF-8 text, `bytes` untouched, all else as JSON.

    Parameters:
        content_type: what all else is encoded as instead, by its registered codec.

    Raises:
        TypeError: the payload has no JSON form.
        ConfigurationError: nothing encodes that content type.
    """
    if type(payload) is bytes:
        return payload, BINARY
    if isinstance(payload, str):
        return _utf8(payload), TEXT
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload), BINARY
    try:
        if content_type is not None and content_type != JSON:
            return _encoder(content_type)(to_jsonable_python(payload)), content_type
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
    if message.body is None:
        return None
    media = _media_type(message.content_type)
    if media in _CODECS:
        return _decode_by(_CODECS[media], message)
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
    if (plain := bare(annotation)) is not annotation and plain in (bytes, Message, Any, object):
        return _checked(decoder(plain), plain, annotation)
    if annotation is bytes:
        return _body
    if annotation is Message:
        return lambda message: message
    if annotation is Any or annotation is object:
        return decode
    return _validator(TypeAdapter(annotation), annotation)


def bare(annotation: Any) -> Any:
    """An annotation without what is annotated beside, and without its alias."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = annotation.__origin__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def _checked(decode: Decoder, plain: Any, annotation: Any) -> Decoder:
    """For what pydantic does not read from the bytes, but checks: `Annotated[bytes, Field(max_length=9)]`."""
    checked: Any = Annotated[(InstanceOf[Message] if plain is Message else Any, *_beside(annotation), None)]
    adapter: TypeAdapter[Any] = TypeAdapter(checked)

    def check(message: Message) -> Any:
        try:
            return adapter.validate_python(decode(message))
        except ValidationError as error:
            raise _invalid(error, annotation) from error

    return check


def _beside(annotation: Any) -> tuple[Any, ...]:
    """What is annotated beside a type, innermost first."""
    if get_origin(annotation) is Annotated:
        return (*_beside(annotation.__origin__), *annotation.__metadata__)
    return _beside(annotation.__value__) if type(annotation).__name__ == "TypeAliasType" else ()


def _validator(adapter: TypeAdapter[Any], annotation: Any) -> Decoder:
    validate_json = adapter.validate_json

    def validate(message: Message) -> Any:
        try:
            if message.body is None:
                return adapter.validate_python(None)
            if (content_type := message.content_type) is not None and content_type != JSON:
                if _CODECS and (found := _CODECS.get(_media_type(content_type))) is not None:
                    return adapter.validate_python(_decode_by(found, message))
                if content_type.startswith("text/"):
                    return _validate_text(adapter, message)
            return validate_json(message.body)
        except ValidationError as error:
            if message.body is None:
                raise _no_body(annotation) from error
            raise _invalid(error, annotation) from error
        except DecodeError:
            raise
        except ValueError as error:
            raise DecodeError(f"The body cannot be decoded: {error}") from error

    return validate


def _validate_text(adapter: TypeAdapter[Any], message: Message) -> Any:
    # "5" sent as text is a str for a handler that wants str, and the number 5 for one that wants int.
    try:
        return adapter.validate_python(_decode_text(message))
    except ValidationError:
        return adapter.validate_json(message.body or b"")


def _body(message: Message) -> bytes:
    if message.body is None:
        raise _no_body(bytes)
    return message.body


def _no_body(annotation: Any) -> DecodeError:
    name = getattr(bare(annotation), "__name__", str(bare(annotation)))
    return DecodeError(
        f"The message has no body: it is a tombstone, which says that what its key names is no more. Annotate the "
        f"handler's parameter with {name} | None to receive it as None."
    )


def _invalid(error: ValidationError, annotation: Any) -> DecodeError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    name = getattr(bare(annotation), "__name__", str(bare(annotation)))
    first = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:5])
    return DecodeError(f"The body is not a valid {name}: {first}", errors=[dict(p) for p in problems])


def _decode_by(codec: Codec, message: Message) -> Any:
    try:
        return codec.decode(message.body or b"")
    except Exception as error:  # each library has errors of its own
        raise DecodeError(f"The body says {message.content_type} but does not decode: {error}") from error


def _decode_json(message: Message) -> Any:
    try:
        return from_json(message.body or b"")
    except ValueError as error:
        raise DecodeError(f"The body says {message.content_type} but is not JSON: {error}") from error


def _decode_text(message: Message) -> str:
    try:
        return (message.body or b"").decode(_charset(message.content_type))
    except (ValueError, LookupError) as error:  # "undefined" and "\0" are charsets that raise neither of the usual
        raise DecodeError(f"The body says {message.content_type} but does not decode: {error}") from error


def _media_type(content_type: str | None) -> str:
    return "" if content_type is None else content_type.partition(";")[0].strip().lower()


def _charset(content_type: str | None) -> str:
    _, _, parameters = (content_type or "").lower().partition("charset=")
    return parameters.partition(";")[0].strip(" \"'") or "utf-8"
