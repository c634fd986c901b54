"""Explains why a body does not fit the handler's annotation."""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from typing import Annotated, Any, Final, get_origin

from pydantic import TypeAdapter, ValidationError

from streamtools.codec.decoding import json_of
from streamtools.codec.media import BATCH, PERHAPS_JSON, is_json, media_type
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.validation.parsing import LARGE, Parser

#: How many problems of one body a DecodeError lists, and how many of them its text names.
PROBLEMS: Final = 20
SHOWN: Final = 5
#: If a body has more problems than this, only its first one is reported.
COUNTED: Final = 1000
#: A longer name of a field is cut to this number of characters.
NAME_SHOWN: Final = 100


def invalid(error: ValidationError, adapter: TypeAdapter[Any], annotation: Any, message: Message) -> DecodeError:
    count = error.error_count()
    problems = _problems(error) if count <= COUNTED else _first_problems(adapter, message)
    first = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems[:SHOWN])
    more = f" and {count - min(SHOWN, len(problems)):,} more problems" if count > max(SHOWN, len(problems)) else ""
    if not more and len(message.body or b"") > LARGE and not is_no_json(error):
        more = "; there may be more problems"
    text = f"The body is not a valid {_name(annotation)}: {first}{more}"
    if media_type(message.content_type) == BATCH and not (problems and problems[0]["loc"]):
        text += ". The body is a batch of CloudEvents: annotate list[...], or have the events sent one by one"
    elif is_no_json(error):
        text += _no_json(message)
    return DecodeError(text, errors=problems)


def no_body(annotation: Any) -> DecodeError:
    return DecodeError(
        "The message has no body: it is a tombstone, which says that what its key names was deleted, or an event "
        f"without data. To receive such a message as None, annotate the handler's parameter with "
        f"{_name(annotation)} | None."
    )


def _no_json(message: Message) -> str:
    """Say what the body is instead of JSON, if its first bytes or its content type show it."""
    body = message.body or b""
    if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in body[:4]:
        return ". It looks like UTF-16 or binary: have it sent as UTF-8, or with a charset in its content type"
    media = media_type(message.content_type)
    if media and media not in PERHAPS_JSON and not media.startswith("text/") and not is_json(media):
        return (
            f". Its content type is {message.content_type!r}, for which there is no codec: register_codec({media!r}, "
            "...), or annotate the handler's parameter with bytes or Message"
        )
    return ""


def is_no_json(error: ValidationError) -> bool:
    return error.error_count() == 1 and error.errors(include_input=False)[0]["type"] == "json_invalid"


def _problems(error: ValidationError) -> list[dict[str, Any]]:
    found = error.errors(include_url=False, include_context=False, include_input=False)[:PROBLEMS]
    return [{**p, "loc": tuple(_brief(part) for part in p["loc"])} for p in found]


def _brief(part: int | str) -> int | str:
    return part if isinstance(part, int) or len(part) <= NAME_SHOWN else part[:NAME_SHOWN] + "…"


def _first_problems(adapter: TypeAdapter[Any], message: Message) -> list[dict[str, Any]]:
    """Return only the first of very many problems: for a body of 1 MiB, listing all takes seconds and a gigabyte."""
    try:
        error = Parser(adapter).first_problem(json_of(message))
    except (ValueError, RecursionError):  # the body is not JSON
        return []
    return _problems(error) if error is not None and error.error_count() <= COUNTED else []


def _name(annotation: Any) -> str:
    return getattr(bare(annotation), "__name__", None) or str(bare(annotation))


def bare(annotation: Any) -> Any:
    """Return an annotation without the metadata of `Annotated`, and with type aliases resolved."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = annotation.__origin__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation
