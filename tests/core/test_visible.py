"""Text from outside in logs and on terminals."""

from __future__ import annotations

import io
import json
import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools import Bus, Message, Producer, Retry
from streamtools.errors import safe_str
from streamtools.testing.waiting import eventually
from streamtools.text.escaping import VisibleRecords, _shown, escaped, visible_block, visible_json

#: What forges lines, what terminals obey, what turns the direction of writing, and what cannot be seen.
HOSTILE = "a\nb\rc\x1b[31md\x9b2Je\x7ff\u202eg\u2066h\u200bi\u2028j\x85k\ufeffl\udcffm\x00n\ttail"
UNSEEN = [character for character in HOSTILE if not character.isprintable()]
#: What Python calls printable, and nobody sees.
BLANK = "\u3164\u115f\u1160\uffa0\u2800\u034f\u17b4\u180b\ufe00\ufe0f\U000e0100\U000e01ef"


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_cannot_be_seen_is_left(text: str) -> None:
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)
    assert all(line.replace("\t", "").isprintable() for line in escaped(text, lines=True).split("\n"))
    assert not any(line[:1].strip() for line in visible_block(text).split("\n")[1:])
    document = visible_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert document.isprintable()
    assert json.loads(document) == {text: [text]}


@pytest.mark.parametrize("character", [*BLANK, *UNSEEN])
@pytest.mark.parametrize("before", ["orders", ""])
def test_a_name_that_looks_like_another_does_not_once_it_is_shown(before: str, character: str) -> None:
    name = f"{before}{character}"
    assert escaped(name).isascii() and escaped(name) != before
    assert json.loads(visible_json(json.dumps(name, ensure_ascii=False))) == name
    assert visible_json(json.dumps(name, ensure_ascii=False)).isascii()
    assert "orders" + escaped(character) == str(_shown(f"orders{character}"))


def test_what_can_be_seen_is_as_it_was() -> None:
    assert escaped("\u26a0\ufe0f \u2764\ufe0f") == "\u26a0\ufe0f \u2764\ufe0f"
    text = "Größe: 5 € für 日本 🙂 'x' \\n"
    assert escaped(text) is text
    assert escaped("a\n\x1b\u202e\U000e0001") == "a\\n\\x1b\\u202e\\U000e0001"
    assert escaped("a\n\tb", lines=True) == "a\n\tb"


def test_a_megabyte_of_it_takes_no_time() -> None:
    begun = time.thread_time()
    escaped("\x1b\u202ea" * 350_000)
    assert time.thread_time() - begun < 1.0


class Evil:
    """What it says is hostile, or cannot be had."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def __str__(self) -> str:
        if self.error is not None:
            raise self.error
        return HOSTILE

    __repr__ = __str__


@pytest.mark.parametrize("value", [HOSTILE, ValueError(HOSTILE), Evil(), Evil(KeyboardInterrupt()), "x" * 10**6])
@pytest.mark.parametrize("form", ["%s", "%r"])
def test_a_log_line_is_one_line(value: Any, form: str) -> None:
    line = logged(form, value)
    assert line.isprintable()
    assert len(line) < 20_000


def test_numbers_and_names_are_formatted_as_ever() -> None:
    line = logged("%d of %s in %.3g s, %5.1f %r", 3, "it's", 0.12345, 2.0, "it's")
    assert line == "3 of it's in 0.123 s,   2.0 \"it's\""
    assert logged("%(a)s", {"a": "b\n"}) == "b\\n"
    assert logged("100%") == "100%"


def test_a_traceback_cannot_forge_a_line() -> None:
    forged = f"x\n2026-01-01 00:00:00 ERROR streamtools: forged\x1b[2J{HOSTILE}"
    try:
        raise ValueError(forged)  # noqa: TRY301
    except ValueError:
        text = logged("It failed.", exc_info=True)
    first, *others = text.split("\n")
    assert first == "It failed."
    assert others[0] == "Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.replace("\t", "").isprintable() for line in others[1:])
    assert any("ValueError: x" in line for line in others)


def logged(text: str, *arguments: Any, **options: Any) -> str:
    """What stands in the log."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("streamtools")
    logger.addHandler(handler)
    try:
        logger.error(text, *arguments, **options)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue().removesuffix("\n")


def test_the_filter_is_there_once() -> None:
    assert [type(each) for each in logging.getLogger("streamtools").filters].count(VisibleRecords) == 1


async def test_whatever_stands_in_a_message_forges_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    hostile = "x\n2026-01-01 ERROR streamtools: forged \x1b[2J\u202e"
    bus = Bus("orders", url="asyncio://", retry=Retry(retries=1, delay=0))

    @bus.handler(type=hostile)
    async def place(msg: Any) -> None:
        raise ValueError(hostile)

    async with bus, Producer("orders", url="asyncio://") as producer:
        message = Message(body=b"{}", queue="orders", id=hostile, type=hostile, intent="request", reply_to=hostile)
        await producer.send_messages([message, message.replace(type=hostile + "?")])
        await eventually(lambda: caplog.text.count("rejected message") >= 2)
    formatter = logging.Formatter("%(message)s")
    for record in caplog.records:
        for line in formatter.format(record).split("\n"):
            assert line.replace("\t", "").isprintable()
            assert not line.startswith("2026-01-01")


def nested(depth: int, width: int) -> BaseException:
    error: BaseException = ValueError("in the midst")
    for _ in range(depth):
        error = ExceptionGroup("g", [error] * width)  # type: ignore[type-var, list-item]
    return error


@pytest.mark.parametrize(("depth", "width"), [(5_000, 1), (12, 5), (1, 100_000)])
def test_groups_of_errors_of_any_depth_and_width_are_told_and_judged(depth: int, width: int) -> None:
    error = nested(depth, width)
    begun = time.thread_time()
    assert "ValueError: in the midst" in safe_str(error)
    assert Retry(retries=0).decide(error, 1).kind.name == "REJECT"
    assert len(safe_str(error)) < 1000
    assert time.thread_time() - begun < 1.0
