"""Groups: members and commits of consumer groups, seen from outside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.protocol.admin import DescribeGroupsRequest, ListGroupsRequest
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest

from streamtools.drivers.kafka.brokers.cluster import Cluster, check, repeated
from streamtools.drivers.kafka.offsets import decode
from streamtools.errors import QueueError
from streamtools.settings import KafkaSettings

#: The kind of coordinator: of groups, not of transactions.
GROUP: Final = 0
#: In a commit: from outside the group. Kafka takes it as long as the group has no members.
NO_GENERATION: Final = -1
NO_MEMBER: Final = ""
#: The brokers' names for the state of a group without members, and of an unknown one.
INACTIVE: Final = frozenset({"Empty", "Dead"})

T = TypeVar("T")
#: An offset, and the metadata of its commit.
Commit = tuple[int, str]


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """A group's state and members.

    Attributes:
        state: the brokers' name for it.
        members: their client ids, each with its partitions.
    """

    state: str
    members: Sequence[tuple[str, Sequence[TopicPartition]]]

    @property
    def active(self) -> bool:
        """It has members, or gets some."""
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

    async def persist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt as the cluster does."""
        return await self._cluster.persist(attempt)

    @repeated
    async def names(self) -> dict[str, int]:
        """Every consumer group, with the node that coordinates it."""
        found: dict[str, int] = {}
        for broker in self._cluster.client.cluster.brokers():
            response = await self._cluster.ask(ListGroupsRequest(), broker.nodeId)
            check([response.error_code])
            found.update((name, broker.nodeId) for name, kind in response.groups if kind in ("consumer", ""))
        return found

    @repeated
    async def describe(self, group: str) -> GroupDescription:
        """A group; without members if it does not exist."""
        response = await self._ask(group, DescribeGroupsRequest([group]))
        [found] = response.groups
        check([found[0]])
        return GroupDescription(found[2], [(member[1], _assigned(member[4])) for member in found[5]])

    @repeated
    async def committed(self, group: str, partitions: Collection[TopicPartition]) -> dict[TopicPartition, Commit]:
        """A group's commits of these partitions; those without one are missing."""
        rows = [
            (topic, [number for number, _ in numbers])
            for topic, numbers in _by_topic(dict.fromkeys(partitions, 0)).items()
        ]
        response = await self._ask(group, OffsetFetchRequest(group, rows))
        check([response.error_code])
        found = {}
        for topic, answers in response.topics:
            for number, offset, metadata, code in answers:
                check([code])
                if offset >= 0:
                    found[TopicPartition(topic, number)] = (offset, metadata or "")
        return found

    @repeated
    async def commit(self, group: str, offsets: Mapping[TopicPartition, Commit]) -> None:
        """Commit for a group; safe to repeat.

        Raises:
            UnknownMemberIdError: the group has members, who alone may commit.
        """
        rows = [
            (topic, [(number, offset, metadata) for number, (offset, metadata) in commits])
            for topic, commits in _by_topic(offsets).items()
        ]
        response = await self._ask(group, OffsetCommitRequest(group, NO_GENERATION, NO_MEMBER, -1, rows))
        for _, answers in response.topics:
            check(code for _, code in answers)

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
        """Where the group goes on: what it has committed may be deleted, by retention or a purge."""
        if self.commit is None or not self.begin <= self.commit[0] <= self.end:
            return self.begin
        return self.commit[0]

    @property
    def metadata(self) -> str:
        """The commit's metadata; none if its offset is deleted."""
        return self.commit[1] if self.commit is not None and self.commit[0] == self.start else ""

    @property
    def lag(self) -> int:
        """Offsets from `start` on."""
        return self.end - self.start

    @property
    def waiting(self) -> int:
        """Offsets that the group has still to finish."""
        return self.lag - self.ahead

    @property
    def ahead(self) -> int:
        """How many offsets after `start` are finished already."""
        return sum(min(end, self.end) - first for first, end in decode(self.start, self.metadata) if first < self.end)


def busy(group: str, settings: KafkaSettings) -> QueueError:
    """The error for a group that has consumers."""
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
    """The partitions that are assigned to a member; none while the group rebalances."""
    return list(ConsumerProtocolMemberAssignment.decode(assignment).partitions()) if assignment else []
