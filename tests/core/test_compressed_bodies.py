"""Compressed bodies of anybody: no shape of them takes long, and nothing of them is lost."""

from __future__ import annotations

import gzip
import random
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools import Message, codec
from streamtools.errors import DecodeError
from streamtools.validation.bodies import MEMBERS, can_decompress, decompressed

MIB = 2**20
#: Seconds that a body of a mebibyte may take.
LIMIT = 1.0  # several times what is promised: a busy machine takes longer for the same instructions
MEMBER = gzip.compress(b"", 9, mtime=0)
#: Eight blocks of deflate, each with Huffman tables of its own and nothing else: what costs most for its bytes.
TABLES = bytes.fromhex(
    "04c081000000000090ff6a24000e040000000080fc57230170200000000000e4bf1a098003010000000020ffd548001c080000000000"
    "f9af4602e0400000000000c87f35120007020000000040feab910038100000000000f25f8d"
)
#: Eight empty blocks with the fixed tables, and one that is stored.
FIXED = bytes.fromhex("02 08 20 80 00 02 08 20 80 00")
STORED = b"\0\0\0\xff\xff"
#: The last block, empty.
END = b"\x03\0"


def zlib_of(blocks: bytes) -> bytes:
    return b"\x78\x9c" + blocks + END + zlib.adler32(b"").to_bytes(4)


def gzip_of(blocks: bytes) -> bytes:
    return MEMBER[:10] + blocks + END + bytes(8)


