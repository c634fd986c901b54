"""Bindings: which queue gets the messages of which topics, as Kafka itself has no exchanges.

They stand in a compacted topic of their own, one record for each binding: the key is queue, exchange and topic, the
value is the exchange's type, or none if the binding was removed. A publisher reads what was added since, and writes
its message to each bound queue. So it knows all bindings made before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.fetch import FetchRequest
from pydantic_core import from_json, to_json

from streamtools.drivers.kafka.brokers.cluster import EARLIEST, Cluster, check
from streamtools.drivers.kafka.brokers.topics import Topic, Topics
from streamtools.drivers.kafka.client.batches import Records
from streamtools.drivers.kafka.client.connect import connection, started, stopped
from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, client_error
from streamtools.drivers.kafka.names import BINDINGS, check_kafka_name
from streamtools.errors import ConfigurationError, QueueError
from streamtools.exchange import Binding, Exchange, another_type
from streamtools.settings import KafkaSettings
from streamtools.validation.checks import check_topic

#: A single partition, so that all see the same order.
PLACE: Final[Any] = TopicPartition(BINDINGS, 0)
#: Kafka keeps the newest record of each key, and that of a removed binding for a day (`delete.retention.ms`).
CONFIG: Final = {"cleanup.policy": "compact"}
#: Seconds after which all is read anew: by then Kafka may have deleted the record of a removed binding.
STALE: Final = 3600.0
#: Bytes that are fetched at once.
FETCH: Final = 1024 * 1024

#: One record's key: a queue and its binding.
Bound = tuple[str, Binding]


class Bindings:
    """The bindings of one Kafka that have been read so far."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._reads = 0
        self._under_way: asyncio.Task[None] | None = None
        self._to_come: asyncio.Task[None] | None = None
        #: By the exchange's name, what is bound to it, in the order it was made.
        self._bound: dict[str, dict[Bound, None]] = {}
        self._next = 0
        self._begun = time.monotonic()
        self._leader: int | None = None

    async def read(self, client: Any) -> None:
        """Return when all bindings made before this call are known; safe to call from many tasks at once.

        Parameters:
            client: of the library, connected.

        Raises:
            ConnectError: no broker answers.
        """
        if self._to_come is None:
            self._to_come = asyncio.create_task(self._read(client, self._under_way), name="streamtools-bindings")
        # One read for all callers before it begins; shielded from the cancellation of one of them.
        await asyncio.shield(self._to_come)

    def queues(self, exchange: Exchange, topic: str) -> list[str]:
        """The queues that get the messages of a topic."""
        bound = self._bound.get(exchange.name, {})
        found = {queue: None for queue, binding in bound if binding.exchange.matches(binding.topic, topic)}
        return list(found)

    def of(self, queue: str) -> list[Bound]:
        """All bindings of one queue."""
        return [bound for each in self._bound.values() for bound in each if bound[0] == queue]

    def has(self, bound: Bound) -> bool:
        """The binding exists already.

        Raises:
            QueueError: its exchange is of another type.
        """
        exchange = bound[1].exchange
        if clash := self.clash(exchange):
            raise clash
        return bound in self._bound.get(exchange.name, {})

    def clash(self, exchange: Exchange) -> QueueError | None:
        """The error for an exchange that exists with another type; None otherwise."""
        for _, other in self._bound.get(exchange.name, {}):
            if other.exchange.type != exchange.type:
                return another_type(exchange, other.exchange.type)
        return None

    # --- reading ----------------------------------------------------------------------------------

    async def _read(self, client: Any, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
            if not before.cancelled():
                before.exception()  # looked at: whoever waited for it got it
        self._under_way, self._to_come = self._to_come, None
        self._reads += 1
        cluster = Cluster.over(client, self._settings)
        try:
            await cluster.persist(lambda: self._catch_up(cluster))
        except CLIENT_ERRORS as error:
            raise client_error(error, self._settings) from error

    async def _catch_up(self, cluster: Cluster) -> None:
        try:
            if time.monotonic() - self._begun > STALE:
                return await self._begin_anew(cluster, 0)
            while await self._fetch(cluster):
                pass
        except kafka.OffsetOutOfRangeError:  # the topic was made anew, or purged
            await self._begin_anew(cluster, (await cluster.offsets([PLACE], EARLIEST))[PLACE])

    async def _begin_anew(self, cluster: Cluster, offset: int) -> None:
        """Read all of it; until that is done, what was known before holds."""
        fresh = Bindings(self._settings)
        fresh._next = offset
        while await fresh._fetch(cluster):
            pass
        self._bound, self._next, self._begun, self._leader = fresh._bound, fresh._next, fresh._begun, fresh._leader

    async def _fetch(self, cluster: Cluster) -> bool:
        """Read what comes next; False when there is nothing more."""
        if self._leader is None:
            topic = (await cluster.topics([BINDINGS])).get(BINDINGS)
            if topic is None:  # nobody has ever bound anything, or it was deleted
                self._bound, self._next = {}, 0
                return False
            if (leader := topic.leaders.get(PLACE.partition, -1)) < 0:
                raise kafka.LeaderNotAvailableError(BINDINGS)
            self._leader = leader
        leader, self._leader = self._leader, None  # after an error another node may lead
        request = FetchRequest(0, 0, FETCH, 0, [(BINDINGS, [(PLACE.partition, self._next, FETCH)])])
        response = await cluster.ask(request, leader)
        [(_, [(_, code, end, *_, data)])] = response.topics
        check([code])
        self._leader = leader
        before = self._next
        self._take(Records(data))
        return before < self._next < int(end)

    def _take(self, records: Any) -> None:
        while records.has_next():
            batch = records.next_batch()
            for record in batch:
                if record.offset >= self._next:
                    self._apply(record.key, record.value)
            self._next = max(self._next, batch.next_offset)

    def _apply(self, key: bytes | None, value: bytes | None) -> None:
        try:
            queue, name, topic = map(_text, from_json(key or b""))
            kept = Exchange(name, from_json(value)) if value is not None else None
            check_kafka_name(queue)
            check_topic(topic)
        except (ValueError, TypeError, ConfigurationError):  # not one of ours: others may write there too
            return
        known = self._bound.setdefault(name, {})
        for bound in [b for b in known if b[0] == queue and b[1].topic == topic]:
            del known[bound]
        if kept is not None:
            known[queue, Binding(topic, kept)] = None


def _text(part: object) -> str:
    if not isinstance(part, str):
        raise TypeError(part)
    return part


async def bind(
    client: Any, settings: KafkaSettings, queue: str, bindings: Iterable[Binding], *, replication: int | None = None
) -> None:
    """Bind an existing queue; safe to repeat.

    Parameters:
        client: of the library, connected.
        replication: copies of the topic of bindings if it is made; those of the settings when None.

    Raises:
        QueueError: an exchange is of another type.
        ConnectError: no broker answers.
    """
    table = Bindings(settings)
    await table.read(client)
    if missing := [(queue, binding) for binding in bindings if not table.has((queue, binding))]:
        topic = Topic(name=BINDINGS, partitions=1, replication=replication, config=CONFIG)
        await Topics(client, settings).declare([topic], True)
        await _write(settings, missing, there=True)


async def unbind(client: Any, settings: KafkaSettings, queue: str, bindings: Iterable[Binding] | None = None) -> None:
    """Remove bindings of a queue, all of them when None; safe to repeat."""
    table = Bindings(settings)
    await table.read(client)
    bound = table.of(queue)
    if bindings is not None:
        gone = {(binding.exchange.name, binding.topic) for binding in bindings}
        bound = [(queue, b) for queue, b in bound if (b.exchange.name, b.topic) in gone]
    if bound:
        await _write(settings, bound, there=False)


async def _write(settings: KafkaSettings, changes: Sequence[Bound], *, there: bool) -> None:
    producer = AIOKafkaProducer(**await connection(settings, "streamtools-bindings"), enable_idempotence=True)
    harden(producer.client)
    await started(producer, settings)
    try:
        for queue, binding in changes:
            key = to_json((queue, binding.exchange.name, binding.topic))
            value = to_json(binding.exchange.type) if there else None
            await producer.send_and_wait(BINDINGS, key=key, value=value, partition=PLACE.partition)
    except CLIENT_ERRORS as error:
        raise client_error(error, settings) from error
    finally:
        await stopped(producer)
