"""Requests of an operator, each to the broker that answers it, asked again while the cluster finds itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import (
    CreatePartitionsRequest,
    DeleteRecordsRequest,
    DeleteTopicsRequest,
    DescribeConfigsRequest,
)
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from streamtools.drivers.kafka.client.connect import connection, started
from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.client.requests import TOPIC, alter_configs
from streamtools.drivers.kafka.errors import GARBAGE
from streamtools.errors import ConnectError
from streamtools.settings import KafkaSettings

T = TypeVar("T")

#: Instead of a time: the first offset that is kept, and the one after the last.
EARLIEST: Final = -2
LATEST: Final = -1
#: Seconds before a request is asked again.
PAUSE: Final = 0.1
#: A broker does not answer.
UNREACHABLE: Final[tuple[type[Exception], ...]] = (
    kafka.KafkaConnectionError,
    kafka.NodeNotReadyError,
    kafka.RequestTimedOutError,
)

#: Chooses the node to ask.
Find = Callable[[], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic as the brokers see it now.

    Attributes:
        leaders: the node that leads each partition, by the partition's number; -1 where none does.
        replication: copies of each partition.
        internal: one of Kafka's own.
    """

    name: str
    leaders: Mapping[int, int]
    replication: int
    internal: bool

    @property
    def partitions(self) -> list[TopicPartition]:
        """Its partitions, in order."""
        return [TopicPartition(self.name, number) for number in sorted(self.leaders)]


class Cluster:
    """A connection to the brokers of a cluster.

    Every method raises errors of aiokafka for what a broker refuses, and ConnectError when no answer comes within
    `request_timeout`.
    """

    def __init__(self, settings: KafkaSettings, client_id: str) -> None:
        self._settings = settings
        self._client_id = client_id
        self._client: Any = None

    @classmethod
    def over(cls, client: Any, settings: KafkaSettings) -> Cluster:
        """One that asks over a client of the library that is connected already, and is not to be stopped."""
        cluster = cls(settings, "")
        cluster._client = client
        return cluster

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
        """The client of the library underneath."""
        return self._client

    # --- topics -----------------------------------------------------------------------------------

    async def topics(self, names: Iterable[str] | None = None) -> dict[str, TopicState]:
        """Those of these topics that exist; all of them when None. Looking makes none."""
        if names is None:
            return await self._topics(None, self.any)
        wanted = list(names)
        found = await self._topics(wanted, self.any)
        for broker in self._client.cluster.brokers():
            # What was just made is known to one broker a moment before it is to the next.
            if missing := [name for name in wanted if name not in found]:
                with suppress(*UNREACHABLE):
                    found |= await self._ask_topics(missing, broker.nodeId)
        return found

    async def everywhere(self, name: str) -> list[TopicState | None]:
        """A topic as each broker that answers knows it; None where it knows none."""
        states = []
        for broker in self._client.cluster.brokers():
            with suppress(*UNREACHABLE):
                states.append((await self._ask_topics([name], broker.nodeId)).get(name))
        return states

    async def _topics(self, names: list[str] | None, node: int | Find) -> dict[str, TopicState]:
        return await self.persist(lambda: self._ask_topics(names, node))

    async def _ask_topics(self, names: list[str] | None, node: int | Find) -> dict[str, TopicState]:
        response = await self.ask(MetadataRequest(names, allow_auto_topic_creation=False), node)
        found = {}
        for code, name, internal, partitions in response.topics:
            error = kafka.for_code(code)
            if error in (kafka.UnknownTopicOrPartitionError, kafka.InvalidTopicError):
                continue
            if error is not kafka.NoError and not error.retriable:
                raise error(name)
            leaders = {p[1]: p[2] for p in partitions}
            found[name] = TopicState(name, leaders, min((len(p[3]) for p in partitions), default=0), bool(internal))
        return found

    async def delete_topic(self, name: str) -> None:
        """Delete a topic; nothing happens when there is none."""

        async def attempt() -> None:
            response = await self.ask(DeleteTopicsRequest([name], self._milliseconds), self.controller)
            check(code for _, code in response.topic_error_codes)

        try:
            await self.persist(attempt, gone=kafka.UnknownTopicOrPartitionError)
        except kafka.UnknownTopicOrPartitionError:
            return

    async def add_partitions(self, name: str, total: int) -> None:
        """Raise the number of partitions."""

        async def attempt() -> None:
            request = CreatePartitionsRequest([(name, (total, None))], self._milliseconds, False)
            response = await self.ask(request, self.controller)
            for _, code, text in response.topic_errors:
                check([code], text)

        await self.persist(attempt)

    async def configuration(self, name: str) -> dict[str, str]:
        """A topic's settings by Kafka's names, defaults among them."""

        async def attempt() -> dict[str, str]:
            response = await self.ask(DescribeConfigsRequest([(TOPIC, name, None)]), self.any)
            [(code, text, _, _, entries)] = response.resources
            check([code], text)
            return {entry[0]: entry[1] for entry in entries}

        return await self.persist(attempt)

    async def configure(self, name: str, settings: Mapping[str, str]) -> None:
        """Change these settings of a topic and no others (KIP-339)."""

        async def attempt() -> None:
            response = await self.ask(alter_configs(name, settings), self.controller)
            for code, text, _, _ in response.responses:
                check([code], text)

        await self.persist(attempt)

    # --- offsets ----------------------------------------------------------------------------------

    async def offsets(
        self, partitions: Iterable[TopicPartition], time: int, *, all_of_them: bool = True
    ) -> dict[TopicPartition, int]:
        """The first offset of each partition at or after a time; -1 where there is none.

        Parameters:
            time: in milliseconds, or EARLIEST, or LATEST.
            all_of_them: False leaves out those that are gone meanwhile, or have no leader.
        """
        wanted = list(partitions)

        async def attempt() -> dict[TopicPartition, int]:
            found: dict[TopicPartition, int] = {}
            for node, rows in (await self.by_leader(dict.fromkeys(wanted, time), all_of_them=all_of_them)).items():
                response = await self.ask(OffsetRequest(-1, 0, rows), node)
                for topic, answers in response.topics:
                    check(answer[1] for answer in answers)
                    found.update((TopicPartition(topic, answer[0]), answer[3]) for answer in answers)
            return found

        return await self.persist(attempt)

    async def delete_records(self, ends: Mapping[TopicPartition, int]) -> None:
        """Delete what stands before these offsets."""

        async def attempt() -> None:
            for node, rows in (await self.by_leader(ends)).items():
                response = await self.ask(DeleteRecordsRequest(rows, self._milliseconds), node)
                for _, answers, *_ in response.topics:
                    check(answer[2] for answer in answers)

        await self.persist(attempt)

    async def by_leader(
        self, values: Mapping[TopicPartition, int], *, all_of_them: bool = True
    ) -> dict[int, list[tuple[str, list[tuple[int, int]]]]]:
        """Each leader to its topics, each with (partition, value)."""
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
        """The node that changes the cluster; with KRaft every node passes it on."""
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
                    except GARBAGE as error:  # it reads well, and is not what was asked for
                        trouble = error
                    await asyncio.sleep(PAUSE)
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
        """For the broker to finish before we give up."""
        return int(1000 * self._settings.request_timeout / 2)


def check(codes: Iterable[int], text: str | None = None) -> None:
    for code in codes:
        error = kafka.for_code(code)
        if error is not kafka.NoError:
            raise error(text) if text else error()
