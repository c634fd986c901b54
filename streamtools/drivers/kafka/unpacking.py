"""Records whose header names may be any bytes.

Kafka takes a header name as it is. The library decodes it as UTF-8 while it walks through a batch, and a name that is
none ends the walk: nothing behind that record can be read, however often it is fetched. A batch that ends so is read
once more, here, from its bytes, with the library's parser in Python and a lenient decoding of names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from aiokafka.record.util import decode_varint


class Records:
    """As the library's MemoryRecords, with batches that have a record for each name of any bytes.

    Parameters:
        data: what a broker has answered for one partition.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._records = MemoryRecords(data)

    def size_in_bytes(self) -> int:
        """Bytes of all."""
        return int(self._records.size_in_bytes())

    def has_next(self) -> bool:
        """Another batch is there."""
        return bool(self._records.has_next())

    def next_batch(self) -> Any:
        """The next batch; one of the formats before headers as the library has it."""
        batch = self._records.next_batch()
        return batch if type(batch) is not DefaultRecordBatch else _Batch(batch, self._data)


class _Batch:
    """A batch as the library has it, but for its records."""

    def __init__(self, batch: Any, data: bytes) -> None:
        self._batch = batch
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)  # a transaction's marker, which has no headers

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batch
        except UnicodeDecodeError:
            yield from self._again()

    def _again(self) -> Iterator[Any]:
        """From the first record on that has such a name: those before were handed over."""
        batch = _LenientBatch(_slice(self._data, self._batch.base_offset))
        for record in batch:
            if batch.odd:
                yield record


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # the library has no types
    """Reads each header name; what is no UTF-8 in one stands as `\\xff`.

    Attributes:
        odd: such a name was read.
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
        headers = []
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


def _slice(data: bytes, offset: int) -> Any:
    """The bytes of the batch that begins at this offset."""
    records = _MemoryRecordsPy(data)
    while (found := records._next_slice) is not None:
        if int.from_bytes(found[:8], "big") == offset:
            return found
        records._cache_next()
    raise kafka.CorruptRecordException(f"No batch begins at offset {offset}")


class Answers:
    """Keeps the bytes that a client's fetches have brought until they are taken.

    The library wraps them in an object that gives them to nobody.

    Parameters:
        client: the library's.
    """

    def __init__(self, client: Any) -> None:
        self._send = client.send
        client.send = self._sent
        self._found: dict[TopicPartition, bytes] = {}

    def take(self, partition: TopicPartition) -> bytes | None:
        """What the last answer has brought of this partition."""
        return self._found.pop(partition, None)

    def clear(self) -> None:
        """Forget what was not taken."""
        self._found.clear()

    async def _sent(self, node: Any, request: Any, **options: Any) -> Any:
        answer = await self._send(node, request, **options)
        if type(request) is FetchRequest:
            for topic, partitions in answer.topics:
                for partition, *_, data in partitions:
                    if data:
                        self._found[TopicPartition(topic, partition)] = data
        return answer


class Buffers(OrderedDict[Any, Any]):
    """The library's buffers; what it hands over of them has names of any bytes.

    Parameters:
        buffers: as the library has them so far; nothing was taken from them yet.
        answers: of its client.
    """

    def __init__(self, buffers: Mapping[Any, Any], answers: Answers) -> None:
        super().__init__()
        self._answers = answers
        for partition, result in buffers.items():
            self[partition] = result

    def __setitem__(self, partition: Any, result: Any) -> None:
        data = self._answers.take(partition)
        if type(result) is FetchResult and data is not None:  # else an error
            result._partition_records._records = Records(data)
        super().__setitem__(partition, result)

    def clear(self) -> None:
        """Forget all: the partitions have gone."""
        super().clear()
        self._answers.clear()
