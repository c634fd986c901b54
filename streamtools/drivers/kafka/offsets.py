"""What is finished of one partition, and what of that can be committed. No I/O.

Kafka keeps one offset for each group and partition: all before it is done. Messages of a partition are
handled at once and finish in any order, so the offset that can be committed is the first one that is not
finished. What is finished behind it travels in the metadata of the commit, so that whoever reads the
partition next repeats only what is not.

The metadata is `s1:` and base64 of varints, in turns the length of a gap and of the run of finished
offsets behind it, counted from the committed offset.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

#: The first characters of our metadata; what another program has committed is not ours to read.
MARK: Final = "s1:"
#: Characters of metadata at most. Kafka takes 4096 bytes unless told otherwise (`offset.metadata.max.bytes`).
METADATA_LIMIT: Final = 3500
#: Bits of an offset.
LARGEST: Final = 63

#: Finished offsets: the first, and the one after the last.
Run = tuple[int, int]


class Offsets:
    """The offsets of one partition that were taken, and those that are finished.

    Offsets are taken in rising order. Those between two taken ones belong to no message (markers of
    transactions, compacted records), and count as finished.

    Parameters:
        start: the committed offset, where reading begins.
        metadata: of that commit.
        finished: what we have finished ourselves and could not commit.
    """

    def __init__(self, start: int, metadata: str = "", *, finished: Iterable[Run] = ()) -> None:
        self._start = start
        #: The first offset that was not taken yet.
        self.next: int = start
        #: What is taken and not finished, in rising order, and what it is with; the owner's to set. None at first.
        self.pending: dict[int, Any] = {}
        ahead = [(max(first, start), end) for first, end in finished if end > start]
        # Finished by whoever had the partition before.
        self._ahead = deque(_joined(sorted(ahead + decode(start, metadata))) if ahead else decode(start, metadata))
        self._changes = 0
        self._committed = 0

    @property
    def position(self) -> int:
        """What can be committed: all before it is finished."""
        return next(iter(self.pending), self.next)

    @property
    def uncommitted(self) -> int:
        """How many were finished since the commit before."""
        return self._changes - self._committed

    def take(self, offset: int) -> bool:
        """Take the message at `offset`; False when it was finished before.

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
        """All up to `end` that was not taken is no message, and finished; False when there is nothing of the kind."""
        if end <= self.next:
            return False
        self.next = end
        self._changes += 1
        return True

    def finish(self, offset: int, held: object = None) -> bool:
        """The message at `offset` is done with; False when it is not pending, or with another than `held`."""
        pending = self.pending
        if offset not in pending or pending[offset] is not held:
            return False
        del pending[offset]
        self._changes += 1
        return True

    def commit(self, limit: int = METADATA_LIMIT, *, also: Collection[int] = ()) -> tuple[int, str, bool]:
        """What to commit: the offset, the metadata, and whether that holds all that is finished.

        Parameters:
            limit: characters of metadata at most.
            also: pending ones that count as finished if this very commit succeeds.
        """
        pending = [offset for offset in self.pending if offset not in also] if also else self.pending
        start = next(iter(pending), self.next)
        text, whole = encode(start, self._finished(start, pending), limit)
        return start, text, whole

    def unfinished(self, first: int, end: int) -> int:
        """How many offsets from `first` to before `end`, which were not taken, nobody had finished."""
        done = sum(max(0, min(end, last) - max(first, begin)) for begin, last in self._ahead)
        return end - first - done

    @property
    def finished(self) -> list[Run]:
        """All that is finished, from the start on."""
        return list(_joined(self._finished(self._start, self.pending)))

    @property
    def changes(self) -> int:
        """A number that rises with each offset finished; for `committed()`."""
        return self._changes

    def is_committed(self, changes: int) -> bool:
        """Whether all that was finished when `changes` was so high is committed."""
        return self._committed >= changes

    def committed(self, changes: int) -> None:
        """What was finished when `changes` was so high is committed."""
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
    """Runs of finished offsets behind `start` as text, and whether all of them found room.

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
    """The runs of finished offsets that a commit's metadata tells; none when it is not ours."""
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
