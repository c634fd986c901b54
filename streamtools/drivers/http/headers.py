"""Metadata and user headers as HTTP headers, and back.

Ours stand under the names of the CloudEvents 1.0 HTTP binding, binary mode (`ce-id`, `ce-type`, ...).
A user header whose name and value can pass as they are is a plain header of its own name. The
others travel together in `streamtools-headers`, percent-encoded as `name=value&name=value`, so
that nothing a user writes can end a line, change the request, or be lost on the way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote

from streamtools.errors import ConfigurationError
from streamtools.message import NO_HEADERS, Message
from streamtools.wire import (
    ATTEMPT,
    ERROR_ATTEMPTS,
    ERROR_TEXT,
    ERROR_TIMES,
    KEY_BYTES,
    TEXT,
    TIMES,
    decode_meta,
    encode_meta,
    read_text,
)

PREFIX: Final = "ce-"
CE_ATTEMPT: Final = PREFIX + ATTEMPT
#: User headers that cannot be plain HTTP headers.
PACKED: Final = "streamtools-headers"
#: CloudEvents 1.0 section 3.1: an event has a type and a source. They stand for "not said".
UNSAID: Final = {"type": "streamtools.Message", "source": "urn:streamtools:anonymous"}
#: Plain user headers of one message; more than these are packed (aiohttp's server takes 128 in all).
PLAIN_LIMIT: Final = 64
#: Headers of the connection or of the body, which are no one's message.
TRANSPORT: Final = frozenset(
    {"accept", "accept-charset", "accept-encoding", "accept-language", "accept-ranges", "connection"}
    | {"content-encoding", "content-length", "content-type", "expect", "host", "http2-settings", "keep-alive"}
    | {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "user-agent", PACKED}
)

#: Headers of HTTP's own for fields of a message.
_NATIVE: Final = {"content-type": "content_type", "content-encoding": "content_encoding"}
_OURS: Final = frozenset(
    PREFIX + name for name in (*TEXT.values(), *TIMES.values(), *ERROR_TEXT.values(), *ERROR_TIMES.values())
) | {PREFIX + "specversion", PREFIX + KEY_BYTES, CE_ATTEMPT, PREFIX + ERROR_ATTEMPTS}
#: RFC 9110, section 5.6.2: a token.
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
#: Printable ASCII without a space at either end, where HTTP would trim it.
_PLAIN: Final = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
#: CloudEvents HTTP binding, section 3.1.3.2: a space, `"`, `%` and what is not printable ASCII are encoded.
_TO_ENCODE: Final = re.compile(r"[^!#$&-~]")
_AS_THEY_ARE: Final = "!#$&'()*+,/:;<=>?@[\\]^`{|}~"


def encode_headers(message: Message) -> dict[str, str]:
    """All headers for a request that carries `message`.

    Raises:
        ConfigurationError: a field of the message holds a lone surrogate.
    """
    found = encode_meta(message, prefix=PREFIX, skip=frozenset(_NATIVE.values()))
    headers = {name: _encode(name, value) for name, value in found.items()}
    headers[PREFIX + "specversion"] = "1.0"
    for name, value in UNSAID.items():
        headers.setdefault(PREFIX + name, value)
    if message.content_type is not None:
        headers["Content-Type"] = _native("content_type", message.content_type)
    if message.content_encoding is not None:
        headers["Content-Encoding"] = _native("content_encoding", message.content_encoding)
    if message.headers:
        _add_user_headers(headers, message.headers)
    return headers


class Headers(dict[str, str]):
    """The user's headers of a request: names as they were spelled, looked up in any case, as HTTP has it."""

    def __missing__(self, name: str) -> str:
        value: str | None = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def get(self, name: str, default: Any = None, /) -> Any:
        """The value of a header; a name spelled like this one goes before others."""
        value = super().get(name)
        if value is not None:
            return value
        lower = name.lower()
        return next((value for other, value in self.items() if other.lower() == lower), default)


def decode_headers(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The fields for `Message(...)`, and the user's headers, of a request.

    Attributes of CloudEvents that we do not know stay with the user's headers, without their percent-encoding. Of a
    header that came several times, in whatever case, the values are joined by ", " (RFC 9110, section 5.3); what
    came plain is not replaced by what was packed.

    Parameters:
        raw: as they came: aiohttp's parsed names have a case of their own.
    """
    meta: dict[str, str] = {}
    native: dict[str, str] = {}
    user = Headers()
    spelled: dict[str, str] = {}
    packed = ""
    for raw_name, raw_value in raw:
        name = raw_name.decode("ascii", "backslashreplace")
        value = read_text(raw_value.strip(b" \t"))
        lower = name.lower()
        if lower in _OURS:
            meta[lower] = _decode(value)
        elif lower in _NATIVE:
            native[_NATIVE[lower]] = value
        elif lower == PACKED:
            packed = value
        elif lower not in TRANSPORT:
            name = spelled.setdefault(lower, name)
            value = _decode(value) if lower.startswith(PREFIX) else value
            user[name] = f"{user[name]}, {value}" if name in user else value
    if packed:
        user.update(pair for pair in parse_qsl(packed, keep_blank_values=True) if pair[0].lower() not in spelled)
    fields = decode_meta(meta, prefix=PREFIX) | native
    for name, value in UNSAID.items():
        if fields.get(name) == value:
            del fields[name]
    return fields, user or NO_HEADERS


def _add_user_headers(headers: dict[str, str], user: Mapping[str, str]) -> None:
    # Names that differ by case alone are one name to HTTP: they are packed, so that both arrive.
    times = Counter(name.lower() for name in user)
    packed = []
    plain = 0
    for name, value in user.items():
        lower = name.lower()
        if plain < PLAIN_LIMIT and times[lower] == 1 and _passes(name, lower, value):
            plain += 1
            headers[name] = value
        else:
            packed.append(f"{quote(name, safe='')}={quote(value, safe='')}")
    if packed:
        headers[PACKED] = "&".join(packed)


def _passes(name: str, lower: str, value: str) -> bool:
    return (
        lower not in TRANSPORT
        and not lower.startswith(PREFIX)
        and _TOKEN.fullmatch(name) is not None
        and _PLAIN.fullmatch(value) is not None
    )


def _encode(name: str, value: str) -> str:
    if _TO_ENCODE.search(value) is None:
        return value
    try:
        return quote(value, safe=_AS_THEY_ARE)
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"The message's {name} holds a lone surrogate, which no wire carries.") from error


def _native(field: str, value: str) -> str:
    if _PLAIN.fullmatch(value) is None:
        raise ConfigurationError(f"{field}={value!r} cannot be an HTTP header: it holds more than printable ASCII.")
    return value


def _decode(value: str) -> str:
    # The binding, section 3.1.3.2: first a quoted string is unquoted, then one round of percent-decoding.
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    return unquote(value)
