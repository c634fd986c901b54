"""PartitionChooser: which topics exist, and which partition of its topic a message goes to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka.partitioner import murmur2

from streamtools.drivers.kafka.brokers.bindings import Bindings
from streamtools.drivers.kafka.brokers.cluster import TopicState
from streamtools.drivers.kafka.brokers.topics import Topics
from streamtools.drivers.kafka.client.producers import use_topics
from streamtools.drivers.kafka.errors import TROUBLE, Unfit, client_error
from streamtools.drivers.kafka.names import check_kafka_name
from streamtools.drivers.kafka.producing.batches import BatchQueue
from streamtools.drivers.kafka.producing.record import Records
from streamtools.drivers.kafka.producing.unconfirmed import UnconfirmedBatch
from streamtools.errors import ConfigurationError, SendError, StreamToolsError
from streamtools.exchange import no_subscriber
from streamtools.settings import KafkaSettings

#: Bytes of messages without a key that go to one partition before the next one is used.
STICKY: Final = 64 * 1024
#: Seconds after which the numbers of partitions are read again from what the library knows.
RECOUNT_INTERVAL: Final = 1.0


class PartitionChooser:
    """Knows topics and their partitions; asks brokers about topics that it does not know."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._counts: dict[str, int] = {}
        self._had: dict[str, int] = {}  # the same for topics that were forgotten
        self._looked = 0.0
        self._turn: dict[str, int] = {}
        #: Topics that brokers are asked about; each future gets the number of partitions, or the error.
        self._looking: dict[str, asyncio.Future[int | StreamToolsError]] = {}
        self._next: list[str] = []  # those of them that the next request asks about
        self._least: dict[str, int] = {}  # for some of them, the partitions that they must have by now
        self._tasks: set[asyncio.Task[None]] = set()
        self._bindings = Bindings(settings)

    async def know(
        self, batch: Sequence[Records], producer: Any
    ) -> tuple[Sequence[Records], dict[str, StreamToolsError]]:
        """Find the topics of a batch, and the queues that its events go to.

        Returns:
            The records to send, an event once for each of its queues; an error for each topic that does not exist.
        """
        if time.monotonic() - self._looked > RECOUNT_INTERVAL:
            self.look_again(producer.client.cluster)
        unbound: dict[str, StreamToolsError] = {}
        if any(item.exchange is not None for item in batch):
            batch, unbound = await self._spread(batch, producer)
        topics, counts = {item.topic for item in batch}, self._counts
        known = topics <= counts.keys()
        # A record names a partition that is not known: it was added since, or the topic was made anew.
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
        self, batch: Sequence[Records], producer: Any
    ) -> tuple[list[Records], dict[str, StreamToolsError]]:
        """Replace each event by a record for each of its queues."""
        await self._bindings.read(producer.client)
        events = {(item.exchange, item.topic) for item in batch if item.exchange is not None}
        routes = {event: self._bindings.queues(*event) for event in events}
        # A queue that was deleted by other means has left its bindings behind.
        gone = await self._find({queue for queues in routes.values() for queue in queues}, producer)
        spread: list[Records] = []
        unbound: dict[str, StreamToolsError] = {}
        for item in batch:
            if item.exchange is None:
                spread.append(item)
                continue
            queues = [queue for queue in routes[item.exchange, item.topic] if queue not in gone]
            clash = self._bindings.clash(item.exchange)
            if clash or (not queues and item.mandatory):
                name = f"{item.exchange.name} {item.exchange.type} {item.topic}"  # no topic can have this name
                unbound[name] = clash or no_subscriber(item.topic, item.exchange)
                queues = [name]
            spread += [item.to(queue) for queue in queues]
        return spread, unbound

    async def _find(
        self, topics: Iterable[str], producer: Any, *, anew: Collection[str] = ()
    ) -> dict[str, StreamToolsError]:
        """Ask about unknown topics, and `anew` about some known ones; an error for each that does not exist."""
        unknown = set(topics).difference(self._counts).union(anew)
        if not unknown:
            return {}
        # Asking for an impossible name ends the connection; another program may have sent it as a reply's address.
        wrong = {topic: error for topic in unknown if (error := _never(topic)) is not None}
        # Thousands may send at once before the first knows the topic; none waits for topics of others.
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
        """Ask about all topics in `_next` with one request."""
        await asyncio.sleep(0)
        topics, self._next = self._next, []
        async with self._answering(topics):
            brokers = Topics(producer.client, self._settings)
            found = await brokers.glance(topics)
            missing = [t for t in topics if t not in found or found[t].is_short_of(self._least.get(t, 0))]
            self._tell({topic: seen for topic, seen in found.items() if topic not in missing}, producer)
            if missing:
                self._begin(self._look_elsewhere(missing, brokers, producer))

    async def _look_elsewhere(self, topics: list[str], brokers: Topics, producer: Any) -> None:
        """Ask all brokers about topics that one does not know, while others are sent already."""
        async with self._answering(topics):
            found = await brokers.look(topics, self._least)
            self._tell(found, producer)
            for topic in topics:
                if topic not in found:
                    self._answer(topic, brokers.missing(topic))

    def _tell(self, found: Mapping[str, TopicState], producer: Any) -> None:
        use_topics(producer, found)
        for topic, seen in found.items():
            if seen.refusal is not None:
                self._answer(topic, client_error(seen.refusal, self._settings))
            elif seen.leaders:
                self._answer(topic, len(seen.leaders))
            else:
                self._begin(self._wait_for(topic, producer))

    async def _wait_for(self, topic: str, producer: Any) -> None:
        """Wait for the partitions of a topic that exists, and of which no broker knows them yet."""
        async with self._answering([topic]):
            self._answer(topic, len(await producer.partitions_for(topic)))

    @asynccontextmanager
    async def _answering(self, topics: Iterable[str]) -> AsyncIterator[None]:
        """If the work fails, tell whoever waits for one of these topics."""
        try:
            yield
        except BaseException as error:
            lost = client_error(error, self._settings)
            lost.__cause__ = error
            for topic in topics:
                self._least.pop(topic, None)
                if (future := self._looking.pop(topic, None)) is not None and not future.done():
                    future.set_exception(lost)
                    future.exception()  # looked at, so that asyncio does not warn if nobody waits
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
        """Read the numbers of partitions again from what the library knows.

        All senders must agree on the partition of a key. Partitions may be added at any time, and a topic that is
        deleted and made anew may have fewer.
        """
        self._looked = time.monotonic()
        for topic in self._counts:
            if partitions := cluster.partitions_for_topic(topic):
                self._counts[topic] = len(partitions)

    async def close(self) -> None:
        """End all requests about topics."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def forget(self, topic: str) -> None:
        """Ask again about this topic before the next message goes there."""
        if (count := self._counts.pop(topic, None)) is not None:
            self._had[topic] = count

    def count(self, topic: str) -> int | None:
        """How many partitions a topic has, or had when it was last seen; None if it never was."""
        return self._counts.get(topic) or self._had.get(topic)

    def lacks(self, topic: str, partition: int) -> bool:
        """The topic has no partition of this number."""
        return partition >= self._counts.get(topic, partition + 1)

    def distribute(
        self,
        batch: Sequence[Records],
        pending: UnconfirmedBatch,
        queue_of: Callable[[str, int], BatchQueue],
        *,
        missing: Mapping[str, StreamToolsError],
        max_size: int,
    ) -> int:
        """Put the records of one send into the queues of their partitions; returns their bytes.

        Parameters:
            pending: gets the errors of those that cannot be sent.
            queue_of: the queue of a topic's partition.
            missing: errors of topics that do not exist.
            max_size: bytes of one record at most, unless it is a copy.
        """
        if pending.remaining > len(batch):  # there are runs
            batch = [part for item in batch for part in item.cut(min(STICKY, max_size))]
        last: tuple[str, int] | None = None
        waiting: deque[Records] = deque()
        size = 0
        for item in batch:
            item.pending = pending
            trouble = item.error
            if trouble is None and missing:
                trouble = missing.get(item.topic)
            if trouble is None and (item.size > max_size or item.partition is not None):
                trouble = self.trouble(item, max_size)
            if trouble is not None:
                for single in item.singles():
                    single.refuse(trouble)
                    pending.failed[single.id] = trouble
                    pending.done()
                continue
            place = item.topic, self.choose(item)
            if place != last:  # records for one partition stand together
                last, waiting = place, queue_of(*place).waiting
            waiting.append(item)
            size += item.size
        return size

    def trouble(self, item: Records, max_size: int) -> SendError | None:
        """Why this record cannot go to its topic; None if it can.

        Parameters:
            max_size: bytes at most, unless it is a copy.
        """
        if item.size > max_size and not item.is_copy:
            return Unfit(
                f"it has {item.size} bytes, over max_message={self._settings.max_message}; put less into it, or "
                "raise KAFKA_MAX_MESSAGE and the topic's max.message.bytes"
            )
        if item.partition is not None and not 0 <= item.partition < (count := self._counts.get(item.topic, 1)):
            return SendError(f"the topic {item.topic!r} has partitions 0 to {count - 1} and no {item.partition}")
        return None

    def choose(self, item: Records) -> int:
        """The partition for a record: the one it names, or that of its key, or any."""
        if item.partition is not None:
            return item.partition
        count = self._counts.get(item.topic, 1)
        if count == 1:
            return 0
        if item.key is not None:  # as Kafka's own client does it, so that a key has one partition whoever sends
            return int(murmur2(item.key) & 0x7FFFFFFF) % count
        # Messages without a key stay together for a while, so that batches fill (KIP-480).
        so_far = self._turn[item.topic] = self._turn.get(item.topic, 0) + item.size
        return so_far // STICKY % count


def _never(topic: str) -> StreamToolsError | None:
    """Why there can be no topic of this name; None if there can."""
    try:
        check_kafka_name(topic)
    except ConfigurationError as error:
        return Unfit(str(error))
    return None
