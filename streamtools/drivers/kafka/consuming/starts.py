"""Where a group begins with partitions of which it has committed nothing.

It is told where to begin (`offset="latest"`, `start_time`, `start_offset`) once: when it is new. What is added later,
while its consumers run or while all are away, is read from the beginning: it was written since, and nobody has seen
it. A group is new while it has committed nothing of any topic that its consumer reads, the retry topic among them.
So whoever finds it new commits the beginning of all partitions at once, of those of other members, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

#: Commits of some partitions, by which a group begins: TopicPartition -> OffsetAndMetadata, without their types.
Commits = Mapping[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a new group begins; at the beginning where nothing is said.

    Attributes:
        latest: at the end.
        offset: at this offset of each partition, or the nearest that there is.
        time: with what was written then, in seconds since the epoch.
    """

    latest: bool = False
    offset: int | None = None
    time: float | None = None

    @property
    def is_beginning(self) -> bool:
        """Everything is read, by a new group as by any."""
        return not self.latest and self.offset is None and self.time is None


class StartOffsets:
    """Finds where to begin.

    Parameters:
        consumer: the library's.
        start: what a new group was told.
        retry_topic: of which a new group has everything.
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
        """Where to begin with these, of which nothing was committed a moment ago."""
        if not self._start.is_beginning:
            everything = sorted(self._all_partitions().union(partitions))
            if not await self._committed(everything):
                return await self._begin(everything, partitions)
        return await self.beginnings(partitions)

    async def _begin(
        self, everything: list[TopicPartition], partitions: list[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """The group is new, unless another member says otherwise this moment."""
        chosen = await self._chosen(everything)
        # Asked again behind that: whoever was first decides, and what is sent once it has begun is behind `chosen`.
        known = await self._committed(everything)
        if not known:
            await self._commit(chosen)
            return {p: chosen[p] for p in partitions}
        missing = [p for p in partitions if p not in known]
        return {p: known[p] for p in partitions if p in known} | await self.beginnings(missing)

    async def beginnings(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """Where the oldest message is, or will be."""
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
        """Those of the topics that this consumer reads, whoever has them."""
        consumer = self._consumer
        known = ((topic, consumer.partitions_for_topic(topic)) for topic in consumer.subscription())
        return {TopicPartition(topic, number) for topic, numbers in known for number in numbers or ()}


def _commits(offsets: Mapping[TopicPartition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {partition: OffsetAndMetadata(offset, "") for partition, offset in offsets.items()}
