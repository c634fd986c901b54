"""How many messages wait: counted where there are few, and by their offsets where there are many.

The end of a transaction has an offset and is no message, and neither is what an aborted one has written. In an error
queue that is filled by transactions every second offset is one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords

from streamtools.drivers.kafka.brokers.cluster import Cluster
from streamtools.drivers.kafka.client.batches import Records
from streamtools.drivers.kafka.client.fetched import committed
from streamtools.drivers.kafka.offsets import decode
from streamtools.drivers.kafka.operating.ages import fetch
from streamtools.drivers.kafka.operating.groups import Progress

#: Offsets of a partition up to which its messages are counted, and bytes of them that are read for it.
FEW: Final = 1000
FEW_BYTES: Final = 4 * 1024 * 1024
#: Bytes that are asked for at once.
PORTION: Final = 256 * 1024


async def count(cluster: Cluster, found: Mapping[TopicPartition, Progress]) -> dict[TopicPartition, int]:
    """How many messages wait in each partition; where there are many, what is none counts as well."""
    numbers = {partition: progress.waiting for partition, progress in found.items()}
    few = [partition for partition, number in numbers.items() if number and found[partition].lag <= FEW]
    counted = await asyncio.gather(*(_count(cluster, partition, found[partition]) for partition in few))
    return numbers | dict(zip(few, counted, strict=True))


async def _count(cluster: Cluster, partition: TopicPartition, progress: Progress) -> int:
    done = decode(progress.start, progress.metadata)
    number = read = 0
    at = progress.start
    while at < progress.end and read < FEW_BYTES:
        answer = await fetch(cluster, partition, at, PORTION)
        offsets, after = _offsets(partition, answer, at)
        if after == at:  # purged meanwhile, or nobody may read any further yet
            break
        for offset in offsets:
            if at <= offset < progress.end:
                number += not any(first <= offset < end for first, end in done)
        at, read = after, read + len(answer[-1])
    # What was not read counts by its offsets, less those that are done.
    unread = max(0, progress.end - at)
    return number + unread - sum(max(0, min(end, progress.end) - max(first, at)) for first, end in done)


def _offsets(partition: TopicPartition, answer: Any, at: int) -> tuple[list[int], int]:
    """The offsets of the messages in an answer, and the one after its last batch."""
    if answer is None:
        return [], at
    batches = deque[Any]()
    records, after = Records(answer[-1] or b""), at
    while records.has_next():
        batches.append(records.next_batch())
        after = max(after, batches[-1].next_offset)
    aborted = next((part for part in answer[2:-1] if isinstance(part, list)), None)  # its place varies by version
    known = PartitionRecords(partition, records, aborted, at, None, None, False, READ_COMMITTED)
    return [record.offset for batch in committed(known, batches) for record in batch], after
