"""Which partition a message goes to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka.partitioner import murmur2

from streamtools.drivers.kafka.brokers.bindings import Bindings
from streamtools.drivers.kafka.brokers.topics import Seen, Topics
from streamtools.drivers.kafka.errors import TROUBLE, Unfit, client_error
from streamtools.drivers.kafka.names import check_kafka_name
from streamtools.drivers.kafka.producing.record import ProducerRecord
from streamtools.errors import ConfigurationError, SendError, StreamToolsError
from streamtools.exchange import no_subscriber
from streamtools.settings import KafkaSettings

#: Bytes of messages without a key that go to one partition before the next has its turn.
STICKY: Final = 64 * 1024
#: Seconds between two looks at what the library has learned of the topics meanwhile.
LOOK_AGAIN: Final = 1.0


class PartitionChooser:
    """The topics that are known to exist, and where in them a message belongs."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._counts: dict[str, int] = {}
        self._had: dict[str, int] = {}  # the same of those that were forgotten
        self._looked = 0.0
        self._turn: dict[str, int] = {}
        #: Topics that are being looked for; each future has the number of partitions, or what is wrong.
        self._looking: dict[str, asyncio.Future[int | StreamToolsError]] = {}
        self._next: list[str] = []  # of these, those that are not asked for yet
        self._least: dict[str, int] = {}  # of these, the partitions that those which were known should have by now
        self._tasks: set[asyncio.Task[None]] = set()
        self._bindings = Bindings(settings)

    async def know(
        self, batch: Sequence[ProducerRecord], producer: Any
    ) -> tuple[Sequence[ProducerRecord], dict[str, StreamToolsError]]:
        """Find the topics of a batch, and those of the queues that its events go to.

        Returns:
            What is to be sent, an event once for each of its queues; an error for each topic that does not exist.
        """
        if time.monotonic() - self._looked > LOOK_AGAIN:
            self.look_again(producer.client.cluster)
        unbound: dict[str, StreamToolsError] = {}
        if any(item.exchange is not None for item in batch):
            batch, unbound = await self._spread(batch, producer)
        topics, counts = {item.topic for item in batch}, self._counts
        known = topics <= counts.keys()
        # PartitionChooser may have been added since, or the topic made anew.
        beyond = [i for i in batch if i.partition is not None and self.lacks(i.topic, i.partition)]
        if known and not beyond:
            return batch, unbound
        for item in beyond:
            self._least[item.topic] = max(self._least.get(item.topic, 0), (item.partition or 0) + 1)
        missing = await self._find(topics.difference(unbound), producer, anew={item.topic for item in beyond})
        if missing:
            batch = [item for item in batch if item.mandatory or item.topic not in missing]
        return batch, {**missing, **unbound}

    async def _spread(
        self, batch: Sequence[ProducerRecord], producer: Any
    ) -> tuple[list[ProducerRecord], dict[str, StreamToolsError]]:
        """Events as records for their queues."""
        await self._bindings.read(producer.client)
        events = {(item.exchange, item.topic) for item in batch if item.exchange is not None}
        routes = {event: self._bindings.queues(*event) for event in events}
        # Those deleted by other means have left their bindings behind.
        gone = await self._find({queue for queues in routes.values() for queue in queues}, producer)
        spread: list[ProducerRecord] = []
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

    async def _find(
        self, topics: Iterable[str], producer: Any, *, anew: Collection[str] = ()
    ) -> dict[str, StreamToolsError]:
        """Ask for those that are not known, and anew for some that are; an error for each that is not there."""
        unknown = set(topics).difference(self._counts).union(anew)
        if not unknown:
            return {}
        # To ask for a name that can be none ends the connection: another program may have sent it as an address.
        wrong = {topic: error for topic in unknown if (error := _never(topic)) is not None}
        # Thousands may send at once before the first of them knows the topic; none waits for another's.
        asked = {t: self._looking.get(t) or self._look_for(t, producer) for t in unknown if t not in wrong}
        if not asked:
            return wrong
        await asyncio.wait(asked.values())
        found = {topic: future.result() for topic, future in asked.items()}
        return {**wrong, **{t: trouble for t, trouble in found.items() if isinstance(trouble, StreamToolsError)}}

    def _look_for(self, topic: str, producer: Any) -> asyncio.Future[int | StreamToolsError]:
        future = self._looking[topic] = asyncio.get_running_loop().create_future()
        self._next.append(topic)
        if len(self._next) == 1:
            self._begin(self._look(producer))
        return future

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="streamtools-topics")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self, producer: Any) -> None:
        """Ask for all that are wanted by now, with one request."""
        await asyncio.sleep(0)
        topics, self._next = self._next, []
        async with self._answering(topics):
            looks = Topics(producer.client, self._settings)
            found = await looks.glance(topics)
            missing = [t for t in topics if t not in found or found[t].is_short_of(self._least.get(t, 0))]
            self._tell({topic: seen for topic, seen in found.items() if topic not in missing}, producer)
            if missing:
                self._begin(self._look_elsewhere(missing, looks, producer))

    async def _look_elsewhere(self, topics: list[str], looks: Topics, producer: Any) -> None:
        """Ask all brokers for what one does not know, while the others are sent to."""
        async with self._answering(topics):
            found = await looks.look(topics, self._least)
            self._tell(found, producer)
            for topic in topics:
                if topic not in found:
                    self._answer(topic, looks.missing(topic))

    def _tell(self, found: Mapping[str, Seen], producer: Any) -> None:
        producer.client._topics.update(found)
        for topic, seen in found.items():
            if seen.error or seen.partitions:
                self._answer(topic, seen.error or seen.partitions)
            else:
                self._begin(self._wait_for(topic, producer))

    async def _wait_for(self, topic: str, producer: Any) -> None:
        """It exists, and no broker knows its partitions yet."""
        async with self._answering([topic]):
            self._answer(topic, len(await producer.partitions_for(topic)))

    @asynccontextmanager
    async def _answering(self, topics: Iterable[str]) -> AsyncIterator[None]:
        """Whoever waits for one of these topics is told what ends the work."""
        try:
            yield
        except BaseException as error:
            lost = client_error(error, self._settings)
            lost.__cause__ = error
            for topic in topics:
                self._least.pop(topic, None)
                if (future := self._looking.pop(topic, None)) is not None and not future.done():
                    future.set_exception(lost)
                    future.exception()  # looked at: whoever waits gets it all the same
            if not isinstance(error, TROUBLE):
                raise

    def _answer(self, topic: str, answer: int | StreamToolsError) -> None:
        if isinstance(answer, int):
            self._counts[topic] = answer
        else:
            self.forget(topic)
        self._least.pop(topic, None)
        if (future := self._looking.pop(topic, None)) is not None and not future.done():
            future.set_result(answer)

    def look_again(self, cluster: Any) -> None:
        """Count anew what the library knows: all who send have to agree on where a key belongs.

        PartitionChooser may be added at any time, and a topic that is deleted and made anew may have fewer.
        """
        self._looked = time.monotonic()
        for topic in self._counts:
            if partitions := cluster.partitions_for_topic(topic):
                self._counts[topic] = len(partitions)

    async def close(self) -> None:
        """Look for nothing any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def forget(self, topic: str) -> None:
        """Look for it again before the next message goes there."""
        if (count := self._counts.pop(topic, None)) is not None:
            self._had[topic] = count

    def count(self, topic: str) -> int | None:
        """How many partitions it has, or had when it was last seen."""
        return self._counts.get(topic) or self._had.get(topic)

    def lacks(self, topic: str, partition: int) -> bool:
        """The topic has fewer partitions than this."""
        return partition >= self._counts.get(topic, partition + 1)

    def trouble(self, item: ProducerRecord, limit: int) -> SendError | None:
        """Why this one cannot go to its topic.

        Parameters:
            limit: bytes of a message at most, where it is no copy.
        """
        if item.size > limit and not item.is_copy:
            return Unfit(
                f"it has {item.size} bytes, over max_message={self._settings.max_message}; put less into it, or "
                "raise KAFKA_MAX_MESSAGE and the topic's max.message.bytes"
            )
        if item.partition is not None and not 0 <= item.partition < (count := self._counts.get(item.topic, 1)):
            return SendError(f"the topic {item.topic!r} has partitions 0 to {count - 1} and no {item.partition}")
        return None

    def choose(self, item: ProducerRecord) -> int:
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


def _never(topic: str) -> StreamToolsError | None:
    """Why there can be no topic of this name; None where there can."""
    try:
        check_kafka_name(topic)
    except ConfigurationError as error:
        return Unfit(str(error))
    return None
