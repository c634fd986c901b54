"""Reads structured CloudEvents: messages whose body holds the event and its attributes as JSON.

A producer that speaks CloudEvents 1.0 in structured mode (`application/cloudevents+json`) puts id, type, source and
time into the body, together with the data. The handler gets the message as in binary mode: the attributes become
fields of the message, the data becomes the body.
"""

from __future__ import annotations

import base64
from typing import Any, Final

from pydantic_core import to_json

from streamtools import codec
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.validation.bodies import decompressed
from streamtools.wire import decode_meta, read_text

#: Prefix of a header for an attribute that has no field in Message; the same as on HTTP.
PREFIX: Final = "ce-"
#: Fields that an envelope may set; it must not set the attempt and the error of a message.
FIELDS: Final = frozenset(
    {"id", "type", "source", "time", "content_type", "correlation_id", "causation_id", "reply_to", "intent", "key"}
    | {"version", "expires_at"}
)
#: Attributes that do not become headers.
_NO_HEADERS: Final = frozenset({"specversion", "data", "data_base64", "datacontentencoding"})


def unwrapped(message: Message) -> Message:
    """Return the message inside an envelope; it keeps the headers, queue and attempt of the outer message.

    Raises:
        DecodeError: the body is not a CloudEvent.
    """
    event = _event(message)
    meta = {name: text for name, value in event.items() if (text := _as_text(value)) is not None}
    fields = {name: value for name, value in decode_meta(meta).items() if name in FIELDS}
    if not fields.get("id"):  # the id is missing or empty
        fields["id"] = message.id
    body, content_type = event_data(event)
    headers = dict(message.headers)
    for name, text in meta.items():
        if name not in _NO_HEADERS and not _is_field(name):
            headers.setdefault(PREFIX + name, read_text(text))
    return message.replace(
        **{**fields, "body": body, "content_type": content_type, "content_encoding": None, "headers": headers}
    )


def event_type(message: Message) -> str | None:
    """Return the type of the event in an envelope; None if the body is not an event."""
    try:
        kind = _event(message).get("type")
    except DecodeError:
        return None
    return kind if isinstance(kind, str) else None


def event_data(event: dict[str, Any]) -> tuple[bytes | None, str | None]:
    """Return the data of an event as a body, and its content type; the body is None if the event has no data.

    Raises:
        DecodeError: `data_base64` is not base64.
    """
    kind = event.get("datacontenttype")
    content_type = read_text(kind) if isinstance(kind, str) else None
    if (encoded := event.get("data_base64")) is not None:
        try:
            return base64.b64decode(encoded, validate=True), content_type or codec.BINARY
        except (ValueError, TypeError) as error:
            raise DecodeError(f"The CloudEvent's data_base64 is not base64: {error}.") from error
    if "data" not in event:
        return None, content_type
    data = event["data"]
    if isinstance(data, str) and content_type is not None and not codec.is_json(content_type):
        # JSON has decoded this text already, so a charset in the content type no longer applies.
        return read_text(data).encode(), f"{codec.media_type(content_type)}; charset=utf-8"
    return to_json(data, inf_nan_mode="strings"), content_type or codec.JSON


def _event(message: Message) -> dict[str, Any]:
    event = codec.read_json(message, decompressed(message.body or b"", message.content_encoding))
    if not isinstance(event, dict) or not isinstance(event.get("specversion"), str):
        raise DecodeError(
            f"The content type is {message.content_type}, but the body is not a CloudEvent: an object with "
            "specversion, id, source and type, and the payload in data."
        )
    return event


def _as_text(value: object) -> str | None:
    """Return an attribute as text; None if it is no string, integer or boolean (CloudEvents 1.0, section 3)."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else None


def _is_field(name: str) -> bool:
    return bool(FIELDS & decode_meta({name: "1"}).keys())
