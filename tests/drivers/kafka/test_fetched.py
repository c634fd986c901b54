"""What is taken from the library as bytes is what its own parser would have handed over."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.codec import gzip_encode, zstd_encode
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.kafka.client import limits
from streamtools.drivers.kafka.client.batches import REFUSED, FetchedBytes, Records
from streamtools.drivers.kafka.client.fetched import Fetched, FetchedBuffers
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.consuming.prefetch import UNPACKED, Prefetcher
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.operating.waiting import _first_time
from streamtools.drivers.kafka.records import read_record

PLACE = TopicPartition("t", 0)
#: Of a batch's header, see https://kafka.apache.org/documentation/#recordbatch: bytes before the field.
LENGTH, CRC, ATTRIBUTES, LAST_DELTA, HEADER = 8, 17, 21, 23, 61
CONTROL = 0x20
ABORT, COMMIT = struct.pack(">HH", 0, 0), struct.pack(">HH", 0, 1)
PLAIN_CODEC, GZIP, SNAPPY, LZ4, ZSTD = range(5)
NOBODY = -1


@dataclass
class Batch:
    """Some offsets of a log, with the records that compaction has left of them."""

    first: int
    length: int
    left: list[int]  # of them, from 0 on
    producer: int = NOBODY
    transactional: bool = False
    marker: bytes | None = None
    codec: int = PLAIN_CODEC

    @property
    def data(self) -> bytes:
        builder = DefaultRecordBatchBuilder(2, self.codec, self.transactional, self.producer, 0, 0, 1 << 20)
        for n in self.left:
            key, value = (self.marker, b"") if self.marker is not None else (None if n % 3 else b"k", b"value " * n)
            headers = [] if n % 2 else [("ce_id", b"%d" % n), ("none", None)]
            assert builder.append(n, timestamp=n, key=key, value=value or None, headers=headers) is not None
        data = bytearray(builder.build())
        struct.pack_into(">q", data, 0, self.first)
        if self.marker is not None:
            data[ATTRIBUTES + 1] |= CONTROL
        struct.pack_into(">i", data, LAST_DELTA, self.length - 1)
        struct.pack_into(">I", data, CRC, calc_crc32c(bytes(data[ATTRIBUTES:])))
        return bytes(data)


class State:
    """As the library knows a partition."""

    active = True
    paused = False

    def __init__(self, position: int) -> None:
        self.position = position

    def state_value(self, partition: TopicPartition) -> State:
        return self

    def consumed_to(self, position: int) -> None:
        self.position = position


def buffers(result: FetchResult, data: bytes | None = None) -> FetchedBuffers:
    """The library's buffers with this result, whose bytes are known or not."""
    kept_bytes = FetchedBytes(SimpleNamespace(send=None))
    if data is not None:
        kept_bytes._found[PLACE] = data
    return FetchedBuffers({PLACE: result}, kept_bytes)


def parsed(data: bytes, aborted: list[tuple[int, int]], start: int) -> PartitionRecords:
    return PartitionRecords(PLACE, MemoryRecords(data), list(aborted), start, None, None, True, READ_COMMITTED)


def taken(data: bytes, aborted: list[tuple[int, int]], start: int) -> tuple[list[Any], int, Fetched]:
    """Records, the library's next position, and what was fetched."""
    state = State(start)
    result = FetchResult(PLACE, assignment=state, partition_records=parsed(data, aborted, start), backoff=0)
    fetched = buffers(result, data)[PLACE].getall(None)
    assert isinstance(fetched, Fetched) and not result.has_more()
    return [content(record) for record in fetched.records], state.position, fetched


def content(record: Any) -> tuple[Any, ...]:
    return record.offset, record.timestamp, record.key, record.value, tuple(record.headers)


