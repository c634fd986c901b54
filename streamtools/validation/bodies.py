"""Decompresses bodies up to a limit, and decodes text of known charsets.

Decompressing takes time for each byte of output, for each member of a gzip body, and far more for each byte of input
(a stream may consist of tiny blocks, each with its own tables). Each of the three has a limit. If a body has several
encodings, the output of one is the input of the next, and counts as such.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Final

from streamtools.errors import ConfigurationError, DecodeError

#: The most encodings that one body may have, one around the other.
LAYERS: Final = 3
#: The most gzip members in one body. `bgzip` writes the most: one for each 64 KiB.
MEMBERS: Final = 1000
#: What one encoding yields for the next may be this many bytes longer than the body: compressed data hardly shrink
#: when they are compressed again.
BETWEEN: Final = 512 * 1024
#: Bytes that are decompressed at once; zlib copies what follows a stream, and never more than this.
PIECE: Final = 16 * 1024
#: The most characters of a content encoding.
LONGEST: Final = 256
#: Names that other clients write for a body that is not encoded (Celery: `utf-8`, `binary`).
_NOTHING_DONE: Final = frozenset({"", "identity", "binary", "8bit", "7bit", "none"})
#: Charsets that Python decodes in linear time; `punycode` and some others take longer.
_CHARSETS: Final = re.compile(
    r"utf-?8(-sig)?|(us-?)?ascii|iso-?8859-?\d{1,2}|latin-?\d{1,2}|utf-?(16|32)(-?[bl]e)?"
    r"|(windows-?|cp)125[0-8]|cp(437|850|852|858|866|932|949|950)|koi8-?[ru]|mac-?roman"
    r"|shift-?jis|euc-?(jp|kr)|gb2312|gbk|gb18030|big5"
)
#: zlib's window bits for a stream with gzip's header, with zlib's header, and with no header.
_GZIP, _ZLIB, _RAW = 31, 15, -15
_GZIP_MAGIC: Final = b"\x1f\x8b"
_WINDOWS: Final = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _ZLIB}


@dataclass(slots=True)
class BodyLimits:
    """The limits that a body must keep to be parsed.

    Attributes:
        values: the most values of a JSON body, in all its lists and objects; None for any number.
        inflated: the most bytes of a decompressed body; a few bytes can unpack to a gigabyte.
    """

    values: int | None = 100_000
    inflated: int = 16 * 1024 * 1024


#: The limits of this process.
LIMITS: Final = BodyLimits()


def set_body_limits(*, values: int | None = 100_000, inflated: int = 16 * 1024 * 1024) -> None:
    """Set the limits of bodies from now on, for every handler in this process.

    A body beyond them is rejected before it is parsed. A body can occupy the event loop longer if you raise them.

    Parameters:
        values: the largest number of values of a JSON body, in all its lists and objects; None for any number. It is
            half as much again for annotations that validate quickly, and five times as much for plain data.
        inflated: the largest size of a decompressed body, in bytes.

    Raises:
        ConfigurationError: a limit is not a whole number above 0.
    """
    given: dict[str, object] = {"values": 1 if values is None else values, "inflated": inflated}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name}={value!r} is out of range: a whole number of at least 1.")
    LIMITS.values, LIMITS.inflated = values, inflated


class TooLarge(DecodeError):
    """A body is larger than it may be once it is decompressed."""


def decompressed(body: bytes, encoding: str | None, limit: int | None = None) -> bytes:
    """Return the body without its content encodings: gzip and deflate are decompressed, one after the other.

    Parameters:
        encoding: the message's content encoding, such as "gzip" or "deflate, gzip"; the last one was applied last.
        limit: the most bytes that the decompressed body may have; None for the limit of `set_body_limits`.

    Raises:
        DecodeError: the encoding is not supported, or the body is not encoded that way.
        TooLarge: the decompressed body is over the limit.
    """
    if encoding is None:
        return body
    names = _names(encoding)
    if len(names) > LAYERS:
        raise DecodeError(f"The body has {len(names)} content encodings; at most {LAYERS} are decoded.")
    for name in names:
        _check_name(name)
    return _Work(body, LIMITS.inflated if limit is None else limit).undo(body, names) if names else body


def can_decompress(encoding: str) -> bool:
    """Whether `decompressed` knows each of these encodings."""
    return len(encoding) <= LONGEST and all(name in _WINDOWS for name in _names(encoding))


def _names(encoding: str) -> list[str]:
    """Return the encodings that change a body, in lower case, from a list written as in HTTP (RFC 9110, 5.6.1)."""
    if len(encoding) > LONGEST:
        raise DecodeError(f"The content encoding has {len(encoding):,} characters; at most {LONGEST} are read.")
    return [name for part in encoding.split(",") if not _is_nothing(name := part.strip(" \t").lower())]


def _is_nothing(name: str) -> bool:
    return name in _NOTHING_DONE or is_known_charset(name)


def _check_name(name: str) -> None:
    if name in _WINDOWS:
        return
    what = "" if ";" not in name else " (a content encoding has no parameters)"
    raise DecodeError(
        f"The body is encoded as {name[:40]!r} (content_encoding), which is not supported{what}: gzip and deflate "
        "are. Annotate the handler's parameter with bytes or Message to decode it there."
    )


class _Work:
    """Decompresses one body, and counts its gzip members and the bytes between its encodings.

    Parameters:
        body: the body as it was received.
        limit: the most bytes of the decompressed body.
    """

    def __init__(self, body: bytes, limit: int) -> None:
        self._limit = limit
        self._between = len(body) + BETWEEN
        self._members = 0

    def undo(self, body: bytes, names: list[str]) -> bytes:
        """Return the body without these encodings; the last one is undone first."""
        for place in range(len(names) - 1, -1, -1):
            try:
                body = self._undo(body, names[place], self._limit if place == 0 else min(self._limit, self._between))
            except zlib.error as error:
                name = names[place]
                raise DecodeError(f"The content encoding is {name}, but the body is not {name}: {error}.") from error
            self._between -= len(body)
        return body

    def _undo(self, body: bytes, name: str, room: int) -> bytes:
        window = _WINDOWS[name]
        if window == _ZLIB and not _has_zlib_header(body):  # some clients omit zlib's header (RFC 9110, 8.4.1.2)
            window = _RAW
        parts: list[bytes] = []
        place, limit = 0, room
        while True:
            self._count_member()
            place, room = _inflate(body, place, window, room, parts)
            if room < 0:
                raise TooLarge(_over(limit, limit < self._limit))
            if window != _GZIP or not body.startswith(_GZIP_MAGIC, place):  # gzip allows several, one after the other
                break
        _check_end(body, place, name)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _count_member(self) -> None:
        self._members += 1
        if self._members > MEMBERS:
            raise DecodeError(
                f"The body has over {MEMBERS:,} gzip members, more than are decompressed: compress it in one piece."
            )


def _over(limit: int, between: bool) -> str:
    if between:
        return f"The body is over {limit:,} bytes after one of its encodings was decompressed, before the others are."
    return f"The body is over {limit:,} bytes once it is decompressed."


def _has_zlib_header(body: bytes) -> bool:
    """Whether the body begins with zlib's header (RFC 1950); no encoder begins a stream without header like this."""
    return len(body) < 2 or (body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0)


