"""Offsets: what is finished of one partition, and what of that can be committed. No I/O.

Kafka keeps one offset for each group and partition: everything before it is done. Messages of a partition are handled
concurrently and finish in any order, so the offset that can be committed is the first one that is not finished. The
finished offsets behind it are written into the metadata of the commit, so that the partition's next owner repeats
only what is not finished.

The metadata is `s1:` and base64 of varints: the length of a gap, the length of the run of finished offsets behind it,
and so on, from the committed offset on.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

#: The first characters of our metadata; metadata of other programs is not read.
MARK: Final = "s1:"
#: Characters of metadata at most. Kafka takes 4096 bytes unless told otherwise (`offset.metadata.max.bytes`).
METADATA_LIMIT: Final = 3500
#: Bits of an offset.
LARGEST: Final = 63

#: Finished offsets: the first, and the one after the last.
Run = tuple[int, int]


class Offsets:
    """The offsets of one partition that were taken, and those that are finished.

    Offsets are taken in rising order. Those between two taken ones are no messages (ends of transactions, compacted
    records), and count as finished.

    Parameters:
        start: the committed offset, where reading begins.
        metadata: of that commit.
        finished: what this consumer has finished before and could not commit.
    """

    def __init__(self, start: int, metadata: str = "", *, finished: Iterable[Run] = ()) -> None:
        self._start = start
        #: The first offset that was not taken yet.
        self.next: int = start
        #: The offsets that are taken and not finished, in rising order. The values are the owner's; None at first.
        self.pending: dict[int, Any] = {}
        ahead = [(max(first, start), end) for first, end in finished if end > start]
        # Finished by the partition's former owners.
        self._ahead = deque(_joined(sorted(ahead + decode(start, metadata))) if ahead else decode(start, metadata))
        self._changes = 0
        self._committed = 0

    @property
    def position(self) -> int:
        """The offset that can be committed: everything before it is finished."""
        return next(iter(self.pending), self.next)

    @property
    def uncommitted(self) -> int:
        """How many were finished since the last commit."""
        return self._changes - self._committed

    def take(self, offset: int) -> bool:
        """Take the message at `offset`; False if it was finished before.

        Raises:
            ValueError: it was taken already; the log was cut, and needs new Offsets.
        """
        if offset < self.next:
            raise ValueError(f"offset {offset} was taken already; the next one is {self.next}")
        self.next = offset + 1
        if self._ahead and self._was_finished(offset):
            self._changes += 1
            return False
        self.pending[offset] = None
        return True

    def _was_finished(self, offset: int) -> bool:
        while self._ahead and self._ahead[0][1] <= offset:
            self._ahead.popleft()
        return bool(self._ahead) and self._ahead[0][0] <= offset

    def pass_over(self, end: int) -> bool:
        """Finish all offsets before `end` that were not taken, as they are no messages; False if there are none."""
        if end <= self.next:
            return False
        self.next = end
        self._changes += 1
        return True

    def finish(self, offset: int, held: object = None) -> bool:
        """Finish the message at `offset`; False if it is not pending, or its value is another than `held`."""
        pending = self.pending
        if offset not in pending or pending[offset] is not held:
            return False
        del pending[offset]
        self._changes += 1
        return True

    def commit(self, limit: int = METADATA_LIMIT, *, also: Collection[int] = ()) -> tuple[int, str, bool]:
        """What to commit: the offset, the metadata, and whether the metadata has room for all that is finished.

        Parameters:
            limit: characters of metadata at most.
            also: pending offsets that count as finished if this very commit succeeds.
        """
        pending = [offset for offset in self.pending if offset not in also] if also else self.pending
        start = next(iter(pending), self.next)
        text, whole = encode(start, self._finished(start, pending), limit)
        return start, text, whole

    def unfinished(self, first: int, end: int) -> int:
        """How many offsets from `first` to before `end`, none of which was taken, nobody has finished."""
        done = sum(max(0, min(end, last) - max(first, begin)) for begin, last in self._ahead)
        return end - first - done

    @property
    def finished(self) -> list[Run]:
        """Everything that is finished, from the start on."""
        return list(_joined(self._finished(self._start, self.pending)))

    @property
    def changes(self) -> int:
        """A number that rises with each finished offset; for `committed()`."""
        return self._changes

    def is_committed(self, changes: int) -> bool:
        """Everything that was finished when `changes` had this value is committed."""
        return self._committed >= changes

    def committed(self, changes: int) -> None:
        """Note that everything which was finished when `changes` had this value is committed."""
        self._committed = max(self._committed, changes)

    def _finished(self, start: int, pending: Iterable[int]) -> Iterator[Run]:
        at = start
        for offset in pending:
            if at < offset:
                yield at, offset
            at = offset + 1
        if at < self.next:
            yield at, self.next
        for first, end in self._ahead:
            if end > self.next:
                yield max(first, self.next), end


def encode(start: int, runs: Iterable[Run], limit: int = METADATA_LIMIT) -> tuple[str, bool]:
    """Runs of finished offsets behind `start` as text, and whether there was room for all of them.

    Parameters:
        runs: in rising order.
        limit: characters at most.
    """
    data = bytearray()
    room = (limit - len(MARK)) // 4 * 3  # base64 makes 4 characters of 3 bytes
    at = start
    for first, end in _joined(runs):
        piece = _varint(first - at) + _varint(end - first)
        if len(data) + len(piece) > room:
            return _text(bytes(data)), False
        data += piece
        at = end
    return _text(bytes(data)), True


def decode(start: int, metadata: str) -> list[Run]:
    """The runs of finished offsets in a commit's metadata; none if the metadata is not ours."""
    if not metadata.startswith(MARK):
        return []
    try:
        data = urlsafe_b64decode(metadata[len(MARK) :])
        numbers = list(_numbers(data))
    except (binascii.Error, ValueError):
        return []
    runs = []
    at = start
    for gap, length in zip(numbers[::2], numbers[1::2], strict=False):
        runs.append((at + gap, at + gap + length))
        at += gap + length
    return runs


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    current: Run | None = None
    for first, end in runs:
        if current is not None and first <= current[1]:
            current = current[0], max(end, current[1])
            continue
        if current is not None:
            yield current
        current = first, end
    if current is not None:
        yield current


def _text(data: bytes | bytearray) -> str:
    return MARK + urlsafe_b64encode(data).decode() if data else ""


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _numbers(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        if shift > LARGEST:
            raise ValueError("a number is too large for an offset")
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number
            number = shift = 0
    if shift:
        raise ValueError("the last number is not whole")