def check(data: bytes, aborted: list[tuple[int, int]], start: int) -> None:
    library = parsed(data, aborted, start)
    expected = [content(record) for record in library]
    found, position, fetched = taken(data, aborted, start)
    assert found == expected
    assert position == fetched.end == library.next_fetch_offset
    assert fetched.size == len(data)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Batch], list[tuple[int, int]]]:
    """What one request brings: transactions that mix, those that were aborted, holes; and who aborted from where."""
    at = draw(st.integers(0, 5))
    batches: list[Batch] = []
    begun: dict[int, int] = {}
    aborted = []
    for _ in range(draw(st.integers(1, 12))):
        producer = draw(st.sampled_from([NOBODY, 1, 2]))
        if producer in begun and draw(st.booleans()):
            aborts = draw(st.booleans())
            if aborts:
                aborted.append((producer, begun[producer]))
            del begun[producer]
            batches.append(Batch(at, 1, [0], producer, True, ABORT if aborts else COMMIT))
            at += 1
            continue
        transactional = producer != NOBODY and (producer in begun or draw(st.booleans()))
        length = draw(st.integers(1, 6))
        left = sorted(draw(st.sets(st.integers(0, length - 1))))
        codec = draw(st.sampled_from([PLAIN_CODEC, GZIP, SNAPPY, LZ4, ZSTD])) if left else PLAIN_CODEC
        batches.append(Batch(at, length, left, producer, transactional, codec=codec))
        if transactional:
            begun.setdefault(producer, at)
        at += length + draw(st.sampled_from([0, 0, 0, 4]))  # whole batches are gone
    return batches, aborted


@given(logs(), st.data())
def test_of_any_log_it_is_the_same_as_the_librarys(
    log: tuple[list[Batch], list[tuple[int, int]]], data: st.DataObject
) -> None:
    batches, aborted = log
    start = data.draw(st.integers(batches[0].first, batches[0].first + batches[0].length - 1))
    written = b"".join(batch.data for batch in batches)
    cut = data.draw(st.sampled_from([0, 1, 30]))  # the last batch may be there in part
    check(written + batches[0].data[:cut], aborted, start)


def test_what_was_aborted_between_what_was_committed_is_left_out() -> None:
    batches = [
        Batch(0, 2, [0, 1], 1, True),  # aborted
        Batch(2, 2, [0, 1], 2, True),  # committed
        Batch(4, 1, [0], 1, True, ABORT),
        Batch(5, 2, [0, 1], 1, True),  # the same producer, committed
        Batch(7, 1, [0], 2, True, COMMIT),
        Batch(8, 1, [0], 1, True, COMMIT),
    ]
    written = b"".join(batch.data for batch in batches)
    found, position, _ = taken(written, [(1, 0)], 0)
    assert ([offset for offset, *_ in found], position) == ([2, 3, 5, 6], 9)


@pytest.mark.parametrize("codec", [PLAIN_CODEC, GZIP, SNAPPY, LZ4, ZSTD])
def test_of_a_batch_that_begins_before_the_place_asked_for_the_rest_alone_is_read(codec: int) -> None:
    written = Batch(10, 50, [*range(0, 50, 2)], codec=codec).data
    found, position, _ = taken(written, [], 35)
    assert ([offset for offset, *_ in found], position) == ([*range(36, 60, 2)], 60)


def test_the_end_of_a_transaction_of_which_compaction_has_left_nothing_ends_nothing() -> None:
    """Kafka keeps it, empty, as long as its producer lives; the library takes that for an error."""
    batches = [
        Batch(0, 1, [0], 1, True),
        Batch(1, 1, [], 2, True, ABORT),
        Batch(2, 1, [0], 1, True, ABORT),
        Batch(3, 1, [0]),
    ]
    found, position, _ = taken(b"".join(batch.data for batch in batches), [(1, 0)], 0)
    assert ([offset for offset, *_ in found], position) == ([3], 4)