def _inflate(body: bytes, place: int, window: int, room: int, parts: list[bytes]) -> tuple[int, int]:
    """Decompress one stream into `parts`; return where it ends and the bytes left of `room` (below 0: too long)."""
    stream = zlib.decompressobj(window)
    view = memoryview(body)
    while not stream.eof:
        piece = view[place : place + PIECE]
        if not piece:
            raise DecodeError("The body is compressed and was cut short.")
        parts.append(part := stream.decompress(piece, room + 1))
        place += len(piece) - len(stream.unused_data)
        room -= len(part)
        if room < 0:
            break
    return place, room


def _check_end(body: bytes, place: int, name: str) -> None:
    """Check that nothing follows the stream; only gzip may be followed by zeros, because its tools pad with them.

    Raises:
        DecodeError: other bytes follow the stream.
    """
    rest = body[place:]
    if rest and (_WINDOWS[name] != _GZIP or rest.strip(b"\0")):
        raise DecodeError(
            f"The body's {name} stream ends at byte {place:,} of {len(body):,}, and something else follows: "
            "have one stream sent, or annotate the handler's parameter with bytes or Message."
        )


def is_known_charset(name: str) -> bool:
    """Whether this library decodes this charset."""
    return _CHARSETS.fullmatch(name.replace("_", "-")) is not None


def read_characters(body: bytes, charset: str) -> str:
    """Return the text of a body.

    Raises:
        DecodeError: the charset is not supported, or the body is not text of this charset.
    """
    if not is_known_charset(charset):
        raise DecodeError(
            f"The body's charset is {charset[:40]!r}, which is not supported: send UTF-8, or annotate the handler's "
            "parameter with bytes."
        )
    try:
        return body.decode(charset)
    except (ValueError, LookupError) as error:
        raise DecodeError(f"The body's charset is {charset}, but the body cannot be decoded: {error}") from error
