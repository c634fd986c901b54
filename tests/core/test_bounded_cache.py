"""Texts of which the same is made again and again: few are kept, and no long one."""

from __future__ import annotations

from streamtools import codec
from streamtools.text.bounded_cache import MOST, SHORT, BoundedCache


def test_what_was_made_of_a_text_is_kept() -> None:
    asked = list[str]()

    def make(text: str) -> int:
        asked.append(text)
        return len(text)

    made = BoundedCache(make)
    assert [made["abc"], made["abc"], made.__getitem__("abc")] == [3, 3, 3]
    assert asked == ["abc"]


def test_texts_of_strangers_do_not_fill_the_memory() -> None:
    made = BoundedCache(len)
    for number in range(3 * MOST):
        made[f"x-{number}"]
    assert len(made) <= MOST
    made.clear()
    assert made["x" * (SHORT + 1)] == SHORT + 1
    assert not made


def test_a_content_type_of_any_length_is_read_and_not_kept() -> None:
    long = f"Application/JSON; boundary={'x' * 2**20}"
    assert codec.media_type(long) == "application/json"
    assert long not in codec.media._MEDIA
