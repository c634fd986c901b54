"""StartOffsets: where a group begins with partitions of which it has committed nothing.

`offset="latest"`, `start_time` and `start_offset` say where a new group begins. Partitions that are added later,
while its consumers run or while all are away, are read from their beginning: their messages were written since, and
nobody has seen them. A group is new while it has committed nothing of any topic that its consumer reads, the retry
topic included. So the member that finds the group new commits where to begin for all partitions at once, those of
other members too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

#: Commits of some partitions: TopicPartition -> OffsetAndMetadata, which have no types.
Commits = Mapping[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a new group begins: at the beginning, unless one of these is set.

    Attributes:
        latest: at the end.
        offset: at this offset of each partition, or the nearest one that exists.
        time: with the first message written then or later, in seconds since the epoch.
    """

    latest: bool = False
    offset: int | None = None
    time: float | None = None

    @property
    def is_beginning(self) -> bool:
        """A new group reads everything, as any other."""
        return not self.latest and self.offset is None and self.time is None


class StartOffsets:
    """Finds where to begin.

    Parameters:
        consumer: the library's.
        start: where a new group begins.
        retry_topic: a new group reads all of it.
        committed: reads what the group has committed.
        commit: commits for the group.
    """

    def __init__(
        self,
        consumer: Any,
        start: Start,
        *,
        retry_topic: str,
        committed: Callable[[Collection[TopicPartition]], Awaitable[Commits]],
        commit: Callable[[Commits], Awaitable[None]],
    ) -> None:
        self._consumer = consumer
        self._start = start
        self._retry_topic = retry_topic
        self._committed = committed
        self._commit = commit

    async def find(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """Where to begin with these partitions, of which nothing was committed a moment ago."""
        if not self._start.is_beginning:
            everything = sorted(self._all_partitions().union(partitions))
            if not await self._committed(everything):
                return await self._begin(everything, partitions)
        return await self.beginnings(partitions)

    async def _begin(
        self, everything: list[TopicPartition], partitions: list[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """Begin as a new group, unless another member has done so in this moment."""
        chosen = await self._chosen(everything)
        # Asked again now: the first member decides, and what is sent after it has begun comes after `chosen`.
        known = await self._committed(everything)
        if not known:
            await self._commit(chosen)
            return {p: chosen[p] for p in partitions}
        missing = [p for p in partitions if p not in known]
        return {p: known[p] for p in partitions if p in known} | await self.beginnings(missing)

    async def beginnings(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """The offset of the oldest message, or of the first one to come."""
        return _commits(await self._consumer.beginning_offsets(partitions)) if partitions else {}

    async def _chosen(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        start, consumer = self._start, self._consumer
        chosen = [p for p in partitions if p.topic != self._retry_topic]
        first, ends = await asyncio.gather(consumer.beginning_offsets(partitions), consumer.end_offsets(chosen))
        if start.time is not None:
            times = await consumer.offsets_for_times(dict.fromkeys(chosen, int(start.time * 1000)))
            return _commits(first | {p: times[p].offset if times[p] is not None else ends[p] for p in chosen})
        if start.offset is not None:
            return _commits(first | {p: min(max(start.offset, first[p]), ends[p]) for p in chosen})
        return _commits(first | ends)

    def _all_partitions(self) -> set[TopicPartition]:
        """All partitions of the topics that this consumer reads, whichever member has them."""
        consumer = self._consumer
        known = ((topic, consumer.partitions_for_topic(topic)) for topic in consumer.subscription())
        return {TopicPartition(topic, number) for topic, numbers in known for number in numbers or ()}


def _commits(offsets: Mapping[TopicPartition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {partition: OffsetAndMetadata(offset, "") for partition, offset in offsets.items()}
