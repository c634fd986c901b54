"""Writes metadata and user headers as HTTP headers, and reads them.

Metadata have the names of the CloudEvents 1.0 HTTP binding, binary mode (`ce-id`, `ce-type`, ...). A user header is
sent as a *plain* HTTP header if HTTP can carry its name and its value unchanged. All other user headers are *packed*
together into `streamtools-headers`, percent-encoded as `name=value&name=value`. So nothing that a user writes can end
a line, change the request, or be lost.

A proxy may set or remove a header such as `X-Forwarded-User`, but it does not look into packed headers. If the name
of a packed header could be plain, the sender also sends a plain header of that name with the value
`streamtools-headers`, and the receiver reads the packed value only if that plain header has arrived. So a proxy that
removes or replaces the plain header decides, and no client can evade it by packing.
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
#: An event needs a type and a source (CloudEvents 1.0, section 3.1); these are sent if the message has none.
UNSAID: Final = {"type": "streamtools.Message", "source": "urn:streamtools:anonymous"}
#: The most plain headers of one message; our server accepts a few more headers in all.
PLAIN_LIMIT: Final = 1000
#: Headers that describe the connection or the body, and do not belong to the message.
TRANSPORT: Final = frozenset(
    {"accept", "accept-charset", "accept-encoding", "accept-language", "accept-ranges", "connection"}
    | {"content-encoding", "content-length", "content-type", "expect", "host", "http2-settings", "keep-alive"}
    | {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "user-agent", PACKED}
)

#: HTTP's own headers for fields of a message.
_NATIVE: Final = {"content-type": "content_type", "content-encoding": "content_encoding"}
#: The names of headers that say nothing about a message, as bytes in lower case.
_NO_ONES: Final = frozenset(name.encode() for name in TRANSPORT - _NATIVE.keys() - {PACKED})
_OURS: Final = frozenset(
    PREFIX + name for name in (*TEXT.values(), *TIMES.values(), *ERROR_TEXT.values(), *ERROR_TIMES.values())
) | {PREFIX + name for name in ("specversion", KEY_BYTES, ATTEMPT, VERSION, ERROR_ATTEMPTS)}
#: A user header with one of these names is never plain: HTTP or this library gives the name a meaning.
_NEVER_PLAIN: Final = TRANSPORT | _OURS | {"origin", "sec-fetch-site"}
#: RFC 9110, section 5.6.2: a token.
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
#: Printable ASCII without a space at its ends, because HTTP removes such spaces.
_PLAIN: Final = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
#: CloudEvents HTTP binding, section 3.1.3.2: a space, `"`, `%` and what is not printable ASCII are encoded.
_TO_ENCODE: Final = re.compile(r"[^!#$&-~]")
_AS_THEY_ARE: Final = "!#$&'()*+,/:;<=>?@[\\]^`{|}~"


def encode_headers(message: Message) -> dict[str, str]:
    """Return all headers of a request that carries `message`.

    Raises:
        ConfigurationError: a field of the message holds a lone surrogate, HTTP cannot carry its content type or
            content encoding, or it has too many headers.
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
    """The user headers of a request. They keep the spelling of their names, and are found in upper or lower case."""

    def __missing__(self, name: str) -> str:
        value: str | None = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def get(self, name: str, default: Any = None, /) -> Any:
        """Return the value of a header; a name with exactly this spelling is preferred."""
        value = super().get(name)
        if value is not None:
            return value
        lower = name.lower()
        return next((value for other, value in self.items() if other.lower() == lower), default)


def transfer_coding(headers: MultiMapping[str]) -> str | None:
    """Return the transfer encoding of a body; None if there is none, or only `chunked`, which aiohttp decodes."""
    if "Transfer-Encoding" not in headers:
        return None
    found = ",".join(headers.getall("Transfer-Encoding"))
    names = [name for part in found.split(",") if (name := part.strip(" \t").lower())]
    return None if names in ([], ["chunked"]) else ", ".join(names)[:100]


def decode_headers(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return the fields for `Message(...)`, and the user headers, of a request.

    Unknown attributes of CloudEvents become user headers, percent-decoded. If a header came several times, in upper
    or lower case, its values are joined by ", " (RFC 9110, section 5.3). A packed header counts only if the plain
    header of its name says so, or if its name cannot be plain.

    Parameters:
        raw: the headers as bytes; aiohttp changes the case of the names that it parses.
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
            # A body can have several encodings, applied one after the other, but only one type.
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
    """Return the bytes that the headers of a request take on the wire."""
    size = 0
    for name, value in raw:
        size += len(name) + len(value)
    return size


def meta_size(raw: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the bytes that the metadata of a request takes on the wire."""
    return size_of(each for each in raw if each[0].decode("latin-1").lower() in _OURS)


def _unpack(packed: str, user: Headers, spelled: Mapping[str, str]) -> None:
    """Add the packed headers to the plain ones in `user`.

    Parameters:
        spelled: name of a plain header in lower case -> its spelling in `user`.
    """
    named = {lower for lower, name in spelled.items() if user[name] == PACKED}
    # Names are compared as lower() writes them, as in Headers.get: for some letters beyond ASCII that is an ASCII
    # letter.
    pairs = [(name, name.lower(), value) for name, value in parse_qsl(packed, keep_blank_values=True)]
    for lower in named.intersection(lower for _, lower, _ in pairs):
        del user[spelled[lower]]
    for name, lower, value in pairs:
        alone = lower in _NEVER_PLAIN or _TOKEN.fullmatch(lower) is None
        if lower in named or (alone and lower not in spelled):
            user[name] = value


def _add_user_headers(headers: dict[str, str], user: Mapping[str, str]) -> None:
    # Names that differ only in upper and lower case are one name in HTTP: they are packed, so that both arrive.
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
            f"The message has {len(plain)} headers; over HTTP it can have {PLAIN_LIMIT}. Put data into the payload."
        )
    if packed:
        headers[PACKED] = "&".join(packed)


def _written(name: str, value: str) -> str | None:
    """Return the value of a plain header; None if the header cannot be plain."""
    if name.lower().startswith(PREFIX):
        value = _encode(name, value)
    return value if name.isascii() and _PLAIN.fullmatch(value) is not None else None


def _encode(name: str, value: str) -> str:
    if _TO_ENCODE.search(value) is None:
        return value
    try:
        return quote(value, safe=_AS_THEY_ARE)
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"The message's {name} holds a lone surrogate, which cannot be sent.") from error


def _native(field: str, value: str) -> str:
    if _PLAIN.fullmatch(value) is None:
        raise ConfigurationError(f"{field}={value!r} cannot be an HTTP header: it holds more than printable ASCII.")
    return value


def _decode(value: str) -> str:
    # CloudEvents HTTP binding, section 3.1.3.2: unquote a quoted string, then percent-decode once.
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    return unquote(value)
