"""Payloads to bytes and back: by content type, and by what the handler's annotation asks for."""

from __future__ import annotations

import inspect
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, InstanceOf, Secret, SecretBytes, SecretStr, TypeAdapter, ValidationError
from pydantic_core import (
    PydanticSerializationError,
    to_json,
    to_jsonable_python,
)

from streamtools.errors import ConfigurationError, DecodeError, suggest
from streamtools.message import Message
from streamtools.text.bounded_cache import BoundedCache
from streamtools.validation.bodies import decompressed, is_known_charset, read_characters
from streamtools.validation.forms import FORM, is_form, read_form, validate_form
from streamtools.validation.parsing import LARGE, Parser, parse_json

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
BINARY: Final = "application/octet-stream"
#: Media types whose bodies are read as JSON where they are JSON, else left as bytes: SSI agents' messages are
#: either, and `curl -d` calls every body a form.
PERHAPS_JSON: Final = frozenset({"application/ssi-agent-wire", FORM})

#: What goes untouched.
_BYTES_LIKE: Final = (bytes, bytearray, memoryview)
#: The text that pydantic writes for secrets.
MASK: Final = b"*" * 10
#: Several CloudEvents in one body.
BATCH: Final = "application/cloudevents-batch+json"
#: Problems with one body: how many are listed, and how many the error's text names.
PROBLEMS: Final = 20
SHOWN: Final = 5
#: With more problems than this, only the first is looked for.
COUNTED: Final = 1000
#: Characters of a field's name in a problem.
NAME_SHOWN: Final = 100

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

    Handlers get their models from such bodies as they do from JSON.

    Parameters:
        content_type: a media type, without parameters.
        decode: body -> plain data.
        encode: plain data -> body, for `Bus(content_type=...)`.

    Raises:
        ConfigurationError: it is not a media type, or it is JSON.
    """
    media = media_type(content_type)
    if "/" not in media or ";" in content_type or media == JSON:
        raise ConfigurationError(f"{content_type!r} is no media type of yours: write one as in 'application/yaml'.")
    for function in (decode, encode):
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"{function.__name__} of {content_type!r} is to return the value itself: write it as a plain def."
            )
    _CODECS[media] = Codec(decode, encode)


def check_content_type(content_type: str | None) -> None:
    """What a bus is to send: None, or a content type that has an encoder.

    Raises:
        ConfigurationError: it has none.
    """
    if content_type is not None and content_type != JSON:
        _encoder(content_type)


def _encoder(content_type: str) -> Callable[[Any], bytes]:
    found = _CODECS.get(media_type(content_type))
    if found is None or found.encode is None:
        raise ConfigurationError(
            f"Nothing encodes {content_type!r}: register_codec({content_type!r}, decode, encode) first. "
            + suggest(content_type, [JSON, *(media for media, codec in _CODECS.items() if codec.encode)])
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
    if type(payload) is not dict:
        if isinstance(payload, str):
            return _utf8(payload), TEXT
        if isinstance(payload, _BYTES_LIKE):
            return bytes(payload), BINARY
    try:
        if content_type is not None and content_type != JSON:
            body = _encoder(content_type)(to_jsonable_python(payload))
            if MASK in body:
                _check_secrets(payload)
            return body, content_type
        # Infinity and NaN have no JSON form: as strings they come back as the same float, where
        # the default (null) would lose them.
        body = to_json(payload, inf_nan_mode="strings")
        if body.find(b"null") >= 0:  # which takes half the time of `in`
            # A model serializes NaN in a mode of its own, as null. Its plain data use our mode.
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
    """Check that no secret is in it: the receiver would get asterisks instead of the value.

    Raises:
        TypeError: a `SecretStr`, or the like.
    """
    if isinstance(payload, SecretStr | SecretBytes | Secret):
        raise TypeError(
            f"{place} is a {type(payload).__name__}, which is written as asterisks: send what "
            "get_secret_value() returns if the receiver needs it, or leave the field out (Field(exclude=True))."
        )
    for where, part in _parts(payload, place):
        _check_secrets(part, where)


def _parts(payload: object, place: str) -> Iterable[tuple[str, object]]:
    """The parts of a payload, each with its place in words."""
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


def decode(message: Message) -> Any:
    """The payload by content type: JSON data, text, or bytes; None for a tombstone.

    Without a content type, and with one of `PERHAPS_JSON`, a body that is JSON is read as JSON (as
    CloudEvents does), a form is a mapping of texts, any other is left as bytes.

    Raises:
        DecodeError: the body is not what its content type or its encoding says.
    """
    body = message.body
    if body is None:
        return None
    if message.content_type == JSON and message.content_encoding is None:
        try:
            return parse_json(body)
        except ValueError:  # it may have a byte order mark; else what is wrong is said below
            pass
    return _decode_any(message, body)


def _decode_any(message: Message, body: bytes) -> Any:
    body, media = decompressed(body, message.content_encoding), media_type(message.content_type)
    if media in _CODECS:
        return _decode_by(_CODECS[media], message, body)
    if media == BATCH:
        return read_json(message, _payloads(message, body))
    if is_json(media):
        return read_json(message, body)
    if media.startswith("text/"):
        return read_characters(body, _charset(message))
    if media and media not in PERHAPS_JSON:
        return body
    try:
        return parse_json(body.removeprefix(BOM_UTF8))
    except ValueError:
        return _from_form(body) if media == FORM and is_form(body) else body


def decoder(annotation: Any) -> Decoder:
    """The decoder for a handler whose first parameter has this annotation.

    `bytes` gets the body untouched, `Message` the envelope, no annotation (or Any, object) the
    payload by content type, anything else is validated straight from the bytes by pydantic. Where
    nothing says that the body is JSON, what takes a text gets the text.

    Raises:
        pydantic.PydanticUserError: pydantic cannot validate this annotation.
        pydantic.errors.PydanticUndefinedAnnotation: a name in it, or in its models, is not defined.
    """
    if (plain := bare(annotation)) is not annotation and plain in (bytes, Message, Any, object):
        return _checked(decoder(plain), plain, annotation)
    if annotation is bytes:
        return _body
    if annotation is Message:
        return lambda message: message
    if annotation is Any or annotation is object:
        return decode
    kinds = _kinds(annotation) - {NoneType}
    if kinds == {Message}:
        return lambda message: message
    adapter = TypeAdapter(annotation)
    if not adapter.pydantic_complete:  # a name in it is defined by now, or never: not at the first message
        adapter.rebuild(force=True)
    if kinds == {bytes}:
        return _guarded(lambda message: adapter.validate_python(message.body), adapter, annotation)
    return _guarded(_validator(adapter, annotation), adapter, annotation)


def _kinds(annotation: Any) -> set[Any]:
    """The parts of a union, without the metadata of `Annotated`."""
    annotation = bare(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {NoneType if annotation is None else annotation}


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
    """For annotations that pydantic checks, but does not read from JSON: `Annotated[bytes, Field(max_length=9)]`."""
    checked: Any = Annotated[(InstanceOf[Message] if plain is Message else Any, *_beside(annotation), None)]
    adapter: TypeAdapter[Any] = TypeAdapter(checked)
    return _guarded(lambda message: adapter.validate_python(decode(message)), adapter, annotation)


def _beside(annotation: Any) -> tuple[Any, ...]:
    """What is annotated beside a type, innermost first."""
    if get_origin(annotation) is Annotated:
        return (*_beside(annotation.__origin__), *annotation.__metadata__)
    return _beside(annotation.__value__) if type(annotation).__name__ == "TypeAliasType" else ()


def _validator(adapter: TypeAdapter[Any], annotation: Any) -> Decoder:
    parse = Parser(adapter)
    validate_small = parse.validate_small
    others = _validator_of_others(adapter, parse, str in _kinds(annotation))

    def validate(message: Message) -> Any:
        if (body := message.body) is None or message.content_type != JSON or message.content_encoding is not None:
            return others(message)
        try:
            return validate_small(body) if len(body) <= LARGE else parse(body)
        except ValidationError:
            if body.startswith(BOM_UTF8):
                return others(message)
            raise

    return validate


def _validator_of_others(adapter: TypeAdapter[Any], parse: Parser, takes_text: bool) -> Decoder:
    """For all bodies that are not plain JSON."""

    def validate(message: Message) -> Any:
        if message.body is None:
            return adapter.validate_python(None)
        body, media = decompressed(message.body, message.content_encoding), media_type(message.content_type)
        if media in _CODECS:
            return adapter.validate_python(_decode_by(_CODECS[media], message, body))
        if media.startswith("text/"):
            return _validate_text(adapter, parse, read_characters(body, _charset(message)))
        if media == BATCH:
            return parse(_payloads(message, body))
        if is_json(media):
            return parse(_as_utf8(message, body))
        if media == FORM and not takes_text and is_form(body):
            return validate_form(adapter, body)
        if media.startswith("multipart/"):
            raise DecodeError(
                f"The body is {media}, which is not parsed here: annotate the handler's parameter with bytes or "
                "Message to parse it yourself, or have it sent as JSON or as a plain form."
            )
        return _validate_either(adapter, parse, body, takes_text)

    return validate


def _validate_text(adapter: TypeAdapter[Any], parse: Parser, text: str) -> Any:
    # "5" sent as text is a str for a handler that wants str, and the number 5 for one that wants int.
    try:
        return adapter.validate_python(text)
    except ValidationError:
        return parse(text)


def _validate_either(adapter: TypeAdapter[Any], parse: Parser, body: bytes, takes_text: bool) -> Any:
    """A body that does not say what it is: JSON, else a text, as Kafka's console producer sends it."""
    try:
        return parse(body.removeprefix(BOM_UTF8))
    except ValidationError as error:
        if not takes_text and not _is_no_json(error):
            raise
        with suppress(ValidationError, UnicodeDecodeError):
            return adapter.validate_python(body.decode())
        raise


