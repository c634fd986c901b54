"""Topics: looks for topics, and makes them; looking makes none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from aiokafka import errors as kafka
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest

from streamtools.drivers.kafka.brokers.cluster import Cluster, TopicState, read_topics, topics_request
from streamtools.drivers.kafka.client.connect import stopped
from streamtools.drivers.kafka.client.producers import is_closed, learn
from streamtools.drivers.kafka.client.requests import TOPIC
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, Missing, client_error, plain
from streamtools.drivers.kafka.records import COPY_ROOM
from streamtools.errors import ConnectError, QueueError, StreamToolsError
from streamtools.settings import KafkaSettings
from streamtools.validation.checks import Declare

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log: logging.Logger = logging.getLogger("streamtools")

#: Kafka's name for the bytes that a message of a topic may have, and the largest value.
MAX_MESSAGE: Final = "max.message.bytes"
INT_32: Final = 2**31 - 1
#: Seconds between two requests for a topic that is being made.
MAKING_INTERVAL: Final = 0.05
#: A controller says so while no broker is ready, with the error code for too many replicas.
FENCED: Final = "brokers are currently fenced"
#: "The broker's default", in a request to make a topic (KIP-464).
DEFAULT: Final = -1
#: No topic must have more partitions than it has.
NO_LEAST: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A topic to be made.

    Attributes:
        partitions: the broker's default when None.
        replication: copies of each partition; the broker's default when None.
        config: the topic's own settings, by Kafka's names.
        copies_of: topics whose messages it must take copies of, whatever their size.
    """

    name: str
    partitions: int | None = None
    replication: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    copies_of: tuple[str, ...] = ()


