"""Fetched: fetched records, kept as bytes and parsed while they are handed over.

The library parses all that one request brings (1 MiB for each partition) before it gives out the first record, and
copies each record into an object with topic and partition. Thousands of records that wait are tens of thousands of
objects, which Python's garbage collector visits again and again: half of the time that consuming took. So its fetch
results give out a Fetched instead of a list of records.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile
from typing import Any, Final, cast

from aiokafka import errors as kafka
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.record.control_record import ABORT_MARKER, ControlRecord

from streamtools.drivers.kafka.client.batches import Buffers

#: Bytes of a record beside its key and value, roughly.
OVERHEAD: Final = 50


class Fetched:
    """Records of one partition that came with one request.

    A batch is unpacked when its first record is asked for, and freed after its last one: it may be a hundred times as
    large as it came.

    Attributes:
        records: parsed when asked for; each has offset, timestamp (in ms), key, value and headers.
        start: the offset that was asked for.
        end: the offset after the last record.
        size: bytes of all, as they came.
        unpacked: bytes of the batch that is being read, roughly; 0 if it was not compressed.
    """

    __slots__ = ("end", "records", "size", "start", "unpacked")

    def __init__(self, records: Iterator[Any], end: int, size: int, *, start: int = 0) -> None:
        self.records: Iterator[Any] = records
        self.start: int = start
        self.end: int = end
        self.size: int = size
        self.unpacked: int = 0

    @classmethod
    def of(cls, batches: Iterator[Any], start: int, end: int, size: int) -> Fetched:
        """The records of these batches, from offset `start` on."""
        fetched = cls(iter(()), end, size, start=start)
        parsed = chain.from_iterable(map(fetched._unpack, batches))
        # The first batch may begin before what was asked for.
        fetched.records = dropwhile(lambda record: record.offset < start, parsed)
        return fetched

    @property
    def held(self) -> int:
        """Bytes of memory that it takes."""
        return self.size + self.unpacked

    def _unpack(self, batch: Any) -> Iterable[Any]:
        self.unpacked = 0
        if not getattr(batch, "compression_type", 0):  # the oldest formats do not tell
            return cast(Iterable[Any], batch)
        records = iter(batch)
        first = next(records, None)
        if first is None:
            return ()
        # The library does not tell the size: its records are taken to be about alike.
        length = OVERHEAD + len(first.value or b"") + len(first.key or b"")
        self.unpacked = length * (batch.next_offset - batch.base_offset)
        return chain((first,), records)


class FetchedBuffers(Buffers):
    """Replaces the library's buffers: `getmany()` returns a Fetched for each partition."""

    def __setitem__(self, partition: Any, result: Any) -> None:
        if type(result) is FetchResult:  # else an error
            result.getall = lambda _: _take(result)
        super().__setitem__(partition, result)


def _take(result: FetchResult) -> Fetched | None:
    """As the library's own `getall`: take what was fetched, and have the library go on behind it."""
    partition = result._topic_partition
    if not result.check_assignment(partition) or not result.has_more():
        return None
    records = result._partition_records
    memory = records._records
    size, end = memory.size_in_bytes(), records.next_fetch_offset
    batches: deque[Any] = deque()
    while memory.has_next():
        batch = memory.next_batch()
        if not batch.validate_crc():
            raise kafka.CorruptRecordException(f"Invalid CRC - {partition}")
        batches.append(batch)
        end = max(end, batch.next_offset)
    start = records.next_fetch_offset
    result._assignment.state_value(partition).consumed_to(end)
    result._partition_records = None
    return Fetched.of(committed(records, batches), start, end, size)


def committed(records: PartitionRecords, batches: deque[Any]) -> Iterator[Any]:
    """The batches that a reader of committed messages sees; as the library's own parser does it."""
    while batches:
        batch = batches.popleft()  # freed when the next one is taken
        control, producer = batch.is_control_batch, batch.producer_id
        if producer is not None:
            records._consume_aborted_up_to(batch.base_offset)
            if control and _ends_aborted(batch):
                records._aborted_producers.discard(producer)
            if batch.is_transactional and producer in records._aborted_producers:
                continue
        if not control:
            yield batch


def _ends_aborted(batch: Any) -> bool:
    """The batch is the end of a transaction that was aborted."""
    # If compaction has removed the marker, Kafka keeps the empty batch while its producer lives; the library raises.
    marker = next(batch, None)
    return marker is not None and ControlRecord.parse(marker.key) == ABORT_MARKER
