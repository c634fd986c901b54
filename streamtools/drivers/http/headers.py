"""Metadata and user headers as HTTP headers, and back.

Ours stand under the names of the CloudEvents 1.0 HTTP binding, binary mode (`ce-id`, `ce-type`, ...).
A user header whose name and value can pass as they are is a plain header of its own name. The
others travel together in `streamtools-headers`, percent-encoded as `name=value&name=value`, so
that nothing a user writes can end a line, change the request, or be lost on the way.

A proxy that sets or removes a header (`X-Forwarded-User`) knows nothing of what is packed. So a packed header whose
name could be a plain one counts only where the plain one is there as well and says so: its value is then
`streamtools-headers`. A proxy that removes or replaces that one has the last word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote

from multidict import MultiMapping

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
    VERSION,
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
#: Headers of one message whose names are those of HTTP; our server takes a few more in all.
PLAIN_LIMIT: Final = 1000
#: Headers of the connection or of the body, which are no one's message.
TRANSPORT: Final = frozenset(
    {"accept", "accept-charset", "accept-encoding", "accept-language", "accept-ranges", "connection"}
    | {"content-encoding", "content-length", "content-type", "expect", "host", "http2-settings", "keep-alive"}
    | {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "user-agent", PACKED}
)

#: Headers of HTTP's own for fields of a message.
_NATIVE: Final = {"content-type": "content_type", "content-encoding": "content_encoding"}
#: Headers that say nothing about a message, as they come.
_NO_ONES: Final = frozenset(name.encode() for name in TRANSPORT - _NATIVE.keys() - {PACKED})
_OURS: Final = frozenset(
    PREFIX + name for name in (*TEXT.values(), *TIMES.values(), *ERROR_TEXT.values(), *ERROR_TIMES.values())
) | {PREFIX + name for name in ("specversion", KEY_BYTES, ATTEMPT, VERSION, ERROR_ATTEMPTS)}
#: Names that no plain header of a user's has: HTTP or we ourselves give them a meaning.
_NEVER_PLAIN: Final = TRANSPORT | _OURS | {"origin", "sec-fetch-site"}
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


def transfer_coding(headers: MultiMapping[str]) -> str | None:
    """What a body is encoded as for its way, where that is not `chunked` alone, which aiohttp undoes; None else."""
    if "Transfer-Encoding" not in headers:
        return None
    found = ",".join(headers.getall("Transfer-Encoding"))
    names = [name for part in found.split(",") if (name := part.strip(" \t").lower())]
    return None if names in ([], ["chunked"]) else ", ".join(names)[:100]


def decode_headers(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The fields for `Message(...)`, and the user's headers, of a request.

    Attributes of CloudEvents that we do not know stay with the user's headers, without their percent-encoding. Of a
    header that came several times, in whatever case, the values are joined by ", " (RFC 9110, section 5.3). What was
    packed counts only where the plain header says so, or where its name is none that HTTP would deliver.

    Parameters:
        raw: as they came: aiohttp's parsed names have a case of their own.
    """
    meta: dict[str, str] = {}
    native: dict[str, str] = {}
    user = Headers()
    spelled: dict[str, str] = {}
    packed = ""
    for raw_name, raw_value in raw:
        if raw_name.lower() in _NO_ONES:
            continue
        name = raw_name.decode("ascii", "backslashreplace")
        value = read_text(raw_value.strip(b" \t"))
        lower = name.lower()
        if lower in _OURS:
            meta[lower] = _decode(value)
        elif lower in _NATIVE:
            field = _NATIVE[lower]
            # Of encodings, each is applied upon those before; a body has one type.
            native[field] = f"{native[field]}, {value}" if lower == "content-encoding" and field in native else value
        elif lower == PACKED:
            packed = value
        else:
            name = spelled.setdefault(lower, name)
            value = _decode(value) if lower.startswith(PREFIX) else value
            user[name] = f"{user[name]}, {value}" if name in user else value
    if packed:
        _unpack(packed, user, spelled)
    fields = decode_meta(meta, prefix=PREFIX) | native
    for name, value in UNSAID.items():
        if fields.get(name) == value:
            del fields[name]
    return fields, user or NO_HEADERS


def size_of(raw: Iterable[tuple[bytes, bytes]]) -> int:
    """Bytes that the headers of a request take, as they stand on the wire."""
    size = 0
    for name, value in raw:
        size += len(name) + len(value)
    return size


def meta_size(raw: Iterable[tuple[bytes, bytes]]) -> int:
    """Bytes that the metadata of a request takes, as it stands on the wire."""
    return size_of(each for each in raw if each[0].decode("latin-1").lower() in _OURS)


def _unpack(packed: str, user: Headers, spelled: Mapping[str, str]) -> None:
    """Add the packed headers to those that came plain.

    Parameters:
        spelled: the plain ones: names in lower case -> as they stand in `user`.
    """
    named = {lower for lower, name in spelled.items() if user[name] == PACKED}
    # As they are looked up: the lower case of some letters beyond ASCII is an ASCII letter.
    pairs = [(name, name.lower(), value) for name, value in parse_qsl(packed, keep_blank_values=True)]
    for lower in named.intersection(lower for _, lower, _ in pairs):
        del user[spelled[lower]]
    for name, lower, value in pairs:
        alone = lower in _NEVER_PLAIN or _TOKEN.fullmatch(lower) is None
        if lower in named or (alone and lower not in spelled):
            user[name] = value


def _add_user_headers(headers: dict[str, str], user: Mapping[str, str]) -> None:
    # Names that differ by case alone are one name to HTTP: they are packed, so that both arrive.
    times = Counter(name.lower() for name in user)
    packed = []
    plain: set[str] = set()
    for name, value in user.items():
        lower = name.lower()
        if lower not in _NEVER_PLAIN and _TOKEN.fullmatch(lower) is not None:
            written = _written(name, value) if times[lower] == 1 else None
            if lower not in plain:
                headers[name if name.isascii() else lower] = PACKED if written is None else written
                plain.add(lower)
            if written is not None:
                continue
        packed.append(f"{quote(name, safe='')}={quote(value, safe='')}")
    if len(plain) > PLAIN_LIMIT:
        raise ConfigurationError(
            f"HTTP carries up to {PLAIN_LIMIT} headers, and these are {len(plain)}: put data into the payload."
        )
    if packed:
        headers[PACKED] = "&".join(packed)


def _written(name: str, value: str) -> str | None:
    """The value of a plain header; None where it cannot be one."""
    if name.lower().startswith(PREFIX):
        value = _encode(name, value)
    return value if name.isascii() and _PLAIN.fullmatch(value) is not None else None


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
