"""Messages that a driver cannot decode."""

from __future__ import annotations

import pytest

from streamtools.delivery import read_message
from streamtools.errors import DecodeError
from streamtools.message import Message


class Unkind(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


@pytest.mark.parametrize("error", [ValueError("no such byte"), RecursionError(), MemoryError(), Unkind()])
def test_what_cannot_be_decoded_is_a_bare_message_that_names_its_place(error: Exception) -> None:
    def decode(record: str) -> Message:
        raise error

    message, trouble = read_message(decode, "x", body=b"\xff", queue="q", id="q-1-7", place="q-1, offset 7")
    assert (message.body, message.queue, message.id) == (b"\xff", "q", "q-1-7")
    assert (
        isinstance(trouble, DecodeError) and "q-1, offset 7" in str(trouble) and type(error).__name__ in str(trouble)
    )
    assert trouble.__cause__ is error


def test_what_can_be_decoded_is_without_trouble() -> None:
    made = Message(body=b"x", queue="q", id="1")
    assert read_message(lambda message: message, made, body=b"x", queue="q", id="2", place="p") == (made, None)
