"""The topics that a consumer reads: which were deleted under it, and which were made anew."""

from __future__ import annotations

import logging
from typing import Any

from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")


class TopicChanges:
    """What a consumer knows of its topics, also from one membership in its group to the next.

    Attributes:
        deleted: those that do not exist any more.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._partitions: dict[str, int] = {}  # of each, as it was last seen
        self.deleted: set[str] = set()

    def compare(self, consumer: Any) -> set[str]:
        """Those that were made anew: a topic that was deleted comes back with as many partitions as brokers give.

        Parameters:
            consumer: the library's.
        """
        anew = set()
        for topic in consumer.subscription():
            now, before = len(consumer.partitions_for_topic(topic) or ()), self._partitions.get(topic, 0)
            if before and not now:
                self._tell_deleted(topic)
            elif now < before:
                self._tell_anew(topic, now, before)
                anew.add(topic)
            self._partitions[topic] = now or before
            self.deleted -= {topic} if now else set()
        return anew

    def count(self, topic: str) -> int | None:
        """How many partitions a topic had when it was last seen; None where it never was."""
        return self._partitions.get(topic) or None

    def look(self, consumer: Any) -> None:
        """Have the library look whether one that was deleted exists again; by itself it does so twice a minute."""
        if self.deleted:
            consumer._client.force_metadata_update()

    def _tell_deleted(self, topic: str) -> None:
        if topic not in self.deleted:
            self.deleted.add(topic)
            log.warning(
                "The topic %r at %s was deleted while it was read; reading goes on once it exists again.",
                topic,
                self._settings.safe_url,
            )

    def _tell_anew(self, topic: str, now: int, before: int) -> None:
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
