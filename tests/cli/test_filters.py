"""Choosing messages of an error queue, and grouping them."""

from __future__ import annotations

import pytest

from streamtools import ConfigurationError, ErrorDetails, Message
from streamtools.redrive import ErrorFilter, group_errors

DETAILS = ErrorDetails(
    queue="orders",
    handler="place",
    exception="shop.errors.CardRefused",
    reason="card 4711 is over its limit",
    attempts=3,
    first_failed=10.0,
    last_failed=20.0,
)
MESSAGE = Message(
    body=b'{"sku": "LMP-4410"}', queue="error", id="m-1", type="shop.Order", headers={"shop": "north"}, error=DETAILS
)


@pytest.mark.parametrize(
    "conditions",
    [
        [],
        ["queue=orders"],
        ["queue=ord*", "type=shop.*"],
        ["queue=orders exception=CardRefused"],
        ["exception=shop.errors.CardRefused"],
        ["reason=4711"],
        ["reason='over its limit'"],
        ["id=m-?"],
        ["handler=place"],
        ["header.shop=north"],
        ["LMP-4410"],
        ["4711"],
    ],
)
def test_a_message_that_meets_every_condition_is_chosen(conditions: list[str]) -> None:
    assert ErrorFilter(conditions)(MESSAGE)


@pytest.mark.parametrize(
    "conditions",
    [["queue=payments"], ["queue=orders", "exception=ValueError"], ["reason=5000"], ["header.shop=south"], ["CUP-1"]],
)
def test_a_message_that_misses_one_is_not(conditions: list[str]) -> None:
    assert not ErrorFilter(conditions)(MESSAGE)


def test_a_message_without_error_details_can_be_chosen_too() -> None:
    bare = Message(body=b"x", queue="error", id="1")

    assert ErrorFilter(["queue=error"])(bare)
    assert not ErrorFilter(["exception=ValueError"])(bare)


@pytest.mark.parametrize("text", ["nope=1", "'unclosed"])
def test_a_filter_that_cannot_be_read_says_so(text: str) -> None:
    with pytest.raises(ConfigurationError):
        ErrorFilter([text])


def test_groups_hold_the_span_of_time_and_the_latest_reason() -> None:
    later = ErrorDetails(
        queue="orders", exception=DETAILS.exception, reason="card 1 is stolen", first_failed=5.0, last_failed=30.0
    )

    groups = group_errors([MESSAGE, MESSAGE.replace(id="m-2", error=later)])

    assert len(groups) == 1
    assert (groups[0].count, groups[0].first_failed, groups[0].last_failed) == (2, 5.0, 30.0)
    assert (groups[0].reason, groups[0].example) == ("card 1 is stolen", "m-2")
