"""How old what waits is: the time of the next record of a group, without reading the others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.fetch import FetchRequest

from streamtools.drivers.kafka.brokers.cluster import Cluster, check
from streamtools.drivers.kafka.client.batches import Records

#: Bytes of a partition that are looked at; a batch that is larger comes as a whole (KIP-74).
ENOUGH: Final = 16 * 1024
READ_COMMITTED: Final = 1


async def next_times(cluster: Cluster, places: Mapping[TopicPartition, int]) -> list[float]:
    """When the first record from each of these offsets on was written, in seconds since the epoch.

    A partition in which nobody may read any further yet has none.
    """
    found = await asyncio.gather(*(_next_time(cluster, partition, offset) for partition, offset in places.items()))
    return [time for time in found if time is not None]


async def _next_time(cluster: Cluster, partition: TopicPartition, offset: int) -> float | None:
    answer = await fetch(cluster, partition, offset, ENOUGH)
    return None if answer is None else _first_time(Records(answer[-1] or b""), offset)


async def fetch(cluster: Cluster, partition: TopicPartition, offset: int, size: int) -> Any:
    """What the partition's leader answers, with so many bytes of records from this offset on.

    It is None where the offset was purged meanwhile.
    """
    rows = [(partition.topic, [(partition.partition, offset, size)])]

    async def attempt() -> Any:
        [node] = await cluster.by_leader({partition: offset})
        response = await cluster.ask(FetchRequest(0, 0, size, READ_COMMITTED, rows), node)
        [(_, [answer])] = response.topics
        check([answer[1]])
        return answer

    try:
        return await cluster.persist(attempt)
    except kafka.OffsetOutOfRangeError:
        return None


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
