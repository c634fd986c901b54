"""What the library has fetched, taken from it as bytes and parsed while it is handed over.

The library parses all that one request brings (1 MiB for each partition) before it gives out the first record, and
copies each record into an object with topic and partition. Thousands of records that wait are tens of thousands of
objects, which Python's garbage collector visits again and again: half of the time that consuming took. So its
results give out, instead of a list of records, a Fetched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile
from typing import Any, Final, cast

from aiokafka import errors as kafka
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.record.control_record import ABORT_MARKER, ControlRecord

from streamtools.drivers.kafka.client import batches

#: Bytes of a record beside its key and value, about.
OVERHEAD: Final = 50


class Fetched:
    """Records of one partition that came with one request.

    A batch is unpacked when its first record is asked for, and let go behind its last one: what was compressed may be
    a hundred times as large.

    Attributes:
        records: each as it was parsed (offset, timestamp in ms, key, value, headers), parsed as it is asked for.
        start: the offset that was asked for.
        end: the offset after the last.
        size: bytes of all, as they came.
        unpacked: bytes of the batch that is being read, about; 0 where it was not compressed.
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
        """Those of these batches, from `start` on."""
        fetched = cls(iter(()), end, size, start=start)
        parsed = chain.from_iterable(map(fetched._unpack, batches))
        # The first batch may begin before what was asked for.
        fetched.records = dropwhile(lambda record: record.offset < start, parsed)
        return fetched

    @property
    def held(self) -> int:
        """Bytes that are in memory for it."""
        return self.size + self.unpacked

    def _unpack(self, batch: Any) -> Iterable[Any]:
        self.unpacked = 0
        if not getattr(batch, "compression_type", 0):  # the oldest formats do not tell
            return cast(Iterable[Any], batch)
        records = iter(batch)
        first = next(records, None)
        if first is None:
            return ()
        # The library does not tell; its records are about alike.
        length = OVERHEAD + len(first.value or b"") + len(first.key or b"")
        self.unpacked = length * (batch.next_offset - batch.base_offset)
        return chain((first,), records)


class Buffers(batches.Buffers):
    """The library's buffers; what `getmany()` returns then has a Fetched for each partition."""

    def __setitem__(self, partition: Any, result: Any) -> None:
        if type(result) is FetchResult:  # else an error
            result.getall = lambda _: _take(result)
        super().__setitem__(partition, result)


def _take(result: FetchResult) -> Fetched | None:
    """As its own `getall`: what is fetched, and the library goes on behind it."""
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
    """Those of which a reader is to see the records: as the library's own parser has it, for read_committed."""
    while batches:
        batch = batches.popleft()  # and let go of with the next one
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
    """The marker in it says that its producer's transaction was aborted."""
    # Where compaction has taken the marker, Kafka keeps the batch while its producer lives, and the library raises.
    marker = next(batch, None)
    return marker is not None and ControlRecord.parse(marker.key) == ABORT_MARKER