def _is_no_json(error: ValidationError) -> bool:
    return error.error_count() == 1 and error.errors(include_input=False)[0]["type"] == "json_invalid"


def _guarded(decode: Decoder, adapter: TypeAdapter[Any], annotation: Any) -> Decoder:
    """The same; each failure is a DecodeError."""

    def decode_or_say_why(message: Message) -> Any:
        try:
            return decode(message)
        except ValidationError as error:
            if message.body is None:
                raise _no_body(annotation) from error
            raise _invalid(error, adapter, annotation, message) from error
        except DecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"The body cannot be decoded: {error}") from error

    return decode_or_say_why


def _body(message: Message) -> bytes:
    if message.body is None:
        raise _no_body(bytes)
    return message.body


def _no_body(annotation: Any) -> DecodeError:
    return DecodeError(
        "The message has no body: it is a tombstone, which says that what its key names was deleted, or an event "
        f"without data. Annotate the handler's parameter with {_name(annotation)} | None to receive it as None."
    )


# --- what is wrong ----------------------------------------------------------------------------------


def _invalid(error: ValidationError, adapter: TypeAdapter[Any], annotation: Any, message: Message) -> DecodeError:
    count = error.error_count()
    problems = _problems(error) if count <= COUNTED else _first_problems(adapter, message)
    first = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:SHOWN])
    more = f" and {count - min(SHOWN, len(problems)):,} more problems" if count > max(SHOWN, len(problems)) else ""
    if not more and len(message.body or b"") > LARGE and not _is_no_json(error):
        more = "; there may be more problems"
    text = f"The body is not a valid {_name(annotation)}: {first}{more}"
    if media_type(message.content_type) == BATCH and not (problems and problems[0]["loc"]):
        text += ". It is a batch of CloudEvents: annotate list[...], or have the events sent one by one"
    elif _is_no_json(error):
        text += _no_json(message)
    return DecodeError(text, errors=problems)


