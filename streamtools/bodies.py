"""Raw bodies: decompresses content encodings up to a limit, and decodes text of known charsets."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Final

from streamtools.errors import ConfigurationError, DecodeError

#: Most encodings that one body may have, one upon the other.
LAYERS: Final = 3
#: Names that other clients write when the body is not encoded (Celery: `utf-8`, `binary`).
_NOTHING_DONE: Final = frozenset({"", "identity", "binary", "8bit", "7bit", "none"})
#: Charsets that decode in linear time; Python's `punycode` and some others do not.
_CHARSETS: Final = re.compile(
    r"utf-?8(-sig)?|(us-?)?ascii|iso-?8859-?\d{1,2}|latin-?\d{1,2}|utf-?(16|32)(-?[bl]e)?"
    r"|(windows-?|cp)125[0-8]|cp(437|850|852|858|866|932|949|950)|koi8-?[ru]|mac-?roman"
    r"|shift-?jis|euc-?(jp|kr)|gb2312|gbk|gb18030|big5"
)
#: zlib's window bits: gzip's header, zlib's header, none.
_GZIP, _ZLIB, _RAW = 31, 15, -15
_GZIP_MAGIC: Final = b"\x1f\x8b"


@dataclass(slots=True)
class BodyLimits:
    """What a body may have before it is parsed.

    Attributes:
        values: values of a JSON body, in all its lists and objects; None for any number.
        inflated: bytes once it is decompressed; a few bytes can unpack to a gigabyte.
    """

    values: int | None = 100_000
    inflated: int = 16 * 1024 * 1024


#: Those of this process.
LIMITS: Final = BodyLimits()


def set_body_limits(*, values: int | None = 100_000, inflated: int = 16 * 1024 * 1024) -> None:
    """Set the limits of bodies from now on, for every handler in this process.

    A body beyond them is rejected before it is parsed. The time for which a body keeps the event loop grows with
    both.

    Parameters:
        values: values of a JSON body, in all its lists and objects; None for any number.
        inflated: bytes of a body once it is decompressed.

    Raises:
        ConfigurationError: a limit is no whole number above 0.
    """
    given: dict[str, object] = {"values": 1 if values is None else values, "inflated": inflated}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name}={value!r} is out of range: a whole number of at least 1.")
    LIMITS.values, LIMITS.inflated = values, inflated


class TooLarge(DecodeError):
    """A body is larger than it may be once it is decompressed."""


def undone(body: bytes, encoding: str | None, limit: int | None = None) -> bytes:
    """The body without its content encodings: gzip and deflate are decompressed, one after the other.

    Parameters:
        encoding: as the message has it, such as "gzip" or "deflate, gzip"; the last one was applied last.
        limit: bytes that the body may have once it is decompressed; as `set_body_limits` says when None.

    Raises:
        DecodeError: the encoding is not supported, or the body is not encoded that way.
        TooLarge: it is over the limit.
    """
    if encoding is None:
        return body
    names = [name for part in encoding.split(",") if not _is_nothing(name := part.strip().lower())]
    if len(names) > LAYERS:
        raise DecodeError(f"The body has {len(names)} content encodings; at most {LAYERS} are decoded.")
    for name in reversed(names):
        body = _undo(body, name, LIMITS.inflated if limit is None else limit)
    return body


def _is_nothing(name: str) -> bool:
    return name in _NOTHING_DONE or is_known_charset(name)


def is_undone(encoding: str) -> bool:
    """Whether `undone` knows each of these encodings."""
    names = [part.strip().lower() for part in encoding.split(",")]
    return all(name in ("gzip", "x-gzip", "deflate") or _is_nothing(name) for name in names)


def _undo(body: bytes, name: str, limit: int) -> bytes:
    try:
        if name in ("gzip", "x-gzip"):
            return _inflate(body, _GZIP, limit)
        if name == "deflate":
            try:
                return _inflate(body, _ZLIB, limit)
            except zlib.error:  # some send the bare stream (RFC 9110, section 8.4.1.2)
                return _inflate(body, _RAW, limit)
    except zlib.error as error:
        raise DecodeError(f"The content encoding is {name}, but the body is not {name}: {error}.") from error
    raise DecodeError(
        f"The body is encoded as {name[:40]!r} (content_encoding), which is not supported: gzip and deflate are. "
        "Annotate the handler's parameter with bytes or Message to decode it there."
    )


def _inflate(body: bytes, window: int, limit: int) -> bytes:
    parts: list[bytes] = []
    room = limit
    while True:
        stream = zlib.decompressobj(window)
        part = stream.decompress(body, room + 1)
        room -= len(part)
        if room < 0:
            raise TooLarge(f"The body is over {limit:,} bytes once it is decompressed.")
        if not stream.eof:
            raise DecodeError("The body is compressed and was cut short.")
        parts.append(part)
        body = stream.unused_data
        if window != _GZIP or not body.startswith(_GZIP_MAGIC):  # gzip allows several, one after the other
            return parts[0] if len(parts) == 1 else b"".join(parts)


def is_known_charset(name: str) -> bool:
    """Whether this charset is supported."""
    return _CHARSETS.fullmatch(name.replace("_", "-")) is not None


def read_characters(body: bytes, charset: str) -> str:
    """The text of a body.

    Raises:
        DecodeError: the charset is not supported, or the body does not decode.
    """
    if not is_known_charset(charset):
        raise DecodeError(
            f"The body's charset is {charset[:40]!r}, which is not supported: send UTF-8, or annotate the handler's "
            "parameter with bytes."
        )
    try:
        return body.decode(charset)
    except (ValueError, LookupError) as error:
        raise DecodeError(f"The body's charset is {charset}, but the body does not decode: {error}") from error
