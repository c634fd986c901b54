"""Makes smaller copies of a message whose metadata the broker refuses. They keep the body, and say what they lack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from streamtools.message import NO_HEADERS, ErrorDetails, Message
from streamtools.wire import TEXT, TIMES, read_text, read_time

#: The most bytes of UTF-8 of each text in the metadata, on a smaller copy: the limit of AMQP's short strings.
TEXT_LIMIT: Final = 255
#: The most bytes of one header's value, and of all headers together, on a smaller copy.
VALUE_LIMIT: Final = 1024
HEADERS_LIMIT: Final = 8 * 1024
#: The most bytes of a key on a smaller copy.
KEY_LIMIT: Final = 8 * 1024
#: The most bytes of the text that says what was left out.
OMITTED_LIMIT: Final = 500
#: The most names of headers in that text.
NAMED: Final = 5


def brief_copy(message: Message) -> Message:
    """Return the whole message with a short reason of its failure, and without the traceback."""
    return message.replace(error=_error(message, [], TEXT_LIMIT))


def lesser_copies(message: Message) -> Iterator[Message]:
    """Yield two copies with less metadata: one with short texts and headers only, one with the body and error only.

    `error.omitted` of each copy says what it lacks.
    """
    yield _copy(message, TEXT_LIMIT, _short_headers, KEY_LIMIT)
    yield _copy(message, 0, lambda headers: {}, 0)


def _copy(
    message: Message,
    text_limit: int,
    choose: Callable[[Mapping[str, str]], dict[str, str]],
    key_limit: int,
) -> Message:
    omitted: list[str] = []
    fields: dict[str, Any] = {}
    for name in TEXT:
        value = getattr(message, name)
        # The copy is found by its id and delivered by its handler: both stay, if every protocol can carry them.
        limit = max(text_limit, TEXT_LIMIT) if name in ("id", "handler") else text_limit
        limit = key_limit if name == "key" else limit
        if value is not None and not _fits(value, limit):
            omitted.append(f"{name} ({_size(value):,} bytes)")
        else:
            fields[name] = value
    if "id" not in fields:
        fields["id"] = _shortened(message.id)
    for name in TIMES:
        fields[name] = read_time(value) if (value := getattr(message, name)) is not None else None
    headers = choose(message.headers)
    if left := [name for name in message.headers if name not in headers]:
        omitted.append(_left_out(left, message.headers))
    error = _error(message, omitted, text_limit)
    return Message(
        body=message.body, queue=message.queue, exchange=message.exchange, mandatory=message.mandatory,
        attempt=message.attempt, version=message.version, headers=headers or NO_HEADERS, error=error, **fields,
    )  # fmt: skip


def _short_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that every protocol can carry, from the first on, up to the limit."""
    chosen: dict[str, str] = {}
    room = HEADERS_LIMIT
    for name, value in headers.items():
        room -= _size(name) + _size(value)
        if room < 0:
            break
        if _fits(name, TEXT_LIMIT // 2) and _fits(value, VALUE_LIMIT):
            chosen[name] = value
    return chosen


def _left_out(names: list[str], headers: Mapping[str, str]) -> str:
    shown = ", ".join(_shortened(name, 40) for name in names[:NAMED])
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    size = sum(_size(name) + _size(headers[name]) for name in names)
    return f"header{'s' if len(names) > 1 else ''} {shown}{more} ({size:,} bytes)"


def _error(message: Message, omitted: list[str], text_limit: int) -> ErrorDetails:
    """Return the details of the failure, shortened; they also name what is left out now and was left out before."""
    now = time.time()
    old = message.error or ErrorDetails(queue=message.queue, first_failed=now, last_failed=now)
    if old.traceback:
        omitted.append("traceback")
    texts = {name: _shortened(getattr(old, name)) for name in ("queue", "handler", "exception", "reason")}
    if not text_limit:
        texts["handler"] = texts["exception"] = ""
    words = "; ".join(filter(None, (old.omitted, *omitted)))
    times = {name: read_time(getattr(old, name)) or 0.0 for name in ("first_failed", "last_failed")}
    return replace(old, traceback="", omitted=_shortened(words, OMITTED_LIMIT), **texts, **times)  # type: ignore[arg-type]


def _fits(value: str | bytes, limit: int) -> bool:
    if isinstance(value, bytes):
        return len(value) <= limit
    return len(value) <= limit and _size(value) <= limit and read_text(value) == value


def _size(value: str | bytes) -> int:
    return len(value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass"))


def _shortened(text: str, limit: int = TEXT_LIMIT) -> str:
    data = read_text(text).encode()
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"
