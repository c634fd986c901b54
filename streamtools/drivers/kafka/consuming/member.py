"""GroupMember: one membership in a group, from joining to leaving; which partitions it has, and since when.

A partition is this member's from the moment when it has read what its group has committed, until the group is about
to assign its partitions anew. Then no further message is handled; handlers at work have until a deadline; what is
finished is committed; and only then is the partition revoked. What finishes later was not committed, and is delivered
again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition

from streamtools.drivers.kafka.client.connect import CLOSE_TIMEOUT, connection, started, stopped
from streamtools.drivers.kafka.client.consumers import ConsumerClient
from streamtools.drivers.kafka.client.coordinator import Coordinator, GroupPlace
from streamtools.drivers.kafka.consuming import static_names
from streamtools.drivers.kafka.consuming.commits import Committer
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, PartitionTransactions
from streamtools.drivers.kafka.consuming.starts import Commits, StartOffsets
from streamtools.drivers.kafka.consuming.subscription import SubscriptionConfig
from streamtools.drivers.kafka.consuming.topic_changes import TopicChanges, restarted, unless_deleted
from streamtools.drivers.kafka.errors import TROUBLE, client_error, plain
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.producing.transactions import fence
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.errors import ConnectError, ConnectionLost, StreamToolsError
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

T = TypeVar("T")

#: Seconds beyond the deadline of handlers, for the commit and the way back into the group.
REJOIN: Final = 10.0
#: The library would leave the group when nobody asks it for records for so long; handlers may take longer.
FOREVER_MS: Final = 2**31 - 1


class GroupMember:
    """One member of a group.

    Parameters:
        settings: of the Kafka.
        config: how it joins.
        changed: called whenever a partition comes or goes, or the membership fails.
        drained: called before partitions are revoked; returns when nothing of them is at work, or at the deadline.
        passed_over: commits, with `exactly_once=True`, the positions of partitions without messages.
        doubted: called with True when others may have our partitions, and with False when they are surely ours again.
        topic_changes: what is known of the topics.

    Attributes:
        client: the library's consumer; None before `join`.
        coordinator: of the group; None before the first assignment.
        partitions: those that are assigned to this member.
        commits: commits what is finished.
        failure: why the membership has failed; None while it works.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        config: SubscriptionConfig,
        *,
        changed: Callable[[], None],
        drained: Callable[[Collection[AssignedPartition]], Awaitable[None]],
        passed_over: Callable[[Collection[AssignedPartition]], Awaitable[None]],
        doubted: Callable[[bool], None],
        topic_changes: TopicChanges,
    ) -> None:
        self.settings: KafkaSettings = settings
        self.config: SubscriptionConfig = config
        self.changed: Callable[[], None] = changed
        self._drained = drained
        self._doubted = doubted
        self.topic_changes: TopicChanges = topic_changes
        self.client: ConsumerClient | None = None
        self.coordinator: Coordinator | None = None
        self.partitions: dict[TopicPartition, AssignedPartition] = {}
        self.commits: Committer = Committer(self, passed_over)
        self.failure: StreamToolsError | None = None
        self.group_place: GroupPlace | None = None  # the place for which `partitions` are assigned
        self._assigned = asyncio.Event()
        self._static_name: str | None = None
        self._closing = False

    @property
    def group(self) -> str:
        """The group's name."""
        return self.config.group

    @property
    def consumer(self) -> Any:
        """The library's consumer."""
        assert self.client is not None
        return self.client.consumer

    @property
    def is_connected(self) -> bool:
        """A broker is connected, as far as is known."""
        return self.client is not None and self.client.is_connected

    @property
    def is_doubtful(self) -> bool:
        """The coordinator has been silent for so long that others may have our partitions: begin nothing more."""
        return self.coordinator is not None and self.coordinator.is_doubtful

    # --- joining ----------------------------------------------------------------------------------

    async def join(self, client_id: str) -> None:
        """Become a member; returns when the partitions are assigned and can be read.

        Raises:
            ConnectError: no broker lets us in.
        """
        config, settings = self.config, self.settings
        if config.static_id is not None:
            self._static_name = static_names.take(settings.safe_url, config.group, config.static_id)
        rebalance = config.revoke_timeout + REJOIN
        timeout = max(settings.request_timeout, rebalance + REJOIN)  # joining takes as long as the slowest member
        consumer = await self._new_consumer(client_id, rebalance, timeout)
        self.client = ConsumerClient(consumer, settings, f"Group {config.group}")
        topics = {"pattern": config.pattern} if config.pattern is not None else {"topics": list(config.topics)}
        consumer.subscribe(**topics, listener=_Listener(self))
        timeout += settings.session_timeout
        try:
            await started(consumer, settings, timeout=timeout, stop=self._drop)
        except StreamToolsError as error:
            raise self.failure or error from None
        # The library has started when it knows our partitions; we have when we know where to begin.
        if not await is_set_within(self._assigned, timeout):
            raise ConnectError(
                f"The group {config.group!r} at {settings.safe_url} gave us no partitions within {timeout:g} s."
            )
        self.commits.start()
        if self.failure is not None:
            raise self.failure

    async def _new_consumer(self, client_id: str, rebalance_timeout: float, request_timeout: float) -> Any:
        session_timeout = self.settings.session_timeout
        return AIOKafkaConsumer(
            **await connection(self.settings, client_id, request_timeout=request_timeout),
            group_id=self.group,
            group_instance_id=self._static_name,
            enable_auto_commit=False,
            # If what we want to read is deleted, begin with the oldest record: never after what nobody has seen.
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=int(1000 * session_timeout),
            heartbeat_interval_ms=int(1000 * min(3.0, session_timeout / 4)),
            rebalance_timeout_ms=int(1000 * rebalance_timeout),
            max_poll_interval_ms=FOREVER_MS,
        )

    def get_coordinator(self) -> Coordinator:
        """The group's coordinator."""
        if self.coordinator is None:
            self.coordinator = Coordinator(
                self.consumer,
                static_id=self._static_name,
                session_timeout=self.settings.session_timeout,
                fenced=self._name_taken,
                doubted=self._doubted,
            )
        return self.coordinator

    def _name_taken(self) -> None:
        name, group = self._static_name, self.group
        self.fail(
            ConnectError(
                f"Another consumer has joined the group {group!r} at {self.settings.safe_url} as {name!r}, so this "
                f"one has ended. Each process needs its own static_id=; the processes of `streamtools run --workers` "
                "get theirs by themselves.",
                permanent=True,
            )
        )

    # --- assignment -------------------------------------------------------------------------------

    async def assigned(self, places: Collection[TopicPartition]) -> None:
        """The group has assigned its partitions."""
        try:
            await self._begin(sorted(places))
        except Exception as error:  # the library would log it, and go on with partitions that nobody reads
            self.fail_by(error)
        self._assigned.set()
        self.changed()

    async def _begin(self, places: list[TopicPartition]) -> None:
        self.consumer.pause(*places)  # nothing is read before we know where to begin
        anew = self.topic_changes.compare(self.consumer)
        coordinator = self.get_coordinator()
        self.group_place = coordinator.place
        # What the former owners have begun is ended first: else it could still change what is committed.
        transactions = await self._fence(places) if self.config.exactly_once else {}
        begins = await self._begins(places, anew)
        unconfirmed = self.commits.take_unconfirmed(anew=anew)
        partitions = {}
        for place in places:
            offset, metadata = begins[place].offset, begins[place].metadata or ""
            committed, finished = unconfirmed.get(place, (0, []))
            partitions[place] = AssignedPartition(
                place,
                # If an operator has moved the group backwards, what was finished is to be done again.
                Offsets(offset, metadata, finished=finished if committed <= offset else ()),
                is_retry=place.topic == self.config.retry_topic,
                transactions=transactions.get(place),
            )
            self.consumer.seek(place, offset)
        self.partitions = partitions
        self.consumer.resume(*places)

    async def _begins(self, places: list[TopicPartition], anew: Collection[str]) -> dict[TopicPartition, Any]:
        """The commit of each partition, or where to begin without one.

        Parameters:
            anew: topics that were made anew: a commit there may be of the topic before.
        """
        coordinator = self.get_coordinator()

        async def commit(offsets: Commits) -> None:
            await coordinator.commit(offsets, self.group_place)

        starts = StartOffsets(
            self.consumer, self.config.start, retry_topic=self.config.retry_topic, committed=coordinator.committed,
            commit=commit,
        )  # fmt: skip
        known = await coordinator.committed([p for p in places if p.topic not in anew])
        if begun := [p for p in places if p.topic in anew]:
            known |= await self.unless_deleted(starts.beginnings(begun), begun)
        if missing := [p for p in places if p not in known]:
            known |= await self.unless_deleted(starts.find(missing), missing)
        return known

    async def _fence(self, places: list[TopicPartition]) -> dict[TopicPartition, PartitionTransactions]:
        """Take over the transactional ids of these partitions from their former owners."""
        assert self.client is not None
        client, limit = self.client.client, self.settings.session_timeout
        found = await asyncio.gather(*(fence(client, self.transactional_id(p), timeout=limit) for p in places))
        return {p: PartitionTransactions(self.settings, identity) for p, identity in zip(places, found, strict=True)}

    def transactional_id(self, place: TopicPartition) -> str:
        """The transactional id of a partition in this group; it is the same for every owner of the partition."""
        return f"streamtools/{self.group}/{place.topic}/{place.partition}"  # no name has a slash

    async def unless_deleted(self, asking: Awaitable[T], places: Collection[TopicPartition]) -> T:
        """The library's answer about these partitions.

        Raises:
            ConnectionLost: a topic was deleted.
        """
        assert self.client is not None
        return await unless_deleted(asking, places, self.client.cluster, self.settings)

    def restart(self, partition: AssignedPartition, record: Any) -> None:
        """Rare: the log of a partition was cut, and begins anew with `record`."""
        fresh = restarted(partition, record)
        if self.config.exactly_once and (partition.settling or partition.offsets.pending):
            # A transaction may be open; the next membership ends it, and then nothing is at work.
            self.fail(ConnectionLost(f"The log of {partition!r} begins anew; so do we."))
            return
        fresh.take_over(record, partition)
        self.partitions[partition.place] = fresh
        self.changed()

    # --- revocation, and the end ------------------------------------------------------------------

    async def revoked(self) -> None:
        """The group is about to assign its partitions anew: all of ours are revoked before that."""
        self._assigned.clear()
        partitions = list(self.partitions.values())
        if partitions and not self._closing:
            try:
                await self._drained(partitions)
                await self.commits.commit()
            except Exception as error:  # the partitions are revoked in any case
                log.warning("Group %s: not all that is finished could be committed: %s", self.group, error)
        self._let_go()

    def _let_go(self) -> None:
        self.commits.keep_unconfirmed(self.partitions.values())
        for partition in self.partitions.values():
            partition.revoked = True
            for delivery in partition.in_hand:
                delivery.withdraw()
        self.partitions = {}
        self.changed()

    async def leave(self) -> None:
        """Commit what is finished, and leave the group."""
        self._closing = True
        self.changed()
        await self.commits.stop()
        if self.client is not None:
            await self._go(self.client)
        if self._static_name is not None:
            static_names.release(self.settings.safe_url, self.group, self._static_name)

    async def _go(self, client: ConsumerClient) -> None:
        # It waits neither for a broker that is away, nor for the members that the coordinator waits for meanwhile.
        is_reached = client.is_connected
        client.close_unread()
        if self.group_place is not None and is_reached:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self.commits.commit()
            except TROUBLE as error:
                log.warning("Group %s: the last commit failed: %s", self.group, plain(error))
        self._let_go()
        if self._assigned.is_set() and is_reached:
            await stopped(client.consumer)
        await self._drop()

    async def _drop(self) -> None:
        """End the library's consumer, whatever state it is in."""
        if self.coordinator is not None:
            await self.coordinator.leave()
        if self.client is not None:
            await self.client.drop()

    def fail(self, error: StreamToolsError) -> None:
        """The membership has failed; whoever receives gets the error."""
        self.failure = self.failure or error
        self.changed()

    def fail_by(self, error: Exception) -> None:
        """The same, by any error."""
        failure = client_error(error, self.settings)
        if failure is not error:
            failure.__cause__ = error
        if not isinstance(error, TROUBLE):
            log.error("Group %s: %s", self.group, failure, exc_info=error)
        self.fail(failure)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # the library has no types
    """What the library calls; it logs what is raised here, and goes on."""

    def __init__(self, member: GroupMember) -> None:
        self._member = member

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self._member.get_coordinator()  # before the library joins the group
        await self._member.revoked()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        await self._member.assigned(assigned)