def _no_json(message: Message) -> str:
    """What the body is instead of JSON, where it shows or is said."""
    body = message.body or b""
    if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in body[:4]:
        return ". It looks like UTF-16 or binary: have it sent as UTF-8, or with a charset in its content type"
    media = media_type(message.content_type)
    if media and media not in PERHAPS_JSON and not media.startswith("text/") and not is_json(media):
        return (
            f". Its content type is {message.content_type!r}, which nothing reads here: register_codec({media!r}, "
            "...), or annotate the handler's parameter with bytes or Message"
        )
    return ""


def _problems(error: ValidationError) -> list[dict[str, Any]]:
    found = error.errors(include_url=False, include_context=False, include_input=False)[:PROBLEMS]
    return [{**p, "loc": tuple(_brief(part) for part in p["loc"])} for p in found]


def _brief(part: int | str) -> int | str:
    return part if isinstance(part, int) or len(part) <= NAME_SHOWN else part[:NAME_SHOWN] + "…"


def _first_problems(adapter: TypeAdapter[Any], message: Message) -> list[dict[str, Any]]:
    """The first of very many problems: listing all takes seconds, and a gigabyte, for one body of a mebibyte."""
    try:
        error = Parser(adapter).first_problem(_json_of(message))
    except (ValueError, RecursionError):  # the body is not JSON
        return []
    return _problems(error) if error is not None and error.error_count() <= COUNTED else []


