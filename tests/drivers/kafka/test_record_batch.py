"""Batches are written with the same bytes as the library writes them."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka.producer.message_accumulator import BatchBuilder, MessageBatch
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.kafka.client.record_batch import RecordBatch
from streamtools.drivers.kafka.producing.record import UNWRITABLE

LIMIT = 1000
texts = st.text(max_size=20)
raw = st.none() | st.binary(max_size=300)
times = st.integers(min_value=0, max_value=2**62)
records = st.tuples(times, raw, raw, st.lists(st.tuples(texts, raw), max_size=5))


def library(limit: int, *, transactional: bool = False) -> Any:
    return BatchBuilder(limit, 0, is_transactional=int(transactional))


def state(batch: Any) -> bytes:
    batch._set_producer_state(2**40 + 7, 3, 2**31 - 1)
    return bytes(batch._build())


@given(st.lists(records, max_size=40), st.booleans())
def test_records_of_any_kind(written: list[Any], transactional: bool) -> None:
    ours, theirs = RecordBatch(LIMIT, transactional=transactional), library(LIMIT, transactional=transactional)
    for timestamp, key, value, headers in written:
        room = ours.append(timestamp, key, value, headers)
        if room:  # we may leave a byte of room, as the library does
            assert theirs.append(timestamp=timestamp, key=key, value=value, headers=headers) is not None
        else:
            break
        assert ours.size() == theirs.size() and ours.record_count() == theirs.record_count()
    if written:
        assert state(ours) == state(theirs)


@given(
    st.lists(st.binary(max_size=100), max_size=80),
    st.lists(st.binary(max_size=300), min_size=1, max_size=200),
    st.lists(st.tuples(texts, raw), max_size=3),
    st.lists(st.tuples(texts, raw), max_size=3),
    st.none() | st.binary(max_size=70),
    st.integers(min_value=0, max_value=70),
)
def test_records_that_are_alike(
    first: list[bytes],
    values: list[bytes],
    before: list[tuple[str, bytes | None]],
    behind: list[tuple[str, bytes | None]],
    key: bytes | None,
    width: int,
) -> None:
    ours, theirs = RecordBatch(2**20, transactional=False), library(2**20)
    for number, value in enumerate(first):  # so that the others begin at any number
        assert ours.append(5000 + number, None, value, [])
        assert theirs.append(timestamp=5000 + number, key=None, value=value, headers=[]) is not None
    ids = [b"%d" % number + b"%" * width for number in range(1000, 1000 + len(values))]
    headers = [*before, ("%own%", b"anything"), *behind]
    assert ours.append_alike(4000, key, values, headers, "%own%", ids)
    for value, id_ in zip(values, ids, strict=True):
        own = [*before, ("%own%", id_), *behind]
        assert theirs.append(timestamp=4000, key=key, value=value, headers=own) is not None
    assert ours.size() == theirs.size() and ours.record_count() == theirs.record_count()
    assert state(ours) == state(theirs)


@pytest.mark.parametrize("length", [0, 1, 62, 63, 64, 65, 8100, 8191, 8192, 8193, 2**20 - 1, 2**20])
def test_sizes_at_which_lengths_grow(length: int) -> None:
    ours, theirs = RecordBatch(2**24, transactional=False), library(2**24)
    large = b"v" * length
    values = [large, b"v", large + b"v"]
    assert ours.append_alike(1, None, values, [("id", b"1")], "id", [b"1"] * 3)
    assert ours.append(1, large, large, [("a" * length, large)])
    for value in values:
        theirs.append(timestamp=1, key=None, value=value, headers=[("id", b"1")])
    theirs.append(timestamp=1, key=large, value=large, headers=[("a" * length, large)])
    assert state(ours) == state(theirs)


def test_more_records_than_two_bytes_count() -> None:
    ours, theirs = RecordBatch(2**23, transactional=False), library(2**23)
    for start in range(0, 10_000, 2500):
        ids = [b"%04d" % number for number in range(start, start + 2500)]
        assert ours.append_alike(1, None, ids, [("id", b"1")], "id", ids)
        for id_ in ids:
            theirs.append(timestamp=1, key=None, value=id_, headers=[("id", id_)])
    assert state(ours) == state(theirs)


def test_what_has_no_room_leaves_no_trace() -> None:
    batch, alone = RecordBatch(LIMIT, transactional=False), RecordBatch(LIMIT, transactional=False)
    for one in (batch, alone):
        assert one.append(1, None, b"x" * 2000, [])  # the first one always
    assert not batch.append(9, None, b"x", [])
    assert not batch.append_alike(9, None, [b"x"] * 2, [("id", b"")], "id", [b"1", b"2"])
    assert state(batch) == state(alone)


@pytest.mark.parametrize(
    "wrong",
    [
        (2**70, None, b"", []),
        (-(2**70), None, b"", []),
        ("1", None, b"", []),
        (1.5, None, b"", []),
        (1, "key", b"", []),
        (1, None, "value", []),
        (1, None, b"", [("\udc80", b"")]),
        (1, None, b"", [("name", "text")]),
        (1, None, b"", [(b"name", b"")]),
    ],
)
def test_what_cannot_be_written_is_an_error_and_the_others_are_written(wrong: Any) -> None:
    batch, without = RecordBatch(LIMIT, transactional=False), RecordBatch(LIMIT, transactional=False)
    for place in range(2):
        with pytest.raises(UNWRITABLE):
            batch.append(*wrong)
        timestamp, key, value, headers = wrong
        with pytest.raises(UNWRITABLE):
            batch.append_alike(timestamp, key, [value], [*headers, ("id", b"")], "id", [b"1"])
        for one in (batch, without):
            assert one.append(5 + place, None, b"x", [])
    assert state(batch) == state(without)


def test_a_record_without_a_timestamp_gets_the_time_now() -> None:
    ours, theirs = RecordBatch(LIMIT, transactional=False), library(LIMIT)
    ours.append(None, None, b"x", [])
    theirs.append(timestamp=None, key=None, value=b"x", headers=[])
    assert abs(ours._first - int.from_bytes(theirs._build()[27:35])) < 60_000


async def test_the_library_takes_it_as_its_own() -> None:
    batch = RecordBatch(LIMIT, transactional=False)
    assert MessageBatch(TopicPartition("t", 0), batch, 30, 0).is_empty()
    batch.append(1, None, b"x", [])
    queued = MessageBatch(TopicPartition("t", 0), batch, 30, 10)
    assert not queued.is_empty() and queued.record_count == 1 and queued.remaining_linger() is None
    queued.set_producer_state(1, 2, 3)
    assert queued.get_data_buffer() == queued.get_data_buffer()  # a batch may be sent again
