"""BatchQueue: records that wait to be sent to one partition, and how they are put into batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from streamtools.drivers.kafka.client.producers import is_transactional
from streamtools.drivers.kafka.client.record_batch import RecordBatch
from streamtools.drivers.kafka.producing.record import UNWRITABLE, Records, unwritable

#: Bytes of one batch; Kafka takes 1 MiB unless told otherwise (`message.max.bytes`).
BATCH: Final = 512 * 1024


class BatchQueue:
    """The records that wait for one partition, in order.

    A broker refuses a batch as a whole for one of its records. Such a batch is halved, and each half that is refused
    again, until what is refused is one record. All others are taken, in their order, with some more requests.

    Attributes:
        waiting: records that are in no batch.
    """

    def __init__(self) -> None:
        self.waiting: deque[Records] = deque()
        self._sizes: list[int] = []  # of the next batches after a refusal; the next one is the last item

    def build(self, producer: Any) -> tuple[list[Records], RecordBatch]:
        """Put the next records into a batch; it may be empty. What cannot be written fails.

        Returns:
            The records of the batch, and the batch.
        """
        written, waiting = RecordBatch(BATCH, transactional=is_transactional(producer)), self.waiting
        batch: list[Records] = []
        number = most = min(self._sizes[-1], len(waiting)) if self._sizes else len(waiting)
        while number:
            item = waiting[0]
            number -= 1
            if item.pending.given_up:
                item.pending.limit.free(waiting.popleft().size)
                continue
            try:
                if not item.append_to(written):
                    number += 1
                    break
            except UNWRITABLE as error:
                for single in waiting.popleft().singles():
                    single.fail(unwritable(error))
            else:
                batch.append(waiting.popleft())
        self._took(most - number)
        return batch, written

    def _took(self, number: int) -> None:
        if self._sizes:
            self._sizes[-1] -= number
            if self._sizes[-1] <= 0:
                self._sizes.pop()

    def put_back(self, batch: Sequence[Records]) -> None:
        """Put these before everything that waits."""
        self.waiting.extendleft(reversed(batch))

    def halve(self, batch: Sequence[Records]) -> None:
        """Put these single records before everything that waits, as two batches."""
        self._sizes += [len(batch) - len(batch) // 2, len(batch) // 2]
        self.put_back(batch)

    def take_all(self) -> list[Records]:
        """Take everything that waits."""
        items = list(self.waiting)
        self.waiting.clear()
        return items


def confirm(batch: Iterable[Records], partition: int, offset: int) -> None:
    """Kafka holds these: tell whoever waits for them.

    Parameters:
        offset: of the first; negative if Kafka held the batch already, from an attempt before.
    """
    pending, number, size = None, 0, 0
    for item in batch:
        item.partition = partition
        item.offset = offset if offset >= 0 else None
        offset += item.number
        if item.pending is not pending:  # records of one send stand together
            if pending is not None:
                pending.confirm(number, size)
            pending, number, size = item.pending, 0, 0
        number += item.number
        size += item.size
    if pending is not None:
        pending.confirm(number, size)
