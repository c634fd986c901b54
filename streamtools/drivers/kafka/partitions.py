"""Which partition a message goes to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from aiokafka.partitioner import murmur2

from streamtools.drivers.kafka.bindings import Bindings
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, Unfit, client_error
from streamtools.drivers.kafka.outgoing import Outgoing
from streamtools.drivers.kafka.topics import Topics
from streamtools.errors import SendError, StreamToolsError
from streamtools.exchange import no_subscriber
from streamtools.settings import KafkaSettings

#: Bytes of messages without a key that go to one partition before the next has its turn.
STICKY: Final = 64 * 1024
#: Seconds between two looks at what the library has learned of the topics meanwhile.
LOOK_AGAIN: Final = 1.0


class Partitions:
    """The topics that are known to exist, and where in them a message belongs.

    Parameters:
        limit: bytes of a message at most.
    """

    def __init__(self, settings: KafkaSettings, limit: int) -> None:
        self._settings = settings
        self._limit = limit
        self._counts: dict[str, int] = {}
        self._looked = 0.0
        self._turn: dict[str, int] = {}
        self._looking = asyncio.Lock()
        self._bindings = Bindings(settings)

    async def know(
        self, batch: Sequence[Outgoing], producer: Any
    ) -> tuple[Sequence[Outgoing], dict[str, StreamToolsError]]:
        """Find the topics of a batch, and those of the queues that its events go to.

        Returns:
            What is to be sent, an event once for each of its queues; an error for each topic that does not exist.
        """
        if time.monotonic() - self._looked > LOOK_AGAIN:
            self._look_again(producer.client.cluster)
        unbound: dict[str, StreamToolsError] = {}
        if any(item.exchange is not None for item in batch):
            batch, unbound = await self._spread(batch, producer)
        missing = await self._find({item.topic for item in batch}.difference(unbound), producer)
        if missing:
            batch = [item for item in batch if item.mandatory or item.topic not in missing]
        return batch, {**missing, **unbound}

    async def _spread(
        self, batch: Sequence[Outgoing], producer: Any
    ) -> tuple[list[Outgoing], dict[str, StreamToolsError]]:
        """Events as records for their queues."""
        await self._bindings.read(producer.client)
        events = {(item.exchange, item.topic) for item in batch if item.exchange is not None}
        routes = {event: self._bindings.queues(*event) for event in events}
        # Those deleted by other means have left their bindings behind.
        gone = await self._find({queue for queues in routes.values() for queue in queues}, producer)
        spread: list[Outgoing] = []
        unbound: dict[str, StreamToolsError] = {}
        for item in batch:
            if item.exchange is None:
                spread.append(item)
                continue
            queues = [queue for queue in routes[item.exchange, item.topic] if queue not in gone]
            clash = self._bindings.clash(item.exchange)
            if clash or (not queues and item.mandatory):
                name = f"{item.exchange.name} {item.exchange.type} {item.topic}"  # which no topic of Kafka is called
                unbound[name] = clash or no_subscriber(item.topic, item.exchange)
                queues = [name]
            spread += [item.to(queue) for queue in queues]
        return spread, unbound

    async def _find(self, topics: Iterable[str], producer: Any) -> dict[str, StreamToolsError]:
        unknown = set(topics).difference(self._counts)
        if not unknown:
            return {}
        async with self._looking:  # thousands may send at once before the first of them knows the topic
            return await self._look(unknown.difference(self._counts), producer)

    async def _look(self, topics: Iterable[str], producer: Any) -> dict[str, StreamToolsError]:
        missing: dict[str, StreamToolsError] = {}
        for topic in topics:
            looks = Topics(producer.client, self._settings)
            if topic not in await looks.find([topic]):
                missing[topic] = looks.missing(topic)
                continue
            try:
                self._counts[topic] = len(await producer.partitions_for(topic))
            except CLIENT_ERRORS as error:
                raise client_error(error, self._settings) from error
        return missing

    def _look_again(self, cluster: Any) -> None:
        """Partitions may be added at any time, and all who send have to agree on where a key belongs."""
        self._looked = time.monotonic()
        for topic in self._counts:
            if partitions := cluster.partitions_for_topic(topic):
                self._counts[topic] = len(partitions)

    def forget(self, topic: str) -> None:
        """Look for it again before the next message goes there."""
        self._counts.pop(topic, None)

    def trouble(self, item: Outgoing) -> SendError | None:
        """Why this one cannot go to its topic."""
        if item.size > self._limit:
            return Unfit(
                f"it has {item.size} bytes, over max_message={self._settings.max_message}; put less into it, or "
                "raise KAFKA_MAX_MESSAGE and the topic's max.message.bytes"
            )
        if item.partition is not None and not 0 <= item.partition < (count := self._counts.get(item.topic, 1)):
            return SendError(f"the topic {item.topic!r} has partitions 0 to {count - 1} and no {item.partition}")
        return None

    def choose(self, item: Outgoing) -> int:
        """Its own partition, or that of its key, or any."""
        if item.partition is not None:
            return item.partition
        count = self._counts.get(item.topic, 1)
        if count == 1:
            return 0
        if item.key is not None:  # as Kafka's own client does, so that a key has one partition whoever sends
            return int(murmur2(item.key) & 0x7FFFFFFF) % count
        # Messages without a key stay together for a while, so that batches fill (KIP-480).
        so_far = self._turn[item.topic] = self._turn.get(item.topic, 0) + item.size
        return so_far // STICKY % count
