"""Messages to records and back; records of other programs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.kafka.names import is_retry_topic, retry_topic
from streamtools.drivers.kafka.options import subscription
from streamtools.drivers.kafka.outgoing import outgoing
from streamtools.drivers.kafka.records import Origin, decode_origin, decode_record, trouble
from streamtools.errors import ConfigurationError
from streamtools.message import Message
from tests.core import strategies


def record(**changes: Any) -> Any:
    usual = {"topic": "t", "partition": 3, "offset": 7, "timestamp": 1500, "key": None, "value": b"x", "headers": ()}
    return SimpleNamespace(**{**usual, **changes})


def sent(message: Message) -> Any:
    [item] = outgoing([message])
    return record(topic=item.topic, key=item.key, value=item.value, headers=item.headers, timestamp=item.timestamp)


@given(strategies.messages)
def test_a_message_comes_back_as_it_was_sent(message: Message) -> None:
    back = decode_record(sent(message))
    assert back.replace(time=None, deliver_at=None, expires_at=None, error=None) == message.replace(
        time=None, deliver_at=None, expires_at=None, error=None
    )
    for name in ("time", "deliver_at", "expires_at"):
        if (moment := getattr(message, name)) is not None:
            assert getattr(back, name) == pytest.approx(moment, abs=0.002)
    assert (back.error is None) == (message.error is None)


@given(st.binary(), st.lists(st.tuples(st.sampled_from(["a", "b", "ce_x", "streamtools-user-ce_y"]), st.binary())))
def test_bytes_of_other_programs_survive_every_copy(key: bytes, headers: list[tuple[str, bytes]]) -> None:
    message = decode_record(record(key=key, headers=dict(headers).items()))
    copy = sent(message)
    assert copy.key == key
    found = dict(copy.headers)
    for name, value in dict(headers).items():
        assert found[name if name in found else f"streamtools-user-{name}"] == value


def test_a_record_without_any_header_is_a_message() -> None:
    message = decode_record(record(key=b"k", value=None, headers=[("nothing", None)]))
    assert (message.id, message.body, message.key, message.time) == ("t-3-7", b"", "k", 1.5)
    assert dict(message.headers) == {"nothing": ""}


def test_a_key_that_is_no_text_is_named() -> None:
    assert trouble(record(key=b"\xff")) is not None and "t-3 at offset 7" in str(trouble(record(key=b"\xff")))
    assert trouble(record(key="ä".encode())) is None


def test_where_a_message_was_read_first_travels_with_its_copies() -> None:
    origin = Origin("t", 3, 7)
    assert decode_origin(record()) == origin
    assert decode_origin(record(topic="t.retry", offset=99, headers=origin.headers)) == origin


def test_each_group_has_a_retry_topic_of_its_own() -> None:
    assert retry_topic("orders", "orders") == "orders.retry"
    assert retry_topic("orders", "billing") == "orders.retry.billing"
    assert is_retry_topic("orders.retry") and is_retry_topic("a.retry.b") and not is_retry_topic("retry.orders")
    for group in ("b.retry", "retry", "ä", "x" * 240):
        with pytest.raises(ConfigurationError):
            retry_topic("orders", group)


@pytest.mark.parametrize(
    ("topic", "matches"),
    [
        ("shop.a", True),
        ("orders", True),
        ("orders.retry", True),
        ("shop.a.retry", False),
        ("shop.retry.billing", False),
        ("shop.retryable", True),
        ("my.shop.a", False),
        ("shop.error", False),
        ("shop.errors", True),
    ],
)
def test_a_pattern_never_matches_retries_or_what_was_rejected(topic: str, matches: bool) -> None:
    import re

    expression = subscription(r"shop\..*", ("orders", "orders.retry"), "shop.error")
    assert bool(re.compile(expression).match(topic)) is matches