def filled(size: int, piece: bytes) -> bytes:
    return piece * (size // len(piece))


def stacked(body: bytes, times: int) -> bytes:
    for _ in range(times):
        body = gzip.compress(body, 9, mtime=0)
    return body


SHAPES: dict[str, tuple[Callable[[], bytes], str]] = {
    "members": (lambda: filled(MIB, MEMBER), "gzip"),
    "members in gzip": (lambda: stacked(filled(16 * MIB, MEMBER), 1), "gzip,gzip"),
    "members in gzip, twice": (lambda: stacked(filled(16 * MIB, MEMBER), 2), "gzip,gzip,gzip"),
    "few members that are long": (lambda: filled(MIB, gzip_of(filled(1000, STORED))), "gzip"),
    "tables": (lambda: gzip_of(filled(MIB, TABLES)), "gzip"),
    "tables in zlib": (lambda: zlib_of(filled(MIB, TABLES)), "deflate"),
    "tables in a bare stream": (lambda: filled(MIB, TABLES) + END, "deflate"),
    "tables in gzip": (lambda: stacked(gzip_of(filled(16 * MIB, TABLES)), 1), "gzip,gzip"),
    "tables in gzip, twice": (lambda: stacked(gzip_of(filled(16 * MIB, TABLES)), 2), "gzip,gzip,gzip"),
    "tables in tables": (
        lambda: gzip_of(filled(MIB // 2, TABLES))[:-10] + stacked(gzip_of(filled(MIB, TABLES)), 1)[10:],
        "gzip,gzip",
    ),
    "fixed tables": (lambda: zlib_of(filled(MIB, FIXED)), "deflate"),
    "fixed tables, packed": (lambda: zlib.compress(zlib_of(filled(16 * MIB, FIXED)), 9), "deflate,deflate"),
    "stored": (lambda: zlib_of(filled(MIB, STORED)), "deflate"),
    "stored, packed": (lambda: stacked(zlib_of(filled(16 * MIB, STORED)), 2), "deflate,gzip,gzip"),
    "zeros": (lambda: gzip.compress(bytes(16 * MIB), 9), "gzip"),
    "zeros, three times": (lambda: stacked(bytes(16 * MIB), 3), "gzip,gzip,gzip"),
    "zeros behind": (lambda: MEMBER + bytes(MIB), "gzip"),
    "noise": (lambda: stacked(random.Random(1).randbytes(MIB - 1000), 3), "gzip,gzip,gzip"),
    "names": (lambda: b"x", "," * MIB),
    "long names": (lambda: b"x", "utf-8," * (MIB // 6)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_compressed_body_of_a_mebibyte_takes_long(shape: str) -> None:
    make, encoding = SHAPES[shape]
    body = make()
    assert len(body) <= MIB + 100 * 1024
    took = seconds(body, encoding)
    if took >= LIMIT:  # it may have met a collection of garbage
        took = min(seconds(body, encoding) for _ in range(2))
    assert took < LIMIT, f"{took:.2f} s"


def seconds(body: bytes, encoding: str) -> float:
    begun = time.thread_time()
    try:
        decompressed(body, encoding)
    except DecodeError as error:
        assert len(str(error)) < 300
    return time.thread_time() - begun


def test_the_members_of_a_body_are_counted_over_all_its_encodings() -> None:
    def of(count: int) -> bytes:
        return b"".join(gzip.compress(b"%d," % n, mtime=0) for n in range(count))

    assert decompressed(of(MEMBERS), "gzip") == b"".join(b"%d," % n for n in range(MEMBERS))
    for body, encoding in ((of(MEMBERS + 1), "gzip"), (stacked(of(MEMBERS), 1), "gzip,gzip")):
        with pytest.raises(DecodeError, match="1,000 gzip members"):
            decompressed(body, encoding)


def test_what_comes_between_two_encodings_has_a_limit() -> None:
    with pytest.raises(DecodeError, match="before the others are"):
        decompressed(stacked(gzip_of(filled(8 * MIB, STORED)), 1), "gzip,gzip")
    noise = random.Random(1).randbytes(4 * MIB)
    assert decompressed(stacked(noise, 2), "gzip,gzip") == noise
    assert decompressed(stacked(noise[: MIB // 2], 3), "gzip,gzip,gzip") == noise[: MIB // 2]
    assert decompressed(stacked(bytes(16 * MIB), 3), "gzip,gzip,gzip") == bytes(16 * MIB)


ONE, TWO = gzip.compress(b"1", mtime=0), zlib.compress(b"1")
BARE = TWO[2:-4]


@pytest.mark.parametrize(
    ("body", "encoding", "place"),
    [
        (ONE + b"garbage", "gzip", "byte 21 of 28"),
        (ONE + b"\0\0garbage", "gzip", "byte 21 of 30"),
        (ONE + b"\0" + ONE, "gzip", "byte 21 of 43"),
        (ONE + ONE + b"\x1f", "x-gzip", "byte 42 of 43"),
        (TWO * 2, "deflate", "byte 9 of 18"),
        (TWO + b"\0", "deflate", "byte 9 of 10"),
        (BARE + b"x", "deflate", "byte 3 of 4"),
        (BARE * 2, "deflate", "byte 3 of 6"),
        (gzip.compress(ONE + b"x", mtime=0), "gzip, gzip", "byte 21 of 22"),
        (gzip.compress(TWO * 2, mtime=0) + b"\0", "deflate, gzip", "byte 9 of 18"),
    ],
)
@pytest.mark.parametrize("annotation", [Any, int, str])
def test_what_follows_a_stream_is_refused_and_its_place_is_said(
    body: bytes, encoding: str, place: str, annotation: Any
) -> None:
    sent = Message(body=body, queue="q", id="1", content_type=codec.JSON, content_encoding=encoding)
    with pytest.raises(DecodeError, match=place):
        codec.decoder(annotation)(sent)


def test_zeros_may_follow_gzip_as_its_own_tools_write_them() -> None:
    assert decompressed(ONE + bytes(512), "gzip") == b"1"
    assert decompressed(ONE + ONE + bytes(MIB), "gzip") == b"11"


@given(st.lists(st.binary(max_size=40_000), min_size=1, max_size=4), st.integers(0, 9), st.booleans())
def test_several_members_are_one_body(parts: list[bytes], level: int, padded: bool) -> None:
    body = b"".join(gzip.compress(part, level, mtime=0) for part in parts) + bytes(3 * padded)
    assert decompressed(body, "gzip") == b"".join(parts)
    assert decompressed(zlib.compress(body, level), "gzip, deflate") == b"".join(parts)


@given(st.binary(max_size=40_000), st.integers(-1, 9), st.sampled_from(range(9, 16)), st.booleans())
def test_deflate_is_read_with_its_header_and_without(body: bytes, level: int, window: int, bare: bool) -> None:
    packer = zlib.compressobj(level, zlib.DEFLATED, -window if bare else window)
    assert decompressed(packer.compress(body) + packer.flush(), "deflate") == body


@pytest.mark.parametrize("encoding", ["GZip", " gzip\t", "gzip,", ",,gzip , ,", "identity , gZIP", "\tX-Gzip"])
def test_encodings_are_a_list_as_http_has_it(encoding: str) -> None:
    assert can_decompress(encoding)
    assert decompressed(ONE, encoding) == b"1"


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("gzip ;q=1", "'gzip ;q=1'.*no parameters"),
        ("gzip;q=1, gzip", "'gzip;q=1'.*no parameters"),
        ("gzip, gzip; x", "'gzip; x'.*no parameters"),
        ('"gzip"', "not supported"),
        ("gzip gzip", "'gzip gzip'.*not supported"),
        ("gzip\n", "not supported"),
        ("gzip\xa0", "not supported"),
        ("gzip" + "," * 300, "304 characters"),
    ],
)
def test_what_is_no_name_of_an_encoding_is_refused_clearly(encoding: str, words: str) -> None:
    assert not can_decompress(encoding)
    with pytest.raises(DecodeError, match=words):
        decompressed(ONE, encoding)
