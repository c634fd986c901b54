"""RecordBatch: the records of one batch as bytes, in place of the library's BatchBuilder.

The library encodes each record by itself, and copies all that it has written whenever its buffer is full. Here
records that are alike are written by a template, and a batch is put together once.

The format is Kafka's record format 2: https://kafka.apache.org/documentation/#recordbatch
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from operator import index
from typing import Final

from aiokafka.record.util import calc_crc32c

from streamtools.text.bounded_cache import BoundedCache

#: A record's header: its name and its value.
Header = tuple[str, bytes | None]

#: How a batch begins: base offset, length, leader's epoch, format, checksum.
_HEAD: Final = struct.Struct(">qiibI")
#: Then: attributes, last offset, first and last timestamp, producer's id and epoch, first sequence number, records.
_REST: Final = struct.Struct(">hiqqqhii")
_START: Final = _HEAD.size + _REST.size
#: Bytes that the length of a batch does not count: the base offset, and the length itself.
_UNCOUNTED: Final = 12
_FORMAT: Final = 2
_TRANSACTIONAL: Final = 0x10
#: Numbers up to this one are kept in their encoded form.
_SMALL: Final = 4096


class _Varints(dict[int, bytes]):
    """Numbers in zigzag encoding, with seven bits in each byte."""

    def __missing__(self, number: int) -> bytes:
        if not -(2**63) <= number < 2**63:
            raise OverflowError(f"{number} has more than 64 bits")
        left, written = (number << 1) ^ (number >> 63), bytearray()
        while left > 0x7F:  # noqa: PLR2004 - seven bits
            written.append(0x80 | left & 0x7F)
            left >>= 7
        written.append(left)
        if -1 <= number <= _SMALL:
            self[number] = bytes(written)
        return bytes(written)


_varints: Final = _Varints()
_NONE: Final = _varints[-1]


class RecordBatch:
    """The records of one batch, with the methods that the library calls on its own builder.

    Parameters:
        limit: bytes at most.
        transactional: it belongs to a transaction.
    """

    def __init__(self, limit: int, *, transactional: bool) -> None:
        self._limit = limit
        self._attributes = _TRANSACTIONAL if transactional else 0
        self._data = bytearray(_START)
        self._number = 0
        self._first = self._last = 0  # timestamps
        self._producer = -1, -1, 0

    def append(
        self, timestamp: int | None, key: bytes | None, value: bytes | None, headers: Sequence[Header]
    ) -> bool:
        """Add a record; False if there is no room for it. The first one is added whatever its size is.

        Parameters:
            timestamp: in milliseconds; None for now.

        Raises:
            TypeError: something has the wrong type.
            ValueError: a header's name has no UTF-8 form.
            OverflowError: the timestamp has more than 64 bits.
        """
        timestamp, later = self._times(timestamp)
        fields = [b"\0", later, _varints[self._number]]
        fields += (_NONE,) if key is None else (_varints[len(key)], key)
        fields += (_NONE,) if value is None else (_varints[len(value)], value)
        fields.append(_varints[len(headers)])
        for name, held in headers:
            fields += (_names[name], _NONE) if held is None else (_names[name], _varints[len(held)], held)
        record = b"".join(fields)
        return self._add(_varints[len(record)] + record, 1, timestamp)

    def append_alike(
        self,
        timestamp: int | None,
        key: bytes | None,
        values: Sequence[bytes],
        headers: Sequence[Header],
        own: str,
        ids: Sequence[bytes],
    ) -> bool:
        """Add records that differ in their values, and in the header of this name; False if there is no room for all.

        Parameters:
            timestamp: in milliseconds; None for now.
            own: the name of the header that has each record's id.
            ids: all of the same length, as many as values.

        Raises:
            TypeError, ValueError, OverflowError: as `append`.
        """
        timestamp, later = self._times(timestamp)
        end = _varints[len(headers)]
        for name, held in headers:
            end += _names[name] + (_varints[len(ids[0])] if name == own else _counted(held))
            if name == own:
                before, end = end, b""
        template = b"%b%b%b%b" + before.replace(b"%", b"%%") + b"%b" + end.replace(b"%", b"%%")
        numbers = [_varints[number] for number in range(self._number, self._number + len(values))]
        size = len(before) + len(ids[0]) + len(end)
        widths = {len(numbers[0]), len(numbers[-1])}
        frames = {width: _Frames(b"\0" + later, _counted(key), width + size) for width in widths}
        records = []
        for number, value, id_ in zip(numbers, values, ids, strict=True):
            begin, middle = frames[len(number)][len(value)]
            records.append(template % (begin, number, middle, value, id_))
        return self._add(b"".join(records), len(records), timestamp)

    def _times(self, timestamp: int | None) -> tuple[int, bytes]:
        """A record's timestamp, and how much later it is than that of the first."""
        if type(timestamp) is not int:
            timestamp = int(time.time() * 1000) if timestamp is None else index(timestamp)
        if not -(2**63) <= timestamp < 2**63:
            raise OverflowError(f"the timestamp {timestamp} has more than 64 bits")
        if not self._number:
            self._first = self._last = timestamp
        return timestamp, _varints[timestamp - self._first]

    def _add(self, records: bytes, number: int, timestamp: int) -> bool:
        if self._number and len(self._data) + len(records) > self._limit:
            return False
        self._data += records
        self._number += number
        if timestamp > self._last:
            self._last = timestamp
        return True

    # --- what the library calls -------------------------------------------------------------------

    def size(self) -> int:
        """Bytes of it."""
        return len(self._data)

    def record_count(self) -> int:
        """How many records it has."""
        return self._number

    def closed(self) -> bool:
        """Nothing is added by the library: it is sent at once."""
        return True

    def close(self) -> None:
        """Nothing to do."""

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        self._producer = producer_id, producer_epoch, base_sequence

    def _build(self) -> bytearray:
        rest = self._attributes, self._number - 1, self._first, self._last, *self._producer, self._number
        _REST.pack_into(self._data, _HEAD.size, *rest)
        checksum = calc_crc32c(memoryview(self._data)[_HEAD.size :])
        _HEAD.pack_into(self._data, 0, 0, len(self._data) - _UNCOUNTED, -1, _FORMAT, checksum)
        return self._data


class _Frames(dict[int, tuple[bytes, bytes]]):
    """By the length of a record's value: what stands before its number, and what between its number and its value.

    Parameters:
        start: of the record, behind its length.
        key: with its length.
        size: bytes of what stands in all of them and is neither start nor key.
    """

    def __init__(self, start: bytes, key: bytes, size: int) -> None:
        super().__init__()
        self._start, self._key, self._size = start, key, size

    def __missing__(self, length: int) -> tuple[bytes, bytes]:
        middle = self._key + _varints[length]
        made = self[length] = _varints[len(self._start) + self._size + len(middle) + length] + self._start, middle
        return made


def _counted(raw: bytes | None) -> bytes:
    """Bytes with their number before them."""
    return _NONE if raw is None else _varints[len(raw)] + raw


#: Names of headers, with their number of bytes.
_names: Final = BoundedCache(lambda name: _counted(str.encode(name)))
