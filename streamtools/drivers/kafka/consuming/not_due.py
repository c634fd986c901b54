"""Records that wait in memory until they are due."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

#: Records of one partition in memory at most, and bytes of them; beyond, the partition is not fetched.
MOST_RECORDS: Final = 200
MOST_BYTES: Final = 4 * 1024 * 1024


class NotDueRecords:
    """The records of one partition that are not due, in the order in which they become due."""

    def __init__(self) -> None:
        self._records: list[tuple[float, Any]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def is_full(self) -> bool:
        """No more records are kept: the rest waits at the broker."""
        return len(self._records) >= MOST_RECORDS or self._bytes >= MOST_BYTES

    @property
    def next_due(self) -> float | None:
        """When the first one is due, in seconds since the epoch; None when there is none."""
        return self._records[0][0] if self._records else None

    def keep(self, until: float, record: Any) -> None:
        """Keep a record until then; records with the same time stay in their order."""
        at = len(self._records)
        while at > 0 and self._records[at - 1][0] > until:
            at -= 1
        self._records.insert(at, (until, record))
        self._bytes += len(record.value or b"")

    def take_due(self, now: float, limit: int) -> Iterator[Any]:
        """Take those that are due, at most `limit`."""
        while limit > 0 and self._records and self._records[0][0] <= now:
            limit -= 1
            record = self._records.pop(0)[1]
            self._bytes -= len(record.value or b"")
            yield record

    def clear(self) -> None:
        """Forget all: the partition is revoked."""
        self._records.clear()
