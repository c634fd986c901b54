"""Rare: topics that are deleted, made anew or cut while they are consumed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection
from typing import Any, Final, TypeVar

from aiokafka import TopicPartition

from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.errors import ConnectionLost
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

T = TypeVar("T")

#: Seconds after which a topic that the brokers do not know is one that was deleted, not one just made.
DELETED_AFTER: Final = 3.0


class TopicChanges:
    """What a consumer knows of its topics, also from one membership in its group to the next.

    Attributes:
        deleted: those that do not exist any more.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._partitions: dict[str, int] = {}  # of each topic, as it was last seen
        self.deleted: set[str] = set()

    def compare(self, consumer: Any) -> set[str]:
        """Update what is known, and return the topics that were made anew: those that have fewer partitions now.

        Parameters:
            consumer: the client library's.
        """
        anew = set()
        for topic in consumer.subscription():
            now, before = len(consumer.partitions_for_topic(topic) or ()), self._partitions.get(topic, 0)
            if before and not now:
                self._warn_deleted(topic)
            elif now < before:
                self._warn_anew(topic, now, before)
                anew.add(topic)
            self._partitions[topic] = now or before
            self.deleted -= {topic} if now else set()
        return anew

    def count(self, topic: str) -> int | None:
        """How many partitions a topic had when it was last seen; None if it never was."""
        return self._partitions.get(topic) or None

    def _warn_deleted(self, topic: str) -> None:
        if topic not in self.deleted:
            self.deleted.add(topic)
            log.warning(
                "The topic %r at %s was deleted while it was read; reading goes on once it exists again.",
                topic,
                self._settings.safe_url,
            )

    def _warn_anew(self, topic: str, now: int, before: int) -> None:
        log.warning(
            "The topic %r at %s was deleted and made anew while it was read: it has %d partition(s) instead of %d. "
            "Its old messages are gone. To have as many again: streamtools queues alter %s --partitions %d",
            topic,
            self._settings.safe_url,
            now,
            before,
            topic,
            before,
        )


def restarted(partition: AssignedPartition, record: Any) -> AssignedPartition:
    """The state of a partition whose log was cut: what it held there before is gone, and it begins with `record`."""
    log.warning(
        "The log of topic %r, partition %d, was cut or made anew: offset %d no longer exists. Going on at %d.",
        *partition.place,
        partition.offsets.next,
        record.offset,
    )
    partition.revoked = True
    return AssignedPartition(partition.place, Offsets(record.offset), is_retry=partition.is_retry)


async def unless_deleted(
    asking: Awaitable[T], partitions: Collection[TopicPartition], cluster: Any, settings: KafkaSettings
) -> T:
    """The client library's answer about these partitions; it would ask about a deleted one for ever.

    Parameters:
        cluster: the client library's, which knows the topics.

    Raises:
        ConnectionLost: a topic was deleted, and may have been made anew with fewer partitions.
    """
    task = asyncio.ensure_future(asking)
    try:
        while not (await asyncio.wait({task}, timeout=DELETED_AFTER))[0]:
            there = cluster.partitions_for_topic
            if gone := {p.topic for p in partitions if p.partition not in (there(p.topic) or ())}:
                names = ", ".join(map(repr, sorted(gone)))
                raise ConnectionLost(f"{names} at {settings.safe_url} was deleted under its consumer.")
        return task.result()
    finally:
        task.cancel()