class Topics:
    """Looks for topics and makes them, over a connected client of the library."""

    def __init__(self, client: Any, settings: KafkaSettings) -> None:
        self._client = client
        self._settings = settings

    @property
    def client(self) -> Any:
        """The library's client."""
        return self._client

    async def find(self, names: Iterable[str]) -> dict[str, int]:
        """The number of partitions of each topic that exists; 0 while one of them has no leader."""
        found = await self.look(names)
        for topic in found.values():
            if topic.refusal is not None:
                raise client_error(topic.refusal, self._settings)
        return {name: 0 if topic.is_leaderless else len(topic.leaders) for name, topic in found.items()}

    async def look(self, names: Iterable[str], least: Mapping[str, int] = NO_LEAST) -> dict[str, TopicState]:
        """Those of these topics that exist. The library knows their leaders from then on.

        Parameters:
            names: the topics.
            least: the partitions that some must have; all brokers are asked about one that has fewer.
        """
        wanted = list(names)
        found = await self.glance(wanted)
        for broker in self._client.cluster.brokers():
            # What was just made is known to one broker a moment before it is to the next.
            if missing := [n for n in wanted if n not in found or found[n].is_short_of(least.get(n, 0))]:
                with suppress(*CLIENT_ERRORS):  # a TimeoutError is an OSError
                    async with asyncio.timeout(self._settings.connect_timeout):
                        found |= self._read(await self._client.send(broker.nodeId, topics_request(missing)))
        return found

    async def glance(self, names: Iterable[str]) -> dict[str, TopicState]:
        """The same, from one broker, which may not know yet what was just made."""
        return self._read(await self._ask(topics_request(names)))

    def _read(self, response: Any) -> dict[str, TopicState]:
        for code, name, _internal, partitions in response.topics:
            if kafka.for_code(code) is kafka.NoError:
                learn(self._client.cluster, name, partitions)
        return read_topics(response)

    async def declare(self, topics: Iterable[Topic], declare: Declare) -> dict[str, int]:
        """Make those that are missing, or check that none is; returns the partitions of each.

        Raises:
            QueueError: one is missing and must not be made, or cannot be made.
        """
        wanted = {topic.name: topic for topic in topics}
        found = await self.find(wanted)
        missing = [topic for name, topic in wanted.items() if name not in found]
        if missing and declare is not True:
            raise self.missing(missing[0].name)
        if plain := [topic for topic in missing if not topic.copies_of]:
            await self._create(plain)
        if copies := [topic for topic in missing if topic.copies_of]:
            if plain:  # the topics whose copies they take may be among these
                await self._wait([topic.name for topic in plain], {})
            await self._create([await self._as_wide(topic) for topic in copies])
        return await self._wait(list(wanted), found)

    def missing(self, name: str) -> Missing:
        """The error for a topic that does not exist."""
        return Missing(
            f"There is no topic {name!r} at {self._settings.safe_url}. Make it: streamtools queues create {name}. Or "
            "use declare=True to have it made."
        )

    async def _create(self, topics: list[Topic]) -> None:
        asked: list[Any] = [
            (
                topic.name,
                topic.partitions or self._settings.partitions or DEFAULT,
                topic.replication or self._settings.replication or DEFAULT,
                [],
                list(topic.config.items()),
            )
            for topic in topics
        ]
        timeout = int(1000 * self._settings.request_timeout)
        response = await self._ask(CreateTopicsRequest(asked, timeout, False), controller=True)
        for name, error_code, *said in response.topic_errors:
            error = kafka.for_code(error_code)
            if error not in (kafka.NoError, kafka.TopicAlreadyExistsError):
                words = (said[0] if said and said[0] else plain(error())).rstrip(".")
                # A broker that starts, or has too much to do, is fenced: nothing can be placed there for a while.
                kind = ConnectError if FENCED in words else QueueError
                raise kind(f"The topic {name!r} cannot be made at {self._settings.safe_url}: {words}.") from error()

    async def _as_wide(self, topic: Topic) -> Topic:
        """The same topic, wide enough for copies of all messages of the topics whose copies it takes."""
        asked = DescribeConfigsRequest([(TOPIC, name, [MAX_MESSAGE]) for name in topic.copies_of])
        try:
            found = (await self._ask(asked)).resources
        except StreamToolsError as error:
            log.debug("The %s of %s is not known: %s", MAX_MESSAGE, topic.copies_of, error)
            return topic
        # Without the right to ask (DescribeConfigs), the usual size is assumed.
        wanted = [int(entry[1]) + COPY_ROOM for _, _, _, _, entries in found for entry in entries if entry[1]]
        most = min(max([int(topic.config.get(MAX_MESSAGE, 0)), *wanted]), INT_32)
        return replace(topic, config={**topic.config, MAX_MESSAGE: str(most)}) if most else topic

    async def _wait(self, names: list[str], found: dict[str, int]) -> dict[str, int]:
        deadline = asyncio.get_running_loop().time() + self._settings.request_timeout
        while any(not found.get(name) for name in names):
            if asyncio.get_running_loop().time() > deadline:
                absent = [name for name in names if not found.get(name)]
                raise ConnectError(f"The topics {absent} at {self._settings.safe_url} have no leader.")
            await asyncio.sleep(MAKING_INTERVAL)
            found = await self.find(names)
        return found

    async def _ask(self, request: Any, *, controller: bool = False) -> Any:
        """Ask some broker, or the controller if clients must find it themselves (before KRaft)."""
        for attempt in (1, 2, 3):
            node = self._client.get_random_node()
            if controller and self._client.cluster.controller is not None:
                node = self._client.cluster.controller.nodeId
            try:
                return await self._client.send(node, request)
            except CLIENT_ERRORS as error:
                if attempt == 3 or is_closed(self._client):
                    raise client_error(error, self._settings) from error
                await self._client.force_metadata_update()
        raise AssertionError("not reached")


@asynccontextmanager
async def topics_at(settings: KafkaSettings, client_id: str) -> AsyncIterator[Topics]:
    """Topics over a connection of its own."""
    cluster = Cluster(settings, client_id)
    await cluster.open()
    try:
        yield Topics(cluster.client, settings)
    finally:
        await stopped(cluster)