@pytest.mark.parametrize(("magic", "codec"), [(0, PLAIN_CODEC), (0, GZIP), (1, PLAIN_CODEC), (1, GZIP), (1, LZ4)])
@pytest.mark.parametrize("start", [100, 103])
def test_old_formats_are_read_too(magic: int, codec: int, start: int) -> None:
    written = bytearray()
    wrapped = codec != PLAIN_CODEC
    builder = LegacyRecordBatchBuilder(magic, codec, 1 << 20)
    for n in range(6) if wrapped else range(start - 100, 6):
        # Version 1 counts from 0 within what is compressed; the offset outside is that of the last.
        offset = n if wrapped and magic == 1 else 100 + n
        assert builder.append(offset, timestamp=5, key=b"k", value=b"value " * 20) is not None
    written += builder.build()
    if wrapped:
        struct.pack_into(">q", written, 0, 105)
    check(bytes(written), [], start)
    found, position, _ = taken(bytes(written), [], start)
    assert ([offset for offset, *_ in found], position) == ([*range(start, 106)], 106)


def test_records_of_the_oldest_format_have_no_age() -> None:
    builder = LegacyRecordBatchBuilder(0, PLAIN_CODEC, 1 << 20)
    assert builder.append(0, timestamp=None, key=None, value=b"x") is not None
    assert _first_time(MemoryRecords(bytes(builder.build())), 0) is None


def test_bytes_that_have_changed_on_their_way_are_an_error_and_nothing_is_passed() -> None:
    good, bad = Batch(0, 2, [0, 1]).data, bytearray(Batch(2, 2, [0, 1]).data)
    bad[-1] ^= 1
    state = State(0)
    result = FetchResult(PLACE, assignment=state, partition_records=parsed(good + bytes(bad), [], 0), backoff=0)
    with pytest.raises(kafka.CorruptRecordException, match="CRC"):
        buffers(result)[PLACE].getall(None)
    assert state.position == 0


@pytest.mark.parametrize("changes", [{"paused": True}, {"active": False}, {"position": 7}])
def test_what_was_fetched_for_another_place_is_dropped_and_nothing_is_passed(changes: dict[str, Any]) -> None:
    state = State(0)
    vars(state).update(changes)
    result = FetchResult(PLACE, assignment=state, partition_records=parsed(Batch(0, 1, [0]).data, [], 0), backoff=0)
    assert not buffers(result)[PLACE].getall(None)
    assert state.position == changes.get("position", 0) and not result.has_more()


# --- header names of any bytes --------------------------------------------------------------------


def renamed(data: bytes, name: bytes, other: bytes) -> bytes:
    """A batch in which a header name is other bytes."""
    changed = bytearray(data.replace(name, other))
    struct.pack_into(">I", changed, CRC, calc_crc32c(bytes(changed[ATTRIBUTES:])))
    return bytes(changed)


def batch_of(names: list[str], first: int) -> bytes:
    """A batch with a record for each of these header names."""
    builder = DefaultRecordBatchBuilder(2, PLAIN_CODEC, False, NOBODY, 0, 0, 1 << 20)
    for n, name in enumerate(names):
        headers = [("before", None), (name, b"%d" % n), ("behind", b"x")]
        assert builder.append(n, timestamp=n, key=b"k", value=b"value", headers=headers) is not None
    data = bytearray(builder.build())
    struct.pack_into(">q", data, 0, first)
    return bytes(data)


@pytest.mark.parametrize("start", [5, 6, 7, 8, 9, 11])
def test_a_header_name_of_any_bytes_costs_no_record(start: int) -> None:
    odd = renamed(batch_of(["good", "oddnam", "good"], 7), b"oddnam", b"\xff\xfename")
    data = batch_of(["good", "good"], 5) + odd + batch_of(["good", "good"], 10)
    found, position, _ = taken(data, [], start)
    numbers = {5: 0, 6: 1, 7: 0, 8: 1, 9: 2, 10: 0, 11: 1}  # of each record in its batch
    assert [record[0] for record in found] == [*range(start, 12)] and position == 12
    for offset, _, key, value, headers in found:
        name = r"\xff\xfename" if offset == 8 else "good"
        assert (key, value) == (b"k", b"value")
        assert headers == (("before", None), (name, b"%d" % numbers[offset]), ("behind", b"x"))


