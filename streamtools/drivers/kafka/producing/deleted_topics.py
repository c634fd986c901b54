"""Rare: the topic of a batch is deleted, or made anew with fewer partitions, before Kafka has confirmed the batch."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

from aiokafka import errors as kafka

from streamtools.drivers.kafka.brokers.topics import Topics
from streamtools.drivers.kafka.client.producers import fail_batches
from streamtools.drivers.kafka.errors import TROUBLE, Missing
from streamtools.settings import KafkaSettings

#: Seconds without a confirmation after which brokers are asked whether the topic still exists.
LATE: Final = 2.0
#: Seconds between two attempts to end a batch that is on its way.
END_AGAIN: Final = 0.05


class DeletionWatch:
    """While a batch waits for its confirmation: end it when its topic or partition is gone.

    The library would send it for ever, and to the next topic of that name.
    """

    __slots__ = ("_partition", "_producer", "_settings", "_task", "_timer", "_topic")

    def __init__(self, producer: Any, topic: str, partition: int, settings: KafkaSettings) -> None:
        self._producer = producer
        self._topic = topic
        self._partition = partition
        self._settings = settings
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LATE, self._begin)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="streamtools-deletion-watch")

    async def _watch(self) -> None:
        topics = Topics(self._producer.client, self._settings)
        pause = LATE
        while True:
            with suppress(*TROUBLE):  # nothing is known while no broker answers
                if (error := await self._why_gone(topics)) is not None:
                    pause = END_AGAIN  # a batch that is on its way now can be ended when it comes back
                    fail_batches(self._producer, self._topic, self._partition, error)
            await asyncio.sleep(pause)

    async def _why_gone(self, topics: Topics) -> Exception | None:
        """The error for batches to a topic or partition that is gone; None while it exists."""
        least = self._partition + 1
        found = (await topics.look([self._topic], {self._topic: least})).get(self._topic)
        if found is None:
            return kafka.UnknownTopicOrPartitionError()  # type: ignore[no-any-return]
        return kafka.NotLeaderForPartitionError() if found.is_short_of(least) else None


def deleted(topic: str, partitions: int | None) -> Missing:
    """The error for messages whose topic was deleted.

    Parameters:
        partitions: how many it had.
    """
    return Missing(
        f"the topic {topic!r} was deleted while messages were sent to it. Make it again, as it was: "
        f"streamtools queues create {topic} --partitions {partitions}"
    )
