"""Messages to records and back; records of other programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.kafka.consuming.subscription import subscription
from streamtools.drivers.kafka.names import is_retry_topic, retry_topic
from streamtools.drivers.kafka.producing.record import records_of
from streamtools.drivers.kafka.records import (
    Origin,
    Plain,
    decode_origin,
    decode_plain,
    decode_record,
    encode_key,
    read_record,
)
from streamtools.errors import ConfigurationError
from streamtools.message import Message
from tests.core import strategies

PLACE = TopicPartition("t", 3)


def record(**changes: Any) -> Any:
    usual = {"topic": "t", "partition": 3, "offset": 7, "timestamp": 1500, "key": None, "value": b"x", "headers": ()}
    return SimpleNamespace(**{**usual, **changes})


def sent(message: Message) -> Any:
    [item] = records_of([message])
    return record(key=item.key, value=item.value, headers=item.headers, timestamp=item.timestamp)


@given(strategies.messages)
def test_a_message_comes_back_as_it_was_sent(message: Message) -> None:
    back = decode_record(sent(message), TopicPartition(message.queue, 0))
    message = message.replace(id=message.id or f"{message.queue}-0-7")
    assert back.replace(time=None, deliver_at=None, expires_at=None, error=None) == message.replace(
        time=None, deliver_at=None, expires_at=None, error=None
    )
    for name in ("time", "deliver_at", "expires_at"):
        if (moment := getattr(message, name)) is not None:
            assert getattr(back, name) == pytest.approx(moment, abs=0.002)
    assert (back.error is None) == (message.error is None)


@given(strategies.messages)
def test_a_plain_message_is_read_as_any_other(message: Message) -> None:
    read = sent(message)
    if (plain := decode_plain(read, PLACE)) is not None:
        assert len(read.headers) in (0, 2) and not plain.expired
        whole = decode_record(read, PLACE)
        for name in ("deliver_at", "expires_at", "reply_to", "content_encoding", "content_type", "enveloped"):
            assert getattr(plain, name) == getattr(whole, name)
        assert type(plain) is Plain
        assert plain == decode_record(read, PLACE) and type(plain) is Message


@given(
    st.none() | st.binary(max_size=3),
    st.lists(
        st.tuples(st.sampled_from(["ce_id", "content-type", "ce_attempt", "x"]), st.none() | st.binary(max_size=3)),
        max_size=3,
    ),
)
def test_plain_records_of_other_programs_too(key: bytes | None, headers: list[tuple[str, bytes | None]]) -> None:
    read = record(key=key, headers=headers)
    if (plain := decode_plain(read, PLACE)) is not None:
        assert plain == decode_record(read, PLACE)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.attempt,
        lambda m: (m.error, m.type)[1],
        hash,
        repr,
        copy,
        lambda m: m.replace(attempt=2),
        lambda m: replace(m, key="k"),
        lambda m: {m: 1}[m],
        lambda m: m == m.replace(),
    ],
)
def test_whatever_is_asked_of_it_is_answered_as_if_it_were_read_whole(ask: Any) -> None:
    read = sent(Message(body=b"x", queue="t", id="i", content_type="text/plain"))
    plain = decode_plain(read, PLACE)
    assert type(plain) is Plain
    assert ask(plain) == ask(decode_record(read, PLACE))


def test_two_threads_that_ask_at_once_have_the_same_answer() -> None:
    read = sent(Message(body=b"x", queue="t", id="i", content_type="text/plain"))
    bare = record(value=b"y", key=b"k")
    messages = [decode_plain(each, PLACE) for each in (read, bare) * 2000]
    whole = [decode_record(each, PLACE) for each in (read, bare) * 2000]
    asked = ("time", "content_type", "key", "id", "error", "attempt", "expired")
    begin = Barrier(2)

    def ask() -> list[list[Any]]:
        begin.wait(10)
        return [[getattr(message, name) for name in asked] for message in messages]

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            one, two = [future.result(30) for future in [pool.submit(ask), pool.submit(ask)]]
    finally:
        sys.setswitchinterval(usual)
    assert one == two == [[getattr(message, name) for name in asked] for message in whole]
    assert messages == whole


#: Header names of other programs, ours among them.
NAMES = st.sampled_from(["a", "b", "ce_x", "streamtools-user-ce_y", "content_type", r"\xff"])
#: Header values of other programs.
VALUES = st.none() | st.binary(max_size=5) | st.sampled_from([b"", b", ", b"\xff", "\ufeffä".encode()])


@given(st.none() | st.binary(), st.none() | st.binary(), st.lists(st.tuples(NAMES, VALUES)))
def test_what_other_programs_wrote_is_the_same_in_every_copy(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]]
) -> None:
    read = record(key=key, value=value, headers=headers)
    for _ in range(2):  # a copy, and a copy of that
        message = decode_record(read, PLACE)
        assert all(text.encode() is not None for text in message.headers.values())
        [item] = records_of([message.replace(attempt=2)], read=read.headers)
        assert (item.key, item.value) == (key, value)
        read = record(key=item.key, value=item.value, headers=item.headers)
    assert by_name(item.headers) == by_name(headers)


def by_name(headers: Sequence[tuple[str, bytes | None]]) -> dict[str, list[bytes | None]]:
    """The values of each header that is no metadata of ours."""
    found: dict[str, list[bytes | None]] = {}
    for name, value in headers:
        if name not in ("ce_id", "ce_attempt", "ce_time"):
            found.setdefault(name.removeprefix("streamtools-user-"), []).append(value)
    return found


def test_a_header_that_was_changed_goes_out_as_it_was_changed() -> None:
    read = record(headers=[("a", b"\xff"), ("a", b"2"), ("b", None)])
    message = decode_record(read, PLACE)
    assert dict(message.headers) == {"a": r"\xff, 2", "b": ""}
    [item] = records_of([message.replace(headers={"a": "new", "b": "", "c": "more"})], read=read.headers)
    assert [h for h in item.headers if not h[0].startswith("ce_")] == [("a", b"new"), ("b", None), ("c", b"more")]


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59.9999999Z", "nan", "-inf", "1e400", "1764489600000", "-1e18"])
@pytest.mark.parametrize("name", ["ce_time", "ce_expirytime", "ce_deliverytime", "ce_errorfirst"])
def test_a_time_out_of_range_can_be_copied(name: str, text: str) -> None:
    read = record(headers=[(name, text.encode()), ("ce_errorqueue", b"q")])
    message = decode_record(read, PLACE)
    [item] = records_of([message.replace(attempt=2)], read=read.headers)
    assert 0 <= item.timestamp < 2**53 and decode_record(record(headers=item.headers), PLACE).attempt == 2


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_timestamp_out_of_range_can_be_copied(timestamp: int) -> None:
    read = record(timestamp=timestamp)
    [item] = records_of([decode_record(read, PLACE).replace(attempt=2)])
    assert abs(item.timestamp - time.time() * 1000) < 60_000
    plain = decode_plain(read, PLACE)
    assert plain is not None and plain == decode_record(read, PLACE)


def test_an_empty_id_is_none() -> None:
    for raw in (b"", None):
        read = record(headers=[("ce_id", raw), ("content-type", None)])
        assert decode_plain(read, PLACE) is None
        assert (decode_record(read, PLACE).id, decode_record(read, PLACE).content_type) == ("t-3-7", None)


def test_a_record_without_any_header_is_a_message() -> None:
    message = decode_record(record(key=b"k", value=None, headers=[("nothing", None)]), PLACE)
    assert (message.id, message.body, message.key, message.time) == ("t-3-7", None, "k", 1.5)
    assert dict(message.headers) == {"nothing": ""}


def test_a_record_of_the_oldest_format_has_no_time() -> None:
    read = record(timestamp=None)
    plain = decode_plain(read, PLACE)
    assert decode_record(read, PLACE).time is None and plain is not None and plain.time is None


def test_a_record_without_a_value_is_a_tombstone() -> None:
    plain = decode_plain(record(value=None), PLACE)
    assert type(plain) is Plain and plain.body is None
    assert decode_record(record(value=None), PLACE).body is None


@given(st.binary())
def test_keys_of_any_bytes_are_written_as_they_were_read(key: bytes) -> None:
    assert encode_key(decode_record(record(key=key), PLACE)) == key


def test_where_a_message_was_read_first_travels_with_its_copies() -> None:
    origin = Origin("t", 3, 7)
    assert decode_origin(record(), PLACE) == origin
    assert decode_origin(record(offset=99, headers=origin.headers), TopicPartition("t.retry", 0)) == origin


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


def test_a_record_of_one_header_many_times_does_not_take_long() -> None:
    foreign = record(headers=[("a", b"x")] * 10_000)
    begun = time.thread_time()
    message, trouble = read_record(foreign, PLACE)
    assert time.thread_time() - begun < 1.0
    assert (trouble, message.headers["a"]) == (None, ", ".join("x" * 10_000))
    _, trouble = read_record(record(headers=[("a", b"x")] * 10_001), PLACE)
    assert "10,001 headers" in str(trouble)
