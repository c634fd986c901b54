"""Batches that the library cannot read, or must not read: header names of any bytes, too many headers, bombs.

Kafka takes any bytes as a header name. The library decodes names as UTF-8 while it walks through a batch, and a name
that is no UTF-8 ends the walk: nothing behind that record can be read, however often it is fetched. Such a batch is
read once more, here, from its bytes, by the library's parser in Python with a lenient decoding of names. That parser
also leaves out the headers of a record that has too many. A batch that is too large to be unpacked is replaced by one
record that says so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import decode_varint

from streamtools.drivers.kafka.client.limits import MOST_HEADERS, UNREAD, Unreadable, end_of_record, unpacked

#: Bytes of a batch before its length, and before its records.
_LENGTH, _RECORDS = 8, 61
#: Says why a record's headers were not read.
TOO_MANY: Final = f"it has over {MOST_HEADERS:,} headers, more than are read".encode()
#: Seconds before partitions are fetched again that cannot be read now: they have no leader, or its disk fails.
REFUSED: Final = 0.1


class Records:
    """The batches of a fetch, as the library's MemoryRecords; each can be read whatever its bytes are.

    Parameters:
        data: what a broker has answered for one partition.
    """

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._records = MemoryRecords(data)
        self._place = 0

    def size_in_bytes(self) -> int:
        """Bytes of all."""
        return int(self._records.size_in_bytes())

    def has_next(self) -> bool:
        """Another batch is there."""
        return bool(self._records.has_next())

    def next_batch(self) -> Any:
        """The next batch; in the formats before headers, the library's own."""
        batch = self._records.next_batch()
        start, behind = self._place, self._place + _LENGTH + 4
        self._place = behind + int.from_bytes(self._data[behind - 4 : behind])
        return batch if type(batch) is not DefaultRecordBatch else _Batch(batch, self._data[start : self._place])


class _Batch:
    """A batch of the library, with its records read safely.

    Parameters:
        batch: the library's.
        data: its bytes.
    """

    def __init__(self, batch: Any, data: memoryview) -> None:
        self._batch = batch
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)  # the end of a transaction, which has no headers

    def __iter__(self) -> Iterator[Any]:
        batch = self._batch
        try:
            large = unpacked(self._data[_RECORDS:], batch.compression_type)
        except Unreadable as error:
            yield self._instead(error)
            return
        try:
            yield from batch if large is None else self._counted(large)
        except UnicodeDecodeError:
            yield from self._again()

    def _counted(self, large: memoryview) -> Iterator[Any]:
        """By the library up to the first record with too many headers, then by our parser."""
        records, place = iter(self._batch), 0
        while place < len(large):
            place, crowded = end_of_record(large, place)
            if crowded:
                yield from self._again()
                return
            yield next(records)

    def _again(self) -> Iterator[Any]:
        """From the first record on that the library cannot read: those before were handed over."""
        batch = _LenientBatch(self._data)
        for record in batch:
            if batch.odd:
                yield record

    def _instead(self, error: Unreadable) -> Any:
        """The record that replaces the batch. It has the last offset, so that a reader in the middle sees it too."""
        batch = self._batch
        why = f"the batch of the offsets {batch.base_offset} to {batch.next_offset - 1} {error}"
        return _DefaultRecordPy(
            batch.next_offset - 1, batch.max_timestamp, batch.timestamp_type, None, b"", [(UNREAD, why.encode())]
        )


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # the library has no types
    """Reads header names of any bytes (`\\xff` for a byte that is no UTF-8), and leaves out too many headers.

    Attributes:
        odd: such a name was read, or headers were left out.
    """

    odd: bool = False
    _pos: int

    def _read_msg(self, decode_varint: Any = decode_varint) -> Any:
        buffer, pos = self._buffer, self._pos
        length, pos = decode_varint(buffer, pos)
        end = pos + length
        _attributes, pos = decode_varint(buffer, pos)
        later, pos = decode_varint(buffer, pos)
        timestamp = (
            self.max_timestamp if self.timestamp_type == self.LOG_APPEND_TIME else self.first_timestamp + later
        )
        number, pos = decode_varint(buffer, pos)
        key, pos = _bytes(buffer, pos)
        value, pos = _bytes(buffer, pos)
        count, pos = decode_varint(buffer, pos)
        headers: list[tuple[str, bytes | None]] = []
        if count > MOST_HEADERS:
            self.odd, count, pos = True, 0, end
            headers.append((UNREAD, TOO_MANY))
        for _ in range(count):
            raw, pos = _bytes(buffer, pos)
            content, pos = _bytes(buffer, pos)
            headers.append((self._name(raw or b""), content))
        if pos != end:
            raise kafka.CorruptRecordException(f"A record of {length} bytes ends {pos - end} bytes behind its end")
        self._pos = pos
        return _DefaultRecordPy(self.base_offset + number, timestamp, self.timestamp_type, key, value, headers)

    def _name(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.odd = True
            return raw.decode("utf-8", "backslashreplace")


def _bytes(buffer: bytearray, pos: int) -> tuple[bytes | None, int]:
    length, pos = decode_varint(buffer, pos)
    return (None, pos) if length < 0 else (bytes(buffer[pos : pos + length]), pos + length)


class FetchedBytes:
    """Keeps the bytes of a client's fetches until they are taken; the library's own objects do not give them out.

    Parameters:
        client: the library's.
    """

    def __init__(self, client: Any) -> None:
        self._send = client.send
        client.send = self._sent
        self._found: dict[TopicPartition, bytes] = {}

    def take(self, partition: TopicPartition) -> bytes | None:
        """The bytes of this partition in the last answer."""
        return self._found.pop(partition, None)

    def clear(self) -> None:
        """Forget what was not taken."""
        self._found.clear()

    async def _sent(self, node: Any, request: Any, **options: Any) -> Any:
        answer = await self._send(node, request, **options)
        if type(request) is FetchRequest:
            refused, brought = False, False
            for topic, partitions in answer.topics:
                for partition, code, *_, data in partitions:
                    if code:
                        refused = True
                    elif data:
                        brought = True
                        self._found[TopicPartition(topic, partition)] = data
            if refused and not brought:  # the library fetches again at once, a thousand times a second
                await asyncio.sleep(REFUSED)
        return answer


class Buffers(OrderedDict[Any, Any]):
    """Replaces the library's buffers of fetched records: they can be read whatever their bytes are.

    Parameters:
        buffers: the library's, of which nothing was taken yet.
        fetched: the bytes of its fetches.
    """

    def __init__(self, buffers: Mapping[Any, Any], fetched: FetchedBytes) -> None:
        super().__init__()
        self._fetched = fetched
        for partition, result in buffers.items():
            self[partition] = result

    def __setitem__(self, partition: Any, result: Any) -> None:
        data = self._fetched.take(partition)
        if type(result) is FetchResult and data is not None:  # else an error
            result._partition_records._records = Records(data)
        super().__setitem__(partition, result)

    def clear(self) -> None:
        """Forget all: the partitions are revoked."""
        super().clear()
        self._fetched.clear()
