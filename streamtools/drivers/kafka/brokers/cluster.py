"""Cluster: sends requests to the brokers that can answer them, and repeats those whose error is one that passes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import (
    CreatePartitionsRequest,
    DeleteRecordsRequest,
    DeleteTopicsRequest,
    DescribeConfigsRequest,
)
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from streamtools.drivers.kafka.client.connect import connection, started
from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.client.requests import TOPIC, alter_configs
from streamtools.drivers.kafka.errors import GARBAGE
from streamtools.errors import ConnectError
from streamtools.settings import KafkaSettings

T = TypeVar("T")
P = ParamSpec("P")

#: Instead of a time: the first offset that is kept, and the one after the last.
EARLIEST: Final = -2
LATEST: Final = -1
#: A reader sees committed messages only.
READ_COMMITTED: Final = 1
#: Seconds before a request is repeated.
REPEAT_INTERVAL: Final = 0.1
#: A broker does not answer.
UNREACHABLE: Final[tuple[type[Exception], ...]] = (
    kafka.KafkaConnectionError,
    kafka.NodeNotReadyError,
    kafka.RequestTimedOutError,
)

#: Chooses the node to ask.
Find = Callable[[], Awaitable[int]]


class Persistent(Protocol):
    """Something that repeats its requests."""

    async def persist(self, attempt: Callable[[], Awaitable[T]]) -> T: ...


S = TypeVar("S", bound=Persistent)


def repeated(
    method: Callable[Concatenate[S, P], Awaitable[T]],
) -> Callable[Concatenate[S, P], Awaitable[T]]:
    """A method that is repeated by `persist` while its error is one that passes."""

    @wraps(method)
    async def repeat(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.persist(lambda: method(self, *args, **kwargs))

    return repeat


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic as a broker sees it now.

    Attributes:
        leaders: the node that leads each partition, by the partition's number; -1 for none. Empty while the broker
            does not know the partitions.
        replication: copies of each partition.
        internal: one of Kafka's own.
        refusal: why we may not see it; None if we may.
    """

    name: str
    leaders: Mapping[int, int]
    replication: int = 0
    internal: bool = False
    refusal: Exception | None = None

    @property
    def partitions(self) -> list[TopicPartition]:
        """Its partitions, in order."""
        return [TopicPartition(self.name, number) for number in sorted(self.leaders)]

    @property
    def is_leaderless(self) -> bool:
        """A partition has no leader, or none is known."""
        return not self.leaders or min(self.leaders.values()) < 0

    def is_short_of(self, partitions: int) -> bool:
        """It has fewer partitions than that, as far as this broker knows."""
        return self.refusal is None and len(self.leaders) < partitions


def topics_request(names: Iterable[str] | None) -> Any:
    """A request for topics, all of them when None; it makes none."""
    return MetadataRequest(None if names is None else list(names), allow_auto_topic_creation=False)


def read_topics(response: Any) -> dict[str, TopicState]:
    """The topics in an answer that exist."""
    found = {}
    for code, name, internal, partitions in response.topics:
        error = kafka.for_code(code)
        if error in (kafka.UnknownTopicOrPartitionError, kafka.InvalidTopicError):
            continue
        if error is kafka.NoError:
            leaders = {p[1]: p[2] for p in partitions}
            found[name] = TopicState(name, leaders, min((len(p[3]) for p in partitions), default=0), bool(internal))
        else:
            found[name] = TopicState(name, {}, refusal=None if error.retriable else error(name))
    return found


