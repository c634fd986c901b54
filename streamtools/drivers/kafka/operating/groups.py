"""What consumer groups have read, who is in them, and moving one to another place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.protocol.admin import DescribeGroupsRequest, ListGroupsRequest
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest

from streamtools.drivers.kafka.brokers.cluster import Cluster, check
from streamtools.drivers.kafka.offsets import decode
from streamtools.errors import QueueError
from streamtools.settings import KafkaSettings

#: A kind of coordinator: of groups, not of transactions.
GROUP: Final = 0
#: In a commit: by nobody who is in the group. Kafka takes it from outside as long as the group has no members.
NO_GENERATION: Final = -1
NO_MEMBER: Final = ""
#: As the brokers name the state of a group without members, and of one that they do not know.
INACTIVE: Final = frozenset({"Empty", "Dead"})

#: An offset, and the metadata of its commit.
Commit = tuple[int, str]


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """A group's members.

    Attributes:
        state: as the brokers name it.
        members: client ids, each with its partitions.
    """

    state: str
    members: Sequence[tuple[str, Sequence[TopicPartition]]]

    @property
    def active(self) -> bool:
        """It has members, or is about to."""
        return self.state not in INACTIVE

    def holder(self, partition: TopicPartition) -> str | None:
        """The client id of the member that reads a partition."""
        return next((client for client, partitions in self.members if partition in partitions), None)

    def reads(self, topic: str) -> bool:
        """Whether any member reads any of its partitions."""
        return any(partition.topic == topic for _, partitions in self.members for partition in partitions)


class Groups:
    """The groups of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def names(self) -> dict[str, int]:
        """Every consumer group, with the node that coordinates it."""

        async def attempt() -> dict[str, int]:
            found: dict[str, int] = {}
            for broker in self._cluster.client.cluster.brokers():
                response = await self._cluster.ask(ListGroupsRequest(), broker.nodeId)
                check([response.error_code])
                found.update((name, broker.nodeId) for name, kind in response.groups if kind in ("consumer", ""))
            return found

        return await self._cluster.persist(attempt)

    async def describe(self, group: str) -> GroupDescription:
        """Who is in a group; nobody where there is no such group."""

        async def attempt() -> GroupDescription:
            response = await self._ask(group, DescribeGroupsRequest([group]))
            [found] = response.groups
            check([found[0]])
            return GroupDescription(found[2], [(member[1], _assigned(member[4])) for member in found[5]])

        return await self._cluster.persist(attempt)

    async def committed(self, group: str, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, Commit]:
        """What a group has committed of these partitions; those without a commit are missing."""
        rows = [(topic, numbers) for topic, numbers in _by_topic(dict.fromkeys(partitions, 0)).items()]
        request = OffsetFetchRequest(group, [(topic, [number for number, _ in numbers]) for topic, numbers in rows])

        async def attempt() -> dict[TopicPartition, Commit]:
            response = await self._ask(group, request)
            check([response.error_code])
            found = {}
            for topic, answers in response.topics:
                for number, offset, metadata, code in answers:
                    check([code])
                    if offset >= 0:
                        found[TopicPartition(topic, number)] = (offset, metadata or "")
            return found

        return await self._cluster.persist(attempt)

    async def commit(self, group: str, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Set what a group has read; safe to repeat.

        Raises:
            UnknownMemberIdError: the group has members, who alone may commit.
        """
        rows = [
            (topic, [(number, offset, metadata) for number, (offset, metadata) in commits])
            for topic, commits in _by_topic(offsets).items()
        ]
        request = OffsetCommitRequest(group, NO_GENERATION, NO_MEMBER, -1, rows)

        async def attempt() -> None:
            response = await self._ask(group, request)
            for _, answers in response.topics:
                check(code for _, code in answers)

        await self._cluster.persist(attempt)

    async def _ask(self, group: str, request: Any) -> Any:
        async def coordinator() -> int:
            found = await self._cluster.ask(FindCoordinatorRequest(group, GROUP), self._cluster.any)
            check([found.error_code])
            return int(found.coordinator_id)

        return await self._cluster.ask(request, coordinator)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a group has come in one partition.

    Attributes:
        begin: the first offset that is kept.
        end: the one after the last.
        commit: what the group has committed.
    """

    begin: int
    end: int
    commit: Commit | None

    @property
    def start(self) -> int:
        """Where the group goes on; what it has committed may be gone, by retention or a purge."""
        if self.commit is None or not self.begin <= self.commit[0] <= self.end:
            return self.begin
        return self.commit[0]

    @property
    def metadata(self) -> str:
        """Of the commit, where it still holds."""
        return self.commit[1] if self.commit is not None and self.commit[0] == self.start else ""

    @property
    def lag(self) -> int:
        """Offsets behind `start`."""
        return self.end - self.start

    @property
    def waiting(self) -> int:
        """What the group has still to do."""
        return self.lag - self.ahead

    @property
    def ahead(self) -> int:
        """How many of these are done already."""
        return sum(min(end, self.end) - first for first, end in decode(self.start, self.metadata) if first < self.end)


def busy(group: str, settings: KafkaSettings) -> QueueError:
    """The error for a group whose consumers are at work."""
    return QueueError(
        f"The group {group!r} at {settings.safe_url} has consumers, and only they may move it. Stop them, and repeat "
        "this."
    )


def _by_topic(values: Mapping[TopicPartition, Any]) -> dict[str, list[tuple[int, Any]]]:
    found: dict[str, list[tuple[int, Any]]] = {}
    for partition, value in values.items():
        found.setdefault(partition.topic, []).append((partition.partition, value))
    return found


def _assigned(assignment: bytes) -> list[TopicPartition]:
    """What a member has said that it reads; nothing while the group rebalances."""
    return list(ConsumerProtocolMemberAssignment.decode(assignment).partitions()) if assignment else []
