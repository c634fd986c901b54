"""Validates bodies by the handler's annotation."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable
from contextlib import suppress
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import InstanceOf, TypeAdapter, ValidationError

from streamtools.codec.codecs import CODECS
from streamtools.codec.decoding import as_utf8, decode, decode_by, payloads
from streamtools.codec.media import BATCH, JSON, charset_of, is_json, media_type
from streamtools.codec.problems import bare, invalid, is_no_json, no_body
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.validation.bodies import decompressed, read_characters
from streamtools.validation.forms import FORM, is_form, validate_form
from streamtools.validation.parsing import LARGE, Parser

#: Turns a message into the payload that the handler takes.
Decoder = Callable[[Message], Any]


def decoder(annotation: Any) -> Decoder:
    """Return the decoder for a handler whose first parameter has this annotation.

    A parameter annotated with `bytes` gets the body unchanged, one with `Message` the whole message, one without
    annotation (or with Any or object) the payload by content type. For any other annotation pydantic validates the
    bytes. If the content type does not say JSON, an annotation that takes a text can get the body as text.

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
    if not adapter.pydantic_complete:  # an undefined name is reported now, not at the first message
        adapter.rebuild(force=True)
    if kinds == {bytes}:
        return _guarded(lambda message: adapter.validate_python(message.body), adapter, annotation)
    return _guarded(_validator(adapter, annotation), adapter, annotation)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types of a union, without the metadata of `Annotated`."""
    annotation = bare(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    return {NoneType if annotation is None else annotation}


def _checked(decode: Decoder, plain: Any, annotation: Any) -> Decoder:
    """Return a decoder whose result pydantic checks by the metadata of `Annotated[bytes, Field(max_length=9)]`."""
    checked: Any = Annotated[(InstanceOf[Message] if plain is Message else Any, *_beside(annotation), None)]
    adapter: TypeAdapter[Any] = TypeAdapter(checked)
    return _guarded(lambda message: adapter.validate_python(decode(message)), adapter, annotation)


def _beside(annotation: Any) -> tuple[Any, ...]:
    """Return the metadata of `Annotated` and of the aliases in it, innermost first."""
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
    """Return the decoder of all bodies that are not plain JSON."""

    def validate(message: Message) -> Any:
        if message.body is None:
            return adapter.validate_python(None)
        body, media = decompressed(message.body, message.content_encoding), media_type(message.content_type)
        if media in CODECS:
            return adapter.validate_python(decode_by(CODECS[media], message, body))
        if media.startswith("text/"):
            return _validate_text(adapter, parse, read_characters(body, charset_of(message)))
        if media == BATCH:
            return parse(payloads(message, body))
        if is_json(media):
            return parse(as_utf8(message, body))
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
    # The text "5" becomes a str for a handler that takes a str, and the number 5 for one that takes an int.
    try:
        return adapter.validate_python(text)
    except ValidationError:
        return parse(text)


def _validate_either(adapter: TypeAdapter[Any], parse: Parser, body: bytes, takes_text: bool) -> Any:
    """Validate a body of unknown content type: as JSON, or else as text, which Kafka's console producer sends."""
    try:
        return parse(body.removeprefix(BOM_UTF8))
    except ValidationError as error:
        if not takes_text and not is_no_json(error):
            raise
        with suppress(ValidationError, UnicodeDecodeError):
            return adapter.validate_python(body.decode())
        raise


def _guarded(decode: Decoder, adapter: TypeAdapter[Any], annotation: Any) -> Decoder:
    """Return a decoder that raises each failure of this one as a DecodeError."""

    def decode_or_say_why(message: Message) -> Any:
        try:
            return decode(message)
        except ValidationError as error:
            if message.body is None:
                raise no_body(annotation) from error
            raise invalid(error, adapter, annotation, message) from error
        except DecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise DecodeError(f"The body cannot be decoded: {error}") from error

    return decode_or_say_why


def _body(message: Message) -> bytes:
    if message.body is None:
        raise no_body(bytes)
    return message.body
