"""Texts of anybody, a mebibyte each: forms, and what is logged; none takes long."""

from __future__ import annotations

import logging
import string
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.text.escaping import LONGEST, VisibleRecords, escaped, visible_json
from streamtools.validation.forms import MOST, read_form, read_pairs

MIB = 2**20
#: Seconds that a text of a mebibyte may take.
LIMIT = 1.0  # several times what is promised: a busy machine takes longer for the same instructions


def seconds(work: Callable[[], Any]) -> float:
    """The least of three times: one may have met a collection of garbage."""
    taken = []
    for _ in range(3):
        begun = time.thread_time()
        work()
        taken.append(time.thread_time() - begun)
    return min(taken)


@pytest.mark.parametrize(
    "piece", [b"%", b"%ff", b"%41", b"%c3%a9x", b"\xff", "é".encode(), b"+", b"=", b"%z", b"&", b"a&"]
)
def test_no_form_of_a_mebibyte_takes_long(piece: bytes) -> None:
    body = b"a=" + piece * (MIB // len(piece))

    def read() -> None:
        try:
            read_form(body)
        except ValueError as error:
            assert len(str(error)) < 200 or isinstance(error, UnicodeDecodeError)

    assert seconds(read) < LIMIT


@given(st.text(st.sampled_from("aé&=+%%%0123456789abcdefABCDEF;\0\n \udcff"), max_size=40))
def test_forms_are_read_as_the_standard_library_reads_them(text: str) -> None:
    body = text.encode("utf-8", "surrogateescape")
    try:
        expected: Any = parse_qsl(quote(body, safe=string.printable), keep_blank_values=True, errors="strict")
    except ValueError:
        expected = ValueError
    try:
        found: Any = read_pairs(body)
    except ValueError:
        found = ValueError
    assert found == expected


def test_a_form_has_a_limit_of_fields() -> None:
    assert len(read_pairs(b"&".join([b"a=1"] * MOST))) == MOST
    with pytest.raises(ValueError, match="over 10,000 fields"):
        read_pairs(b"&".join([b"a=1"] * (MOST + 1)))


@pytest.mark.parametrize("character", ["\x1b", "\u202e", "\ud800", "\U000e0001", "a\n", "\xa0"])
def test_no_text_of_a_mebibyte_takes_long_to_be_made_visible(character: str) -> None:
    text = character * (MIB // len(character))
    assert seconds(lambda: escaped(text)) < LIMIT
    assert seconds(lambda: escaped(text, lines=True)) < LIMIT
    assert seconds(lambda: visible_json(text)) < LIMIT


@pytest.mark.parametrize(
    "text", ["\x1b" * MIB, "".join(map(chr, range(MIB))), "\n" * MIB + "x", "x\n\x1b" * (MIB // 3)]
)
def test_an_exception_that_holds_a_whole_message_is_logged_in_short(text: str) -> None:
    def logged() -> str:
        try:
            raise ValueError(text)
        except ValueError:
            record = logging.LogRecord("streamtools", logging.ERROR, "", 1, "%s", ("a",), sys.exc_info())
        VisibleRecords().filter(record)
        return str(record.exc_text)

    assert seconds(logged) < LIMIT
    found = logged()
    assert found.startswith("Traceback") and "characters)" in found
    assert len(found) < 30 * LONGEST