@given(
    st.lists(st.binary(min_size=3, max_size=3), min_size=1, max_size=6), st.sampled_from([PLAIN_CODEC, GZIP, ZSTD])
)
def test_header_names_of_any_bytes_in_any_records(names: list[bytes], codec: int) -> None:
    texts = [f"n{n:02}" for n in range(len(names))]
    data = batch_of(texts, 0)
    for text, name in zip(texts, names, strict=True):
        data = data.replace(b"\x06" + text.encode(), b"\x06" + name)
    data = packed(data, codec)
    found, position, _ = taken(data, [], 0)
    expected = [name.decode("utf-8", "backslashreplace") for name in names]
    assert [headers[1][0] for *_, headers in found] == expected and position == len(names)
    assert _first_time(Records(data), len(names) - 1) == (len(names) - 1) / 1000


def packed(data: bytes, codec: int) -> bytes:
    """A batch with its records compressed."""
    pack = {PLAIN_CODEC: bytes, GZIP: gzip_encode, ZSTD: zstd_encode}[codec]
    changed = bytearray(data[:HEADER] + pack(data[HEADER:]))
    struct.pack_into(">i", changed, LENGTH, len(changed) - LENGTH - 4)
    changed[ATTRIBUTES + 1] |= codec
    struct.pack_into(">I", changed, CRC, calc_crc32c(bytes(changed[ATTRIBUTES:])))
    return bytes(changed)


# --- how much of it is in memory ------------------------------------------------------------------


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
def test_one_batch_is_unpacked_at_a_time_and_let_go_behind_its_last_record(codec: int) -> None:
    """A million bytes in each of ten batches, that come as a few thousand."""
    batches, records, size = 10, 100, 10_000
    data = b""
    for n in range(batches):
        builder = DefaultRecordBatchBuilder(2, codec, False, NOBODY, 0, 0, 1 << 24)
        for at in range(records):
            assert builder.append(at, timestamp=1, key=None, value=b"x" * size, headers=[]) is not None
        built = builder.build()
        struct.pack_into(">q", built, 0, n * records)
        data += built
    result = FetchResult(PLACE, assignment=State(0), partition_records=parsed(data, [], 0), backoff=0)
    fetched = buffers(result, data)[PLACE].getall(None)
    assert fetched.held == fetched.size == len(data)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        found = 0
        for record in fetched.records:
            found += 1
            assert record.offset == found - 1
            assert records * size <= fetched.unpacked <= 1.2 * records * size
            assert fetched.held == len(data) + fetched.unpacked
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert found == batches * records
    # One that is read and one that is being unpacked, each as compressed and as unpacked bytes.
    assert peak < 4 * records * size


# --- what is not to be in memory ------------------------------------------------------------------


def batch(values: list[bytes], codec: int, *, headers: int = 0, at: int = 0) -> bytes:
    """A batch of these values, of which the one at `at` has so many headers."""
    builder = DefaultRecordBatchBuilder(2, codec, False, NOBODY, 0, 0, 1 << 28)
    for n, value in enumerate(values):
        many = [("", None)] * (headers if n == at else 1)
        assert builder.append(n, timestamp=1, key=None, value=value, headers=many) is not None
    return bytes(builder.build())


def troubles(records: list[Any]) -> list[str]:
    """What is wrong with each, as its message tells it."""
    found = [read_record(SimpleNamespace(offset=o, timestamp=t, key=k, value=v, headers=h), PLACE)[1]
             for o, t, k, v, h in records]  # fmt: skip
    return [str(trouble or "") for trouble in found]


