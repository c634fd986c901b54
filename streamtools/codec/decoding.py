"""Decodes bodies into plain data, by content type."""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import Any

from pydantic_core import (
    to_json,
)

from streamtools.codec.codecs import CODECS, Codec
from streamtools.codec.media import BATCH, JSON, PERHAPS_JSON, charset_of, is_json, media_type
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.validation.bodies import decompressed, read_characters
from streamtools.validation.forms import FORM, is_form, read_form
from streamtools.validation.parsing import parse_json


def decode(message: Message) -> Any:
    """Return the payload of a message, by its content type: JSON data, text, or bytes; None for a tombstone.

    If the message has no content type, or one of `PERHAPS_JSON`, the body is read as JSON if it is JSON (CloudEvents
    does the same). Otherwise a form becomes a mapping of texts, and any other body stays bytes.

    Raises:
        DecodeError: the body does not match its content type or its content encoding.
    """
    body = message.body
    if body is None:
        return None
    if message.content_type == JSON and message.content_encoding is None:
        try:
            return parse_json(body)
        except ValueError:  # it may have a byte order mark; if not, _decode_any raises the DecodeError
            pass
    return _decode_any(message, body)


def _decode_any(message: Message, body: bytes) -> Any:
    body, media = decompressed(body, message.content_encoding), media_type(message.content_type)
    if media in CODECS:
        return decode_by(CODECS[media], message, body)
    if media == BATCH:
        return read_json(message, payloads(message, body))
    if is_json(media):
        return read_json(message, body)
    if media.startswith("text/"):
        return read_characters(body, charset_of(message))
    if media and media not in PERHAPS_JSON:
        return body
    try:
        return parse_json(body.removeprefix(BOM_UTF8))
    except ValueError:
        return _from_form(body) if media == FORM and is_form(body) else body


def decode_by(codec: Codec, message: Message, body: bytes) -> Any:
    try:
        return codec.decode(body)
    except Exception as error:  # each library has errors of its own
        raise DecodeError(
            f"The content type is {message.content_type}, but the body cannot be decoded: {error}"
        ) from error


def read_json(message: Message, body: bytes) -> Any:
    """Return the data of a body whose content type is JSON, decoded in the charset of the content type.

    Raises:
        DecodeError: the body is not JSON.
    """
    try:
        return parse_json(as_utf8(message, body))
    except ValueError as error:
        raise DecodeError(f"The content type is {message.content_type}, but the body is not JSON: {error}") from error


def as_utf8(message: Message, body: bytes) -> bytes:
    """Return a JSON body as UTF-8 without a byte order mark, whatever its charset is."""
    charset = charset_of(message)
    if charset not in ("utf-8", "utf8"):
        return read_characters(body, charset).encode()
    return body.removeprefix(BOM_UTF8)


def json_of(message: Message) -> bytes:
    """Return the JSON that is validated: the decompressed body; for a batch, the data of its events."""
    body = decompressed(message.body or b"", message.content_encoding)
    return payloads(message, body) if media_type(message.content_type) == BATCH else as_utf8(message, body)


def _from_form(body: bytes) -> Any:
    try:
        return read_form(body)
    except ValueError:  # bytes that are no text
        return body


def payloads(message: Message, body: bytes) -> bytes:
    """Return the data of all events of a batch, as one JSON array."""
    events = read_json(message, body)
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise DecodeError(f"The content type is {message.content_type}, but the body is not an array of CloudEvents.")
    if any("data_base64" in event for event in events):
        raise DecodeError(
            "An event of the batch has data_base64, which a JSON list cannot hold: send that event by itself."
        )
    return to_json([event.get("data") for event in events], inf_nan_mode="strings")