class Cluster:
    """A connection to the brokers of a cluster.

    Every method raises errors of aiokafka for what a broker refuses, and ConnectError if no answer comes within
    `request_timeout`.
    """

    def __init__(self, settings: KafkaSettings, client_id: str = "", *, client: Any = None) -> None:
        self._settings = settings
        self._client_id = client_id
        self._client: Any = client

    @classmethod
    def over(cls, client: Any, settings: KafkaSettings) -> Cluster:
        """One that uses a connected client of the library, and must not be stopped."""
        return cls(settings, client=client)

    async def start(self) -> None:
        """Connect to one broker."""
        if self._client is None:
            self._client = AIOKafkaClient(**await connection(self._settings, self._client_id))
            harden(self._client)
        await self._client.bootstrap()

    async def open(self) -> None:
        """Connect.

        Raises:
            ConnectError: no broker lets us in.
        """
        await started(self, self._settings)

    async def stop(self) -> None:
        """Close the connections. Safe to repeat."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    @property
    def client(self) -> Any:
        """The library's client."""
        return self._client

    # --- topics -----------------------------------------------------------------------------------

    async def topics(self, names: Iterable[str] | None = None) -> dict[str, TopicState]:
        """Those of these topics that exist; all topics when None. Asking makes none."""
        if names is None:
            return await self._topics(None)
        wanted = list(names)
        found = await self._topics(wanted)
        for broker in self._client.cluster.brokers():
            # What was just made is known to one broker a moment before it is to the next.
            if missing := [name for name in wanted if name not in found]:
                with suppress(*UNREACHABLE):
                    found |= await self._ask_topics(missing, broker.nodeId)
        return found

    async def everywhere(self, name: str) -> list[TopicState | None]:
        """A topic as each broker that answers knows it; None if it knows none."""
        states = []
        for broker in self._client.cluster.brokers():
            with suppress(*UNREACHABLE):
                states.append((await self._ask_topics([name], broker.nodeId)).get(name))
        return states

    @repeated
    async def _topics(self, names: list[str] | None) -> dict[str, TopicState]:
        return await self._ask_topics(names, self.any)

    async def _ask_topics(self, names: list[str] | None, node: int | Find) -> dict[str, TopicState]:
        found = read_topics(await self.ask(topics_request(names), node))
        for topic in found.values():
            if topic.refusal is not None:
                raise topic.refusal
        return found

    async def delete_topic(self, name: str) -> None:
        """Delete a topic; nothing happens if there is none."""

        async def attempt() -> None:
            response = await self.ask(DeleteTopicsRequest([name], self._milliseconds), self.controller)
            check(code for _, code in response.topic_error_codes)

        with suppress(kafka.UnknownTopicOrPartitionError):
            await self.persist(attempt, gone=kafka.UnknownTopicOrPartitionError)

    @repeated
    async def add_partitions(self, name: str, total: int) -> None:
        """Raise the number of partitions."""
        request = CreatePartitionsRequest([(name, (total, None))], self._milliseconds, False)
        for _, code, text in (await self.ask(request, self.controller)).topic_errors:
            check([code], text)

    @repeated
    async def configuration(self, name: str) -> dict[str, str]:
        """A topic's settings by Kafka's names, defaults among them."""
        response = await self.ask(DescribeConfigsRequest([(TOPIC, name, None)]), self.any)
        [(code, text, _, _, entries)] = response.resources
        check([code], text)
        return {entry[0]: entry[1] for entry in entries}

    @repeated
    async def configure(self, name: str, settings: Mapping[str, str]) -> None:
        """Change these settings of a topic and no others (KIP-339)."""
        for code, text, _, _ in (await self.ask(alter_configs(name, settings), self.controller)).responses:
            check([code], text)

    # --- records and offsets ----------------------------------------------------------------------

    @repeated
    async def offsets(
        self, partitions: Collection[TopicPartition], time: int, *, all_of_them: bool = True
    ) -> dict[TopicPartition, int]:
        """The first offset of each partition at or after a time; -1 for none.

        Parameters:
            time: in milliseconds, or EARLIEST, or LATEST.
            all_of_them: False leaves out those that are gone meanwhile, or have no leader.
        """
        found: dict[TopicPartition, int] = {}
        for node, rows in (await self.by_leader(dict.fromkeys(partitions, time), all_of_them=all_of_them)).items():
            response = await self.ask(OffsetRequest(-1, 0, rows), node)
            for topic, answers in response.topics:
                check(answer[1] for answer in answers)
                found.update((TopicPartition(topic, answer[0]), answer[3]) for answer in answers)
        return found

    async def fetch(self, partition: TopicPartition, offset: int, size: int) -> Any:
        """The answer of a partition's leader, with committed records from this offset on.

        Parameters:
            size: bytes of records; a batch that is larger comes as a whole (KIP-74).

        Returns:
            None if the offset was purged meanwhile.
        """
        rows = [(partition.topic, [(partition.partition, offset, size)])]

        async def attempt() -> Any:
            [node] = await self.by_leader({partition: offset})
            response = await self.ask(FetchRequest(0, 0, size, READ_COMMITTED, rows), node)
            [(_, [answer])] = response.topics
            check([answer[1]])
            return answer

        try:
            return await self.persist(attempt)
        except kafka.OffsetOutOfRangeError:
            return None

    @repeated
    async def delete_records(self, ends: Mapping[TopicPartition, int]) -> None:
        """Delete the records before these offsets."""
        for node, rows in (await self.by_leader(ends)).items():
            response = await self.ask(DeleteRecordsRequest(rows, self._milliseconds), node)
            for _, answers, *_ in response.topics:
                check(answer[2] for answer in answers)

    async def by_leader(
        self, values: Mapping[TopicPartition, int], *, all_of_them: bool = True
    ) -> dict[int, list[tuple[str, list[tuple[int, int]]]]]:
        """For each leader its topics, each with (partition, value)."""
        topics = await self.topics({partition.topic for partition in values})
        found: dict[int, dict[str, list[tuple[int, int]]]] = {}
        for partition, value in values.items():
            topic = topics.get(partition.topic)
            leader = topic.leaders.get(partition.partition, -1) if topic is not None else -1
            if leader < 0 and not all_of_them:
                continue
            if leader < 0:
                raise kafka.LeaderNotAvailableError(f"{partition.topic}-{partition.partition}")
            found.setdefault(leader, {}).setdefault(partition.topic, []).append((partition.partition, value))
        return {node: list(rows.items()) for node, rows in found.items()}

    # --- asking -----------------------------------------------------------------------------------

    async def any(self) -> int:
        """Some node."""
        node = self._client.get_random_node()
        if node is None:
            raise kafka.NoBrokersAvailable
        return int(node)

    async def controller(self) -> int:
        """The node that changes the cluster; with KRaft every node passes such requests on."""
        found = self._client.cluster.controller
        return await self.any() if found is None else int(found.nodeId)

    async def ask(self, request: Any, node: int | Find) -> Any:
        """Ask once."""
        return await self._client.send(node if isinstance(node, int) else await node(), request)

    async def persist(self, attempt: Callable[[], Awaitable[T]], *, gone: type[Exception] | None = None) -> T:
        """Repeat an attempt while its error is one that passes, for `request_timeout` at most.

        Parameters:
            gone: an error that would pass, but is an answer here.

        Raises:
            ConnectError: it did not pass.
        """
        trouble: BaseException | None = None
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                while True:
                    try:
                        return await attempt()
                    except kafka.KafkaError as error:
                        if not error.retriable or (gone is not None and isinstance(error, gone)):
                            raise
                        trouble = error
                    except GARBAGE as error:  # the answer can be read, and is not one to this request
                        trouble = error
                    await asyncio.sleep(REPEAT_INTERVAL)
                    await self._client.force_metadata_update()
        except TimeoutError as error:
            why = trouble or "no answer"
            raise ConnectError(
                f"{self._settings.safe_url} did not do it within {self._settings.request_timeout:g} s: {why}."
            ) from (trouble or error)

    async def wait(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Return when it holds: what a controller has decided reaches the brokers a moment later."""

        async def attempt() -> None:
            if not await condition():
                raise kafka.StaleMetadata("the brokers do not know it yet")

        await self.persist(attempt)

    @property
    def _milliseconds(self) -> int:
        """Milliseconds for a broker to do it before we give up."""
        return int(1000 * self._settings.request_timeout / 2)


def check(codes: Iterable[int], text: str | None = None) -> None:
    """Raise the error of the first code that is one."""
    for code in codes:
        error = kafka.for_code(code)
        if error is not kafka.NoError:
            raise error(text) if text else error()