def _name(annotation: Any) -> str:
    return getattr(bare(annotation), "__name__", None) or str(bare(annotation))


# --- the parts of a body ----------------------------------------------------------------------------


def _decode_by(codec: Codec, message: Message, body: bytes) -> Any:
    try:
        return codec.decode(body)
    except Exception as error:  # each library has errors of its own
        raise DecodeError(f"The body says {message.content_type} but does not decode: {error}") from error


def read_json(message: Message, body: bytes) -> Any:
    """A body that its content type calls JSON, in the charset that this names.

    Raises:
        DecodeError: it is not JSON.
    """
    try:
        return parse_json(_as_utf8(message, body))
    except ValueError as error:
        raise DecodeError(f"The body says {message.content_type} but is not JSON: {error}") from error


def _as_utf8(message: Message, body: bytes) -> bytes:
    """A JSON body of another charset, or with a byte order mark before it, as the standard has it."""
    charset = _charset(message)
    if charset not in ("utf-8", "utf8"):
        return read_characters(body, charset).encode()
    return body.removeprefix(BOM_UTF8)


def _json_of(message: Message) -> bytes:
    """What is validated of a JSON body: without its encoding, and of a batch the data alone."""
    body = decompressed(message.body or b"", message.content_encoding)
    return _payloads(message, body) if media_type(message.content_type) == BATCH else _as_utf8(message, body)


def _from_form(body: bytes) -> Any:
    try:
        return read_form(body)
    except ValueError:  # bytes that are no text
        return body


def _payloads(message: Message, body: bytes) -> bytes:
    """The data of each event of a batch, as one JSON array."""
    events = read_json(message, body)
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise DecodeError(f"The content type is {message.content_type}, but the body is not an array of CloudEvents.")
    if any("data_base64" in event for event in events):
        raise DecodeError("An event of the batch has data_base64, which a JSON list cannot hold: send it by itself.")
    return to_json([event.get("data") for event in events], inf_nan_mode="strings")


def is_json(content_type: str) -> bool:
    """Whether bodies of this content type are JSON."""
    media = media_type(content_type)
    return media == JSON or media.endswith("+json")


_MEDIA: Final = BoundedCache(lambda content_type: content_type.partition(";")[0].strip().lower())


def media_type(content_type: str | None) -> str:
    """A content type without its parameters."""
    return "" if content_type is None else _MEDIA[content_type]


def _charset(message: Message) -> str:
    """The charset of the content type; else the content encoding if that is a charset, as Celery writes it."""
    _, _, parameters = (message.content_type or "").lower().partition("charset=")
    named = parameters.partition(";")[0].strip(" \"'")
    if not named and message.content_encoding is not None and is_known_charset(message.content_encoding.lower()):
        return message.content_encoding.lower()
    return named or "utf-8"
