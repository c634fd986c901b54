"""Content types: which bodies are JSON, and which charset a body has."""

from __future__ import annotations

from typing import Final

from streamtools.message import Message
from streamtools.text.bounded_cache import BoundedCache
from streamtools.validation.bodies import is_known_charset
from streamtools.validation.forms import FORM

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"
BINARY: Final = "application/octet-stream"
#: Media types whose bodies may be JSON or not: SSI agents send both under one type, and `curl -d` calls every body
#: a form.
PERHAPS_JSON: Final = frozenset({"application/ssi-agent-wire", FORM})
#: Several CloudEvents in one body.
BATCH: Final = "application/cloudevents-batch+json"


def is_json(content_type: str) -> bool:
    """Whether bodies of this content type are JSON."""
    media = media_type(content_type)
    return media == JSON or media.endswith("+json")


_MEDIA: Final = BoundedCache(lambda content_type: content_type.partition(";")[0].strip().lower())


def media_type(content_type: str | None) -> str:
    """A content type without its parameters."""
    return "" if content_type is None else _MEDIA[content_type]


def charset_of(message: Message) -> str:
    """Return the charset of the content type, or else of the content encoding, where Celery writes it."""
    _, _, parameters = (message.content_type or "").lower().partition("charset=")
    named = parameters.partition(";")[0].strip(" \"'")
    if not named and message.content_encoding is not None and is_known_charset(message.content_encoding.lower()):
        return message.content_encoding.lower()
    return named or "utf-8"