@pytest.mark.parametrize("codec", [GZIP, SNAPPY, LZ4, ZSTD])
@pytest.mark.parametrize("start", [0, 2])
def test_a_batch_that_is_a_bomb_is_one_message_that_cannot_be_read(
    codec: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_UNPACKED", 2_000_000)
    bomb, good = batch([b"\0" * 1_100_000] * 3, codec), bytearray(batch([b"good"], codec))
    monkeypatch.setattr(limits, "RATIO", 1_000_000 // len(bomb))
    struct.pack_into(">q", good, 0, 3)
    records, end, fetched = taken(bomb + good, [], start)
    assert [(offset, value) for offset, _, _, value, _ in records] == [(2, b""), (3, b"good")]
    first, second = troubles(records)
    assert "the batch of the offsets 0 to 2 does not decompress into 2,000,000 bytes" in first
    assert second == "" and end == 4
    assert fetched.held < 10_000 + len(bomb) + len(good)


@pytest.mark.parametrize("codec", [PLAIN_CODEC, GZIP, SNAPPY, LZ4, ZSTD])
def test_a_large_batch_is_read_as_the_library_reads_it(codec: int) -> None:
    data = batch([b"x" * 200_000, b"", b"y" * 1_500_000, b"z"], codec, headers=10_000, at=1)
    check(data, [], 0)
    check(data, [], 2)


@pytest.mark.parametrize("codec", [PLAIN_CODEC, GZIP, SNAPPY, LZ4, ZSTD])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_record_with_very_many_headers_costs_itself_alone(codec: int, at: int) -> None:
    values = [b"a" * 400_000, b"b", b"c"]
    records, end, _ = taken(batch(values, codec, headers=400_000, at=at), [], 0)
    assert [(offset, value) for offset, _, _, value, _ in records] == [*enumerate(values)] and end == 3
    assert sum(len(headers) for *_, headers in records) == 3  # those of the one were never made
    assert [bool(trouble) for trouble in troubles(records)] == [n == at for n in range(3)]
    assert "over 10,000 headers" in troubles(records)[at]


def test_what_was_not_compressed_counts_once() -> None:
    _, _, fetched = taken(Batch(0, 5, [0, 1, 2, 3, 4]).data, [], 0)
    assert fetched.held == fetched.size


async def test_no_further_partition_is_unpacked_while_much_is_unpacked() -> None:
    partitions = {}
    for number in range(4):
        place = TopicPartition("t", number)
        partitions[place] = partition = AssignedPartition(place, Offsets(0))
        partition.arrive(Fetched(iter(()), 10, 100))
    prefetcher = Prefetcher.__new__(Prefetcher)
    prefetcher._member, prefetcher._turn = SimpleNamespace(partitions=partitions), 0
    first, second, third, _ = partitions.values()
    first.arrived[0].unpacked = UNPACKED - 1
    assert len(prefetcher.ready()) == 4
    second.arrived[0].unpacked = 1
    assert {id(partition) for partition in prefetcher.ready()} == {id(first), id(second)}
    assert first.waiting_bytes == 100 + UNPACKED - 1 and third.waiting_bytes == 100


@pytest.mark.parametrize(
    ("rows", "pauses"),
    [
        ([(0, 0, b"")], 0),
        ([(0, 6, b"")], 1),
        ([(0, 56, b"left"), (1, 0, b"")], 1),
        ([(0, 6, b""), (1, 0, b"data")], 0),
    ],
)
async def test_partitions_that_may_not_be_read_now_are_asked_again_after_a_pause(
    rows: list[tuple[int, int, bytes]], pauses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks at once, a thousand times a second; what others bring is not held up."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def send(*_: Any) -> Any:
        return SimpleNamespace(topics=[("orders", [(partition, code, 0, data) for partition, code, data in rows])])

    client = SimpleNamespace(send=send)
    kept_bytes = FetchedBytes(client)
    monkeypatch.setattr("streamtools.drivers.kafka.client.batches.asyncio", SimpleNamespace(sleep=sleep))
    await client.send(1, FetchRequest(0, 0, 0, 0, []))
    assert slept == [REFUSED] * pauses
    kept = {partition: kept_bytes.take(TopicPartition("orders", partition)) for partition, _, _ in rows}
    assert kept == {partition: data if data and not code else None for partition, code, data in rows}
