"""Bytes that are nearly HTTP: pieces of the corpus, changed at random, the same for the same seed."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

from tests.fuzz.changes import KINDS, changed

CORPUS = Path(__file__).parent / "corpus"
#: What is put between other bytes.
PIECES = [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\x00", b"\xff", b" ", b"\t", b":", b"%", b"%ff", b"%00"]
PIECES += [b"&", b"=", b";", b",", b'"', b"\\", b"{", b"[", b"]", b"}", b"-1", b"0"]
PIECES += [b"99999999999999999999", b"1e999", b"NaN", b"\xed\xb3\xbf", b"../", b"Host: y\r\n"]
PIECES += [b"Content-Length: 7\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n"]
PIECES += [b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"]
PIECES += [b"Expect: 100-continue\r\n", b" folded\r\n", b"ce-id: \r\n"]
PIECES += [b"ce-time: 9999-12-31T23:59:59Z\r\n", b"ce-attempt: -5\r\n", b"streamtools-headers: &&=%\r\n"]
PIECES += [b"Content-Type: text/plain; charset=punycode\r\n"]
PIECES += [b"Content-Type: application/json; charset=utf-16\r\n", b"Origin: null\r\n", b"0\r\n\r\n"]
PIECES += [b"ffffffffffffffff\r\n", b"1;" + b"e" * 999 + b"\r\n", b"\x1f\x8b\x08\x00"]
#: What large bodies are made of.
UNITS = [b"[", b'{"a":', b"{},", b'"x",', b"1", b"a=b&", b"-", b"\xc3\xbc", b"\\ud800", b"e9", b"\x00", b" "]


def corpus() -> list[bytes]:
    """The requests to begin with."""
    return [path.read_bytes() for path in sorted(CORPUS.iterdir())]


def mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    """One request, or what has become of it."""
    data = chance.choice(seeds)
    for _ in range(chance.choice([0, 1, 1, 2, 3, 6])):
        data = _changed(chance, data, seeds)
    return (_mended(data) if chance.randrange(2) else data)[: 3 * 2**20]


def _changed(chance: random.Random, data: bytes, seeds: list[bytes]) -> bytes:
    body = data.find(b"\r\n\r\n") + 4 if chance.randrange(2) else 0
    at = chance.randrange(body, len(data) + 1) if body <= len(data) else 0
    kind = chance.randrange(KINDS + 4)
    if kind < KINDS:
        return changed(kind, chance, data, at, seeds)
    if kind == KINDS:
        return _with_body(chance, data)
    if kind == KINDS + 1:
        old = chance.choice([b"1", b"\r\n", b"x", b"/", b"a"])
        return data.replace(old, chance.choice(PIECES), chance.choice([1, 9]))
    line = data.find(b"\r\n", at)  # between two lines, where most of HTTP's grammar is
    at = line + 2 if line >= 0 and chance.randrange(2) else at
    return data[:at] + chance.choice(PIECES) + data[at:]


def _mended(data: bytes) -> bytes:
    """The same with the true length of its body, so that more than its head is looked at."""
    head, blank, body = data.partition(b"\r\n\r\n")
    return (
        re.sub(rb"(?i)\r\nContent-Length:[^\r]*", b"\r\nContent-Length: %d" % len(body), head, count=1) + blank + body
    )


def _with_body(chance: random.Random, data: bytes) -> bytes:
    """The same head with another body, of the length that it says."""
    head = data.partition(b"\r\n\r\n")[0]
    lines = [
        line for line in head.split(b"\r\n") if not line.lower().startswith((b"content-length", b"transfer-enc"))
    ]
    unit = chance.choice(UNITS)
    body = unit * chance.choice([1, 50, 1000, 100_000])
    if chance.randrange(3) == 0:
        body = b"[" + body[: 2**20 - 8].removesuffix(b",") + b"]"
    if b"gzip" in head:
        body = gzip.compress(body, 1, mtime=0)
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body)]) + b"\r\n\r\n" + body
