"""GroupMember in a group: which partitions are ours, since when, and what is committed of them.

A partition is ours from the moment when we have read what its group committed until the group is about to
share its partitions out anew. Then nothing more is begun; handlers at work have until a deadline; what is
finished is committed; and only then does the partition go. What is late was not committed, and comes again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import OffsetAndMetadata

from streamtools.drivers.kafka.client.batches import Answers
from streamtools.drivers.kafka.client.connect import CLOSE_TIMEOUT, connection, drop_unread, dropped, started, stopped
from streamtools.drivers.kafka.client.coordinator import Coordinator, Place
from streamtools.drivers.kafka.client.monitor import ConnectionMonitor
from streamtools.drivers.kafka.consuming import static_names
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.consuming.starts import Commits, StartOffsets
from streamtools.drivers.kafka.consuming.subscription import SubscriptionConfig
from streamtools.drivers.kafka.consuming.topic_changes import TopicChanges
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, TROUBLE, client_error, plain
from streamtools.drivers.kafka.offsets import METADATA_LIMIT, Offsets, Run
from streamtools.drivers.kafka.producing.transactions import Identity, fence
from streamtools.errors import ConnectError, ConnectionLost, StreamToolsError
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

T = TypeVar("T")

#: Finished messages after which their offsets are committed at once, and seconds after which in any case.
COMMIT_COUNT: Final = 1000
COMMIT_AGE: Final = 0.2
#: Seconds after which a group with transactions commits that it has read past what is no message.
MARKER_AGE: Final = 1.0
#: Seconds beyond the deadline of handlers, for the commit and the way back into the group.
REJOIN: Final = 10.0
#: Seconds for handlers that were cancelled to end.
ABANDONED: Final = 1.0
#: Seconds after which a topic that the brokers do not know is one that was deleted, not one just made.
GONE: Final = 3.0
#: The library would leave the group when nobody asks it for records for so long; handlers may take longer.
FOREVER_MS: Final = 2**31 - 1


class GroupMember:
    """One member of a group.

    Parameters:
        changed: called whenever a partition comes or goes, or the membership fails.
        drained: called before partitions go; returns once nothing of them is at work, or at the deadline.
        passed_over: commits, with exactly_once, what is finished of these partitions without a message being handled.
        subscribed: what is known of the topics.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        terms: SubscriptionConfig,
        client_id: str,
        *,
        changed: Callable[[], None],
        drained: Callable[[Collection[AssignedPartition]], Awaitable[None]],
        passed_over: Callable[[Collection[AssignedPartition]], Awaitable[None]],
        subscribed: TopicChanges,
    ) -> None:
        #: What is known of the topics.
        self.subscribed: TopicChanges = subscribed
        self._settings = settings
        self._terms = terms
        self._client_id = client_id
        self._changed = changed
        self._drained = drained
        self._passed_over = passed_over
        self._committing = asyncio.Lock()
        self._commit_now = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._committer: asyncio.Task[None] | None = None
        self._uncommitted = 0
        self._closing = False
        self._assigned = asyncio.Event()
        self._place: Place | None = None  # that for which our partitions are ours
        self._static_name: str | None = None
        self._doubted = False
        #: Of each partition that we had, what was committed, and what we have finished and could not commit.
        self.unconfirmed: dict[TopicPartition, tuple[int, list[Run]]] = {}
        #: The group's coordinator; None before the first partitions are shared out.
        self.coordinator: Coordinator | None = None
        #: The library's consumer.
        self.consumer: Any = None
        #: Its connections; None before `join`.
        self.reach: ConnectionMonitor | None = None
        self.answers: Answers
        #: The partitions that are ours.
        self.tracks: dict[TopicPartition, AssignedPartition] = {}
        #: The group's name.
        self.group: str = terms.group
        #: Characters of a commit's metadata at most.
        self.limit: int = METADATA_LIMIT
        #: Why the membership is of no use any more.
        self.failure: StreamToolsError | None = None

    # --- coming -----------------------------------------------------------------------------------

    async def join(self) -> None:
        """Become a member; returns when the partitions are shared out and ours can be read.

        Raises:
            ConnectError: no broker lets us in.
        """
        terms = self._terms
        if terms.static_id is not None:
            self._static_name = static_names.take(self._settings.safe_url, terms.group, terms.static_id)
        rebalance = terms.deadline + REJOIN
        timeout = max(self._settings.request_timeout, rebalance + REJOIN)  # joining takes as long as the slowest
        self.consumer = AIOKafkaConsumer(
            **await connection(self._settings, self._client_id, request_timeout=timeout),
            group_id=self._terms.group,
            group_instance_id=self._static_name,
            enable_auto_commit=False,
            # Where what we want to read is gone, with the oldest there is: never past what was not seen.
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=int(1000 * self._settings.session_timeout),
            heartbeat_interval_ms=int(1000 * min(3.0, self._settings.session_timeout / 4)),
            rebalance_timeout_ms=int(1000 * rebalance),
            max_poll_interval_ms=FOREVER_MS,
        )
        self.answers = Answers(self.consumer._client)
        self.reach = ConnectionMonitor(self.consumer._client, f"Group {self._terms.group}", self._settings)
        if self._terms.pattern is None:
            self.consumer.subscribe(list(self._terms.topics), listener=_Listener(self))
        else:
            self.consumer.subscribe(pattern=self._terms.pattern, listener=_Listener(self))
        timeout += self._settings.session_timeout
        try:
            await started(self.consumer, self._settings, timeout=timeout, stop=self._drop)
        except StreamToolsError as error:
            raise self.failure or error from None
        # The library is content once it knows our partitions; we are when we know where to begin.
        try:
            async with asyncio.timeout(timeout):
                await self._assigned.wait()
        except TimeoutError as error:
            raise ConnectError(
                f"The group {self._terms.group!r} at {self._settings.safe_url} gave us no partitions within "
                f"{timeout:g} s."
            ) from error
        self._committer = asyncio.create_task(self._commit_routine(), name="streamtools-commits")
        if self.failure is not None:
            raise self.failure

    async def assigned(self, assigned: Collection[TopicPartition]) -> None:
        """The group has shared its partitions out."""
        try:
            await self._begin(sorted(assigned))
        except Exception as error:  # the library would log it, and go on with partitions that nobody reads
            self._fail_by(error)
        self._assigned.set()
        self._changed()

    async def _begin(self, assigned: list[TopicPartition]) -> None:
        self.consumer.pause(*assigned)  # nothing is read before we know where
        anew = self.subscribed.compare(self.consumer)
        coordinator = self._get_coordinator()
        self._place = coordinator.place
        # What others have begun is ended first: else it could still change what is committed.
        identities = await self._fenced(assigned) if self._terms.exactly_once else {}
        known = await coordinator.committed([p for p in assigned if p.topic not in anew])
        if begun := [p for p in assigned if p.topic in anew]:  # a commit there may be of the topic before
            known |= await self.unless_gone(self._starts(coordinator).beginnings(begun), begun)
        if missing := [p for p in assigned if p not in known]:
            known |= await self.unless_gone(self._starts(coordinator).find(missing), missing)
        unconfirmed = {p: found for p, found in self.unconfirmed.items() if p.topic not in anew}
        self.unconfirmed = {}
        tracks = {}
        exactly = self._settings if self._terms.exactly_once else None
        for partition in assigned:
            offset, metadata = known[partition].offset, known[partition].metadata or ""
            kept, finished = unconfirmed.get(partition, (0, []))
            tracks[partition] = AssignedPartition(
                partition,
                # Moved backwards by an operator, what was finished is to be done again.
                Offsets(offset, metadata, finished=finished if kept <= offset else ()),
                is_retry=partition.topic == self._terms.retry_topic,
                exactly=exactly,
                identity=identities.get(partition),
            )
            self.consumer.seek(partition, offset)
        self.tracks = tracks
        self.consumer.resume(*assigned)

    def _get_coordinator(self) -> Coordinator:
        if self.coordinator is None:
            self.coordinator = Coordinator(
                self.consumer, static_id=self._static_name, fenced=self._name_taken, confirmed=self._confirmed
            )
        return self.coordinator

    def _starts(self, coordinator: Coordinator) -> StartOffsets:
        async def commit(offsets: Commits) -> None:
            await coordinator.commit(offsets, self._place)

        terms = self._terms
        return StartOffsets(
            self.consumer, terms.start, retry_topic=terms.retry_topic, committed=coordinator.committed, commit=commit
        )

    async def _fenced(self, partitions: list[TopicPartition]) -> dict[TopicPartition, Identity]:
        client, limit = self.consumer._client, self._settings.session_timeout
        found = await asyncio.gather(*(fence(client, self.transactional_id(p), timeout=limit) for p in partitions))
        return dict(zip(partitions, found, strict=True))

    def transactional_id(self, partition: TopicPartition) -> str:
        """Of whoever has this partition for the group: one id for each, whoever it is."""
        return f"streamtools/{self._terms.group}/{partition.topic}/{partition.partition}"  # no name has a slash

    async def unless_gone(self, asking: Awaitable[T], partitions: Collection[TopicPartition]) -> T:
        """What the library answers; where a partition is not there any more, it goes on asking for ever.

        Raises:
            ConnectionLost: a topic was deleted, and may have been made anew with fewer partitions.
        """
        task = asyncio.ensure_future(asking)
        try:
            while not (await asyncio.wait({task}, timeout=GONE))[0]:
                there = self.consumer._client.cluster.partitions_for_topic
                if gone := {p.topic for p in partitions if p.partition not in (there(p.topic) or ())}:
                    names = ", ".join(map(repr, sorted(gone)))
                    raise ConnectionLost(f"{names} at {self._settings.safe_url} was deleted under its consumer.")
            return task.result()
        finally:
            task.cancel()

    # --- being a member ---------------------------------------------------------------------------

    @property
    def is_doubtful(self) -> bool:
        """The coordinator has not answered for so long that others may have our partitions; begin nothing more."""
        coordinator = self.coordinator
        if coordinator is None:
            return False
        self._doubted = time.monotonic() - coordinator.confirmed_at > self._settings.session_timeout
        return self._doubted

    def _confirmed(self) -> None:
        if self._doubted:
            self._doubted = False
            self._changed()

    def _name_taken(self) -> None:
        name, group = self._static_name, self._terms.group
        self.fail(
            ConnectError(
                f"Another consumer has joined the group {group!r} at {self._settings.safe_url} as {name!r}, so this "
                f"one has ended. Each process needs its own static_id=; the processes of `streamtools run --workers` "
                "get theirs by themselves.",
                permanent=True,
            )
        )

    # --- going ------------------------------------------------------------------------------------

    async def revoked(self) -> None:
        """The group is about to share its partitions out anew: all of ours go first."""
        self._assigned.clear()
        tracks = list(self.tracks.values())
        if tracks and not self._closing:
            try:
                await self._drained(tracks)
                await self.commit()
            except Exception as error:  # the partitions go in any case
                log.warning("Group %s: not all that is finished could be committed: %s", self._terms.group, error)
        self._let_go()

    def _let_go(self) -> None:
        for track in self.tracks.values():
            track.gone = True
            if track.offsets.uncommitted and not self._terms.exactly_once:
                self.unconfirmed[track.partition] = (track.kept, track.offsets.finished)
            for delivery in track.in_hand:
                delivery.withdraw()
        self.tracks = {}
        self._changed()

    async def leave(self) -> None:
        """Commit what is finished, and leave the group."""
        self._closing = True
        self._changed()
        if self._timer is not None:
            self._timer.cancel()
        if self._committer is not None:
            self._committer.cancel()
            await asyncio.wait({self._committer})
        if self.consumer is not None:
            await self._go()
        if self._static_name is not None:
            static_names.release(self._settings.safe_url, self._terms.group, self._static_name)

    async def _go(self) -> None:
        # A broker that is away is not waited for, and neither are the members whom a member that joins waits for.
        is_reached = self.reach is not None and self.reach.up
        drop_unread(self.consumer)
        if self._place is not None and is_reached:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self.commit()
            except TROUBLE as error:
                log.warning("Group %s: the last commit failed: %s", self._terms.group, plain(error))
        self._let_go()
        if self._assigned.is_set() and is_reached:
            await stopped(self.consumer)
        await self._drop()

    async def _drop(self) -> None:
        """End the library's consumer, wherever it is."""
        if self.coordinator is not None:
            await self.coordinator.leave()
        await dropped(self.consumer)

    def restart(self, track: AssignedPartition, record: Any) -> None:
        """Begin this partition anew with `record`: what its log held there before is no more."""
        offset = record.offset
        log.warning(
            "The log of topic %r, partition %d, was cut or made anew: offset %d no longer exists. Going on at %d.",
            *track.partition,
            track.offsets.next,
            offset,
        )
        track.gone = True
        if self._terms.exactly_once and (track.settling or track.offsets.pending):
            # A transaction may be open; the next member ends it, and then nothing is at work.
            self.fail(ConnectionLost(f"The log of {track!r} begins anew; so do we."))
            return
        fresh = self.tracks[track.partition] = AssignedPartition(
            track.partition, Offsets(offset), is_retry=track.is_retry, exactly=track.exactly, identity=track.identity
        )
        fresh.take_over(record, track)
        self._changed()

    def fail(self, error: StreamToolsError) -> None:
        """It is of no use any more; whoever receives is told."""
        self.failure = self.failure or error
        self._changed()

    def _fail_by(self, error: Exception) -> None:
        failure = client_error(error, self._settings)
        if failure is not error:
            failure.__cause__ = error
        if not isinstance(error, TROUBLE):
            log.error("Group %s: %s", self._terms.group, failure, exc_info=error)
        self.fail(failure)

    def position(self, partition: TopicPartition) -> int:
        """The next offset that the library hands over; 0 where it does not know yet."""
        subscription = self.consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None or partition not in assignment.tps:
            return 0
        state = assignment.state_value(partition)
        return int(state.position) if state.has_valid_position else 0

    # --- committing -------------------------------------------------------------------------------

    def finished(self, number: int = 1, *, at_once: bool = False) -> None:
        """So many messages more are finished: commit them soon.

        Parameters:
            at_once: something was sent for them; a crash before the commit would send it twice.
        """
        exactly = self._terms.exactly_once  # then transactions commit the messages, and here is left what is none
        self._uncommitted += number
        if not exactly and (at_once or self._uncommitted >= COMMIT_COUNT):
            self._commit_now.set()
        elif self._timer is None:
            age = MARKER_AGE if exactly else COMMIT_AGE
            self._timer = asyncio.get_running_loop().call_later(age, self._commit_now.set)

    async def _commit_routine(self) -> None:
        while True:
            await self._commit_now.wait()
            self._commit_now.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            try:
                if self._terms.exactly_once:
                    await self._passed_over(
                        [
                            t
                            for t in self.tracks.values()
                            if t.offsets.uncommitted and not (t.going or t.lock.locked())
                        ]
                    )
                else:
                    await self.commit()
            except Exception as error:  # there would be no further commit, and nobody would be told
                self._fail_by(error)
                return

    async def commit(self) -> None:
        """Commit what is finished now.

        Raises:
            ConnectionLost: it failed, and not because the partition is someone else's by now.
        """
        if self._terms.exactly_once:
            return
        async with self._committing:
            self._uncommitted = 0
            tracks = [t for t in self.tracks.values() if t.offsets.uncommitted]
            if tracks:
                await self._commit(tracks)

    async def _commit(self, tracks: Collection[AssignedPartition]) -> None:
        while True:
            taken = [(track, track.offsets.changes, *track.offsets.commit(self.limit)) for track in tracks]
            offsets = {t.partition: OffsetAndMetadata(at, text) for t, _, at, text, _ in taken}
            try:
                await self.unless_gone(self._get_coordinator().commit(offsets, self._place), offsets)
            except StreamToolsError:
                raise
            except kafka.OffsetMetadataTooLargeError:
                self.limit //= 2
                log.warning(
                    "%s takes less metadata with a commit (offset.metadata.max.bytes) than usual; going on with %d.",
                    self._settings.safe_url,
                    self.limit,
                )
            except kafka.UnknownTopicOrPartitionError:
                # What was finished of a topic that was deleted is to be committed nowhere; it is let go of soon.
                tracks = [track for track in tracks if self._get_coordinator().has([track.partition])]
                if not tracks:
                    return
            except kafka.CommitFailedError:
                # Someone else may have the partitions by now. What is finished is told when we have them again.
                log.warning(
                    "Group %s: this member has lost its place: it sent no heartbeat for session_timeout=%g s, or "
                    "took longer than revoke_timeout=%g s to let partitions go. It joins again; messages that it had "
                    "in hand may be handled twice.",
                    self._terms.group,
                    self._settings.session_timeout,
                    self._terms.deadline,
                )
                return
            except CLIENT_ERRORS as error:
                raise client_error(error, self._settings) from error
            else:
                for track, changes, at, _, whole in taken:
                    track.offsets.committed(changes)
                    track.kept = at
                    track.full = not whole
                self._changed()
                return


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # the library has no types
    """What the library calls; it logs what is raised here, and goes on."""

    def __init__(self, membership: GroupMember) -> None:
        self._membership = membership

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self._membership._get_coordinator()  # before the library joins the group
        await self._membership.revoked()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        await self._membership.assigned(assigned)
