"""Limits for what a batch becomes once it is unpacked, checked before the library unpacks it.

A broker limits the bytes that come: 200 KB of zstd can be gigabytes, and each two bytes of these a header, which is
an object in memory. So a batch that may become large is unpacked here first, up to a limit. Nothing is read of a
batch beyond it, and no header of a record that has too many.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import cramjam
from aiokafka.record.util import decode_varint

from streamtools.errors import DecodeError
from streamtools.validation.bodies import decompressed

#: Bytes of an unpacked batch at most; a large batch may have `RATIO` times the bytes that came.
MOST_UNPACKED: Final = 32 * 1024 * 1024
RATIO: Final = 20
#: Headers of one record, at most.
MOST_HEADERS: Final = 10_000
#: Bytes of an unpacked batch above which the headers of each record are counted before they are read.
LARGE: Final = 1024 * 1024
#: A header that replaces what was not read, and says why.
UNREAD: Final = "streamtools-unread"

#: Kafka's numbers for the codecs, and how many bytes each can make of one byte.
GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
_GROWTH: Final = {GZIP: 1032, SNAPPY: 32, LZ4: 255, ZSTD: 44_000}
#: How Java's clients begin snappy data; then come two versions, and blocks that begin with their length.
_XERIAL, _XERIAL_HEADER = b"\x82SNAPPY\0", 16
_LENGTH: Final = struct.Struct(">i")


_INTO: Final = {LZ4: cramjam.lz4.decompress_into, ZSTD: cramjam.zstd.decompress_into}
#: A place to unpack to, for all threads; its contents are never read.
_SCRATCH: Final = bytearray(LARGE + 1)
_GZIP_WINDOW: Final = 31


class Unreadable(Exception):  # noqa: N818 - of one batch, and told as its message's
    """A batch cannot be unpacked, or not within the limit; the text says which."""


def unpacked(data: memoryview, codec: int) -> memoryview | None:
    """The unpacked records of a batch; None if they take at most `LARGE` bytes.

    Parameters:
        data: the records as they came.
        codec: Kafka's number for the codec; 0 for none.

    Raises:
        Unreadable: they take more than is read.
    """
    if codec not in _GROWTH:
        return data if len(data) > LARGE else None
    if len(data) * _GROWTH[codec] <= LARGE or _is_small(data, codec):
        return None
    limit = max(MOST_UNPACKED, RATIO * len(data))
    try:
        plain = _plain(data, codec, limit)
    except (DecodeError, cramjam.DecompressionError, struct.error, ValueError) as error:
        raise Unreadable(f"does not decompress into {limit:,} bytes or less, which are read at most") from error
    return plain if len(plain) > LARGE else None


def _is_small(data: memoryview, codec: int) -> bool:
    """The records surely take no more than `LARGE` bytes. Most do; this finds it out without taking memory."""
    if codec == SNAPPY:
        return False  # its size is known without this
    try:
        if codec == GZIP:
            stream = zlib.decompressobj(_GZIP_WINDOW)
            stream.decompress(data, LARGE)
            return stream.eof and not stream.unused_data
        return _INTO[codec](data, _SCRATCH) <= LARGE
    except (zlib.error, cramjam.DecompressionError):  # larger, or malformed
        return False


def end_of_record(plain: memoryview, start: int) -> tuple[int, bool]:
    """Where the record that begins here ends, and whether it has too many headers."""
    length, place = decode_varint(plain, start)
    end = place + length
    return end, length > 2 * MOST_HEADERS and _headers(plain, place) > MOST_HEADERS


def _headers(plain: memoryview, place: int) -> int:
    """How many headers a record has.

    Parameters:
        place: behind its length.
    """
    for _ in range(3):  # attributes, and the differences of its time and offset from the batch's
        _, place = decode_varint(plain, place)
    for _ in range(2):  # key and value
        length, place = decode_varint(plain, place)
        place += max(0, length)
    return int(decode_varint(plain, place)[0])


def _plain(data: memoryview, codec: int, limit: int) -> memoryview:
    if codec == GZIP:
        return memoryview(decompressed(bytes(data), "gzip", limit))
    if codec == SNAPPY:
        return _plain_of_snappy(data, limit)
    room = mmap.mmap(-1, limit)  # memory that is taken only as it is written
    return memoryview(room)[: _INTO[codec](data, room)]


def _plain_of_snappy(data: memoryview, limit: int) -> memoryview:
    blocks = list(_blocks(data)) if bytes(data[: len(_XERIAL)]) == _XERIAL else [data]
    if sum(map(cramjam.snappy.decompress_raw_len, blocks)) > limit:
        raise DecodeError("Over the limit.")
    return memoryview(b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks))


def _blocks(data: memoryview) -> Iterator[memoryview]:
    place = _XERIAL_HEADER
    while place < len(data):
        length = _LENGTH.unpack_from(data, place)[0]
        place += _LENGTH.size
        yield data[place : place + length]
        place += length
