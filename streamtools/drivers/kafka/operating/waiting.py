"""How many messages wait for a group, and how old the next one is.

Messages are counted if there are few, and told by their offsets if there are many. The end of a transaction has an
offset and is no message, and neither is what an aborted one has written. In an error queue that is filled by
transactions every second offset is no message.
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
from streamtools.drivers.kafka.operating.groups import Progress

#: Offsets of a partition up to which its messages are counted, and bytes of them that are read for it.
FEW: Final = 1000
FEW_BYTES: Final = 4 * 1024 * 1024
#: Bytes that are fetched at once to count them.
PORTION: Final = 256 * 1024
#: Bytes that are fetched to see how old the next record is.
ENOUGH: Final = 16 * 1024


async def next_times(cluster: Cluster, places: Mapping[TopicPartition, int]) -> list[float]:
    """When the first record from each of these offsets on was written, in seconds since the epoch.

    A partition has none if nobody may read any further yet.
    """
    found = await asyncio.gather(*(_next_time(cluster, partition, offset) for partition, offset in places.items()))
    return [time for time in found if time is not None]


async def _next_time(cluster: Cluster, partition: TopicPartition, offset: int) -> float | None:
    answer = await cluster.fetch(partition, offset, ENOUGH)
    return None if answer is None else _first_time(Records(answer[-1] or b""), offset)


def _first_time(batches: Any, offset: int) -> float | None:
    while batches.has_next():
        batch = batches.next_batch()
        if batch.is_control_batch:  # the end of a transaction, which is no message
            continue
        for record in batch:
            if record.offset >= offset:
                # None in the oldest format.
                return None if record.timestamp is None else float(record.timestamp) / 1000
    return None


async def count(cluster: Cluster, found: Mapping[TopicPartition, Progress]) -> dict[TopicPartition, int]:
    """How many messages wait in each partition; if they are many, offsets that are no messages count as well."""
    numbers = {partition: progress.waiting for partition, progress in found.items()}
    few = [partition for partition, number in numbers.items() if number and found[partition].lag <= FEW]
    counted = await asyncio.gather(*(_count(cluster, partition, found[partition]) for partition in few))
    return numbers | dict(zip(few, counted, strict=True))


async def _count(cluster: Cluster, partition: TopicPartition, progress: Progress) -> int:
    done = decode(progress.start, progress.metadata)
    number = read = 0
    at = progress.start
    while at < progress.end and read < FEW_BYTES:
        answer = await cluster.fetch(partition, at, PORTION)
        offsets, after = _offsets(partition, answer, at)
        if after == at:  # purged meanwhile, or nobody may read any further yet
            break
        for offset in offsets:
            if at <= offset < progress.end:
                number += not any(first <= offset < end for first, end in done)
        at, read = after, read + len(answer[-1])
    # What was not read counts by its offsets, without those that are done.
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
