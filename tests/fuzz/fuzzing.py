"""Random inputs that are nearly right: pieces of a corpus, changed at random, the same for the same seed."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.changes import KINDS, changed

CORPUS = Path(__file__).parent / "corpus"
#: Seconds for each; set STREAMTOOLS_FUZZ=600 for ten minutes.
SECONDS = float(os.environ.get("STREAMTOOLS_FUZZ", "3"))
#: Where to begin; a failure names it.
SEED = int(os.environ.get("STREAMTOOLS_FUZZ_SEED", "0"))
#: The most that one input may take, in seconds of processor time; more in the suite, beside other tests.
STILL = 0.2 if "STREAMTOOLS_FUZZ" in os.environ else 1.0
#: What a long run may need beside what a short one needs, in MiB.
GROWTH = 64
#: The most of one input, in bytes.
MOST = 64 * 1024
#: What is put between other bytes.
PIECES = [b"\x00", b"\xff", b"\n", b"\r\n", b"\x1b[2J", b"\xe2\x80\xae", b"\xed\xb3\xbf", b" ", b"%"]
PIECES += [b"\\", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"=", b"-1", b"0", b"1e999", b"NaN", b"null"]
PIECES += [b"Infinity", b"true", b"9" * 25, b"9" * 5000, b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"x" * 300]
PIECES += [b"9999-12-31T23:59:59.9999999Z", b"streamtools-", b"streamtools-attempt", b"ce_time", b"ce_replyto"]
PIECES += [b"x-death", b"x-delivery-count", b"error", b"__consumer_offsets", b"http://127.0.0.1:1/", b"amq.topic"]
PIECES += [b"streamtools.bindings", b"*", b"#"]
#: What long inputs are made of.
UNITS = [b"[", b'{"a":', b"{},", b'"x",', b"1", b"-", b"\xc3\xbc", b"\\ud800", b"e9", b"\x00", b"A\x00\x00\x10\x00"]


def corpus(name: str) -> list[bytes]:
    """The inputs to begin with."""
    found = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert found
    return found


def mutated(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One input, or what has become of it."""
    data = chance.choice(seeds)
    for _ in range(chance.choice([0, 1, 1, 2, 3, 6, 12])):
        data = _changed(chance, data, seeds)[:MOST]
    return data


def _changed(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(KINDS + 3)
    if kind < KINDS:
        return changed(kind, chance, data, at, seeds)
    if kind == KINDS:
        return data[:at] + chance.choice(UNITS) * chance.choice([1, 50, 1000, 50_000]) + data[at:]
    return data[:at] + chance.choice(PIECES) + data[at:]


def fuzz(name: str, check: Callable[[bytes, random.Random], object], still: float = STILL) -> None:
    """Try inputs until the time is over; each is to end in time, to raise nothing and to leave no memory behind.

    Parameters:
        name: of the corpus.
        check: tries one input; more may be chosen at random.
        still: the most that one input may take.
    """
    with _no_log_kept():
        _fuzz(corpus(name), check, still)


@contextmanager
def _no_log_kept() -> Iterator[None]:
    """Logs are written and forgotten: pytest would keep them all, and memory would grow."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
        root.handlers[:] = [logging.StreamHandler(nowhere)]
        try:
            yield
        finally:
            root.handlers[:] = handlers


def _fuzz(seeds: Sequence[bytes], check: Callable[[bytes, random.Random], object], still: float) -> None:
    until, number, begun = time.monotonic() + SECONDS, 0, 0.0
    while number < len(seeds) or time.monotonic() < until:
        data = seeds[number] if number < len(seeds) else mutated(random.Random(SEED + number), seeds)  # noqa: S311
        try:
            # What takes long once may have met a collection of garbage.
            took = _timed(check, data, SEED + number)
            if took >= still:
                took = min(_timed(check, data, SEED + number) for _ in range(3))
        except BaseException as error:
            error.add_note(f"STREAMTOOLS_FUZZ_SEED={SEED + number} {data[:2000]!r}")
            raise
        assert took < still, f"{took:.2f} s: STREAMTOOLS_FUZZ_SEED={SEED + number} {data[:200]!r}"
        number += 1
        if not begun and time.monotonic() > until - 0.7 * SECONDS:
            begun = memory()
    assert memory() - (begun or memory()) < GROWTH


def _timed(check: Callable[[bytes, random.Random], object], data: bytes, seed: int) -> float:
    before = time.thread_time()
    check(data, random.Random(-seed - 1))  # noqa: S311
    return time.thread_time() - before


def memory() -> float:
    """What this process has in memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
