"""Membership in a group: which partitions are ours, since when, and what is committed of them.

A partition is ours from the moment when we have read what its group committed until the group is about to
share its partitions out anew. Then nothing more is begun; handlers at work have until a deadline; what is
finished is committed; and only then does the partition go. What is late was not committed, and comes again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import OffsetAndMetadata

from streamtools.drivers.kafka.client import CLOSE_TIMEOUT, connection, dropped, started, stopped
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, TROUBLE, client_error, plain
from streamtools.drivers.kafka.offsets import METADATA_LIMIT, Offsets
from streamtools.drivers.kafka.reach import Reach
from streamtools.drivers.kafka.track import Track
from streamtools.drivers.kafka.transactions import Identity, fence
from streamtools.errors import ConnectError, ConnectionLost, StreamToolsError
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

T = TypeVar("T")

#: Finished messages after which their offsets are committed at once, and seconds after which in any case.
COMMIT_COUNT: Final = 1000
COMMIT_AGE: Final = 0.2
#: Seconds beyond the deadline of handlers, for the commit and the way back into the group.
REJOIN: Final = 10.0
#: Seconds for handlers that were cancelled to end.
ABANDONED: Final = 1.0
#: Seconds after which a topic that the brokers do not know is one that was deleted, not one just made.
GONE: Final = 3.0
#: The metadata of the commit with which a member begins that was told where: others may be beginning, too.
BEGUN: Final = "begun"
#: The library would leave the group when nobody asks it for records for so long; handlers may take longer.
FOREVER_MS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How to be a member.

    Attributes:
        group: the group.
        topics: all of these.
        pattern: all topics whose whole name matches, besides; None for none.
        latest: a new group begins at the end.
        start_offset: a new group begins at this offset of each partition.
        start_time: a new group begins with what was written then, in seconds since the epoch.
        static_id: this member's name, by which it keeps its partitions over a restart.
        deadline: seconds for handlers at work when a partition is taken away.
        retry_topic: of which a new group has everything.
        exactly_once: offsets are committed by transactions, and by nothing else.
    """

    group: str
    topics: tuple[str, ...]
    retry_topic: str
    pattern: str | None = None
    latest: bool = False
    start_offset: int | None = None
    start_time: float | None = None
    static_id: str | None = None
    deadline: float = 30.0
    exactly_once: bool = False


class Membership:
    """One member of a group.

    Parameters:
        changed: called whenever a partition comes or goes, or the membership fails.
        drained: called before partitions go; returns once nothing of them is at work, or at the deadline.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        terms: Terms,
        client_id: str,
        *,
        changed: Callable[[], None],
        drained: Callable[[Collection[Track]], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._terms = terms
        self._client_id = client_id
        self._changed = changed
        self._drained = drained
        self._committing = asyncio.Lock()
        self._commit_now = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._committer: asyncio.Task[None] | None = None
        self._uncommitted = 0
        self._closing = False
        self._assigned = asyncio.Event()
        self._there: frozenset[TopicPartition] = frozenset()  # what there was when we first began
        #: The library's consumer.
        self.consumer: Any = None
        #: Its connections; None before `join`.
        self.reach: Reach | None = None
        #: The partitions that are ours.
        self.tracks: dict[TopicPartition, Track] = {}
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
        rebalance = self._terms.deadline + REJOIN
        timeout = max(self._settings.request_timeout, rebalance + REJOIN)  # joining takes as long as the slowest
        self.consumer = AIOKafkaConsumer(
            **await connection(self._settings, self._client_id, request_timeout=timeout),
            group_id=self._terms.group,
            group_instance_id=self._terms.static_id,
            enable_auto_commit=False,
            # Where what we want to read is gone, with the oldest there is: never past what was not seen.
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=int(1000 * self._settings.session_timeout),
            heartbeat_interval_ms=int(1000 * min(3.0, self._settings.session_timeout / 4)),
            rebalance_timeout_ms=int(1000 * rebalance),
            max_poll_interval_ms=FOREVER_MS,
        )
        self.reach = Reach(self.consumer._client, f"Group {self._terms.group}", self._settings)
        if self._terms.pattern is None:
            self.consumer.subscribe(list(self._terms.topics), listener=_Listener(self))
        else:
            self.consumer.subscribe(pattern=self._terms.pattern, listener=_Listener(self))
        timeout += self._settings.session_timeout
        await started(self.consumer, self._settings, timeout=timeout)
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
        except CLIENT_ERRORS as error:
            self.fail(client_error(error, self._settings))
        except StreamToolsError as error:
            self.fail(error)
        self._assigned.set()
        self._changed()

    async def _begin(self, assigned: list[TopicPartition]) -> None:
        self.consumer.pause(*assigned)  # nothing is read before we know where
        self._there = self._there or self._all_partitions()
        # What others have begun is ended first: else it could still change what is committed.
        identities = await self._fenced(assigned) if self._terms.exactly_once else {}
        committed = await self._read_committed(assigned)
        starts = await self._starts([p for p in assigned if p not in committed])
        tracks = {}
        exactly = self._settings if self._terms.exactly_once else None
        for partition in assigned:
            known = committed.get(partition)
            offset, metadata = (known.offset, known.metadata) if known else (starts[partition], "")
            tracks[partition] = Track(
                partition,
                Offsets(offset, metadata or ""),
                is_retry=partition.topic == self._terms.retry_topic,
                exactly=exactly,
                identity=identities.get(partition),
            )
            self.consumer.seek(partition, offset)
        if starts and self._chooses_start:
            # So that a member that dies before its first commit does not begin anew, and later.
            await self.consumer.commit({p: OffsetAndMetadata(offset, BEGUN) for p, offset in starts.items()})
        self.tracks = tracks
        self.consumer.resume(*assigned)

    async def _read_committed(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        # The library's own `committed()` keeps the metadata to itself.
        found: dict[TopicPartition, OffsetAndMetadata] = await self.consumer._coordinator.fetch_committed_offsets(
            partitions
        )
        return found

    async def _fenced(self, partitions: list[TopicPartition]) -> dict[TopicPartition, Identity]:
        client, limit = self.consumer._client, self._settings.session_timeout
        found = await asyncio.gather(*(fence(client, self.transactional_id(p), timeout=limit) for p in partitions))
        return dict(zip(partitions, found, strict=True))

    def transactional_id(self, partition: TopicPartition) -> str:
        """Of whoever has this partition for the group: one id for each, whoever it is."""
        return f"streamtools/{self._terms.group}/{partition.topic}/{partition.partition}"  # no name has a slash

    @property
    def _chooses_start(self) -> bool:
        terms = self._terms
        return terms.latest or terms.start_offset is not None or terms.start_time is not None

    async def _starts(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Where to begin with partitions of which the group has committed nothing."""
        if not partitions:
            return {}
        terms = self._terms
        starts: dict[TopicPartition, int] = await self._unless_gone(
            self.consumer.beginning_offsets(partitions), partitions
        )
        chosen = await self._chosen(partitions) if self._chooses_start else []
        if not chosen:
            return starts
        ends: dict[TopicPartition, int] = await self.consumer.end_offsets(chosen)
        if terms.start_time is not None:
            times = dict.fromkeys(chosen, int(terms.start_time * 1000))
            found = await self.consumer.offsets_for_times(times)
            return starts | {p: found[p].offset if found[p] is not None else ends[p] for p in chosen}
        if terms.start_offset is not None:
            return starts | {p: min(max(terms.start_offset, starts[p]), ends[p]) for p in chosen}
        return starts | ends

    async def _unless_gone(self, asking: Awaitable[T], partitions: Collection[TopicPartition]) -> T:
        """What the library answers; where a topic was deleted, it goes on asking for ever.

        Raises:
            ConnectionLost: a topic was deleted.
        """
        task = asyncio.ensure_future(asking)
        try:
            while not (await asyncio.wait({task}, timeout=GONE))[0]:
                if gone := sorted({p.topic for p in partitions} - self.consumer._client.cluster.topics()):
                    names = ", ".join(map(repr, gone))
                    raise ConnectionLost(f"{names} at {self._settings.safe_url} was deleted under its consumer.")
            return task.result()
        finally:
            task.cancel()

    async def _chosen(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """Those in which the group begins where it was told; one that came later is read from its beginning."""
        there = [p for p in partitions if p.topic != self._terms.retry_topic and p in self._there]
        old = await self._begun_before(there)
        return [p for p in there if p.topic not in old]

    def _all_partitions(self) -> frozenset[TopicPartition]:
        """Those of our topics, whoever has them."""
        known = ((topic, self.consumer.partitions_for_topic(topic)) for topic in self.consumer.subscription())
        return frozenset(TopicPartition(topic, number) for topic, numbers in known for number in numbers or ())

    async def _begun_before(self, partitions: list[TopicPartition]) -> set[str]:
        """Topics of which the group has others already: a partition without a commit was added since.

        What it holds was sent to the group while nobody had noticed, and must not be passed over.
        """
        siblings = [
            TopicPartition(topic, number)
            for topic in {p.topic for p in partitions}
            for number in self.consumer.partitions_for_topic(topic) or ()
        ]
        return {p.topic for p, at in (await self._read_committed(siblings)).items() if at.metadata != BEGUN}

    # --- going ------------------------------------------------------------------------------------

    async def revoked(self) -> None:
        """The group is about to share its partitions out anew: all of ours go first."""
        tracks = list(self.tracks.values())
        if tracks and not self._closing:
            try:
                await self._drained(tracks)
                await self.commit()
            except TROUBLE as error:
                log.warning("Group %s: not all that is finished could be committed: %s", self._terms.group, error)
        self._let_go()

    def _let_go(self) -> None:
        for track in self.tracks.values():
            track.gone = True
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
        consumer = self.consumer
        if consumer is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.commit()
        except TROUBLE as error:
            log.warning("Group %s: the last commit failed: %s", self._terms.group, plain(error))
        self._let_go()
        await stopped(consumer)
        await dropped(consumer)

    def restart(self, track: Track, record: Any) -> None:
        """Begin this partition anew with `record`: what its log held there before is no more."""
        offset = record.offset
        log.warning("%r: the log begins anew at offset %d.", track, offset)
        track.gone = True
        if self._terms.exactly_once and (track.settling or track.offsets.pending):
            # A transaction may be open; the next member ends it, and then nothing is at work.
            self.fail(ConnectionLost(f"The log of {track!r} begins anew; so do we."))
            return
        fresh = self.tracks[track.partition] = Track(
            track.partition, Offsets(offset), is_retry=track.is_retry, exactly=track.exactly, identity=track.identity
        )
        fresh.take_over(record, track)
        self._changed()

    def fail(self, error: StreamToolsError) -> None:
        """It is of no use any more; whoever receives is told."""
        self.failure = self.failure or error
        self._changed()

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
        if self._terms.exactly_once:
            return
        self._uncommitted += number
        if at_once or self._uncommitted >= COMMIT_COUNT:
            self._commit_now.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COMMIT_AGE, self._commit_now.set)

    async def _commit_routine(self) -> None:
        while True:
            await self._commit_now.wait()
            self._commit_now.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            try:
                await self.commit()
            except StreamToolsError as error:
                self.fail(error)
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

    async def _commit(self, tracks: Iterable[Track]) -> None:
        while True:
            taken = [(track, track.offsets.changes, *track.offsets.commit(self.limit)) for track in tracks]
            offsets = {t.partition: OffsetAndMetadata(at, text) for t, _, at, text, _ in taken}
            try:
                await self._unless_gone(self.consumer.commit(offsets), offsets)
            except StreamToolsError:
                raise
            except kafka.OffsetMetadataTooLargeError:
                self.limit //= 2
                log.warning(
                    "%s takes less metadata with a commit (offset.metadata.max.bytes) than usual; going on with %d.",
                    self._settings.safe_url,
                    self.limit,
                )
            except (kafka.CommitFailedError, kafka.IllegalStateError) as error:
                # Someone else has the partitions by now, and repeats what was not committed.
                log.info("Group %s: %s", self._terms.group, plain(error))
                return
            except CLIENT_ERRORS as error:
                raise client_error(error, self._settings) from error
            else:
                for track, changes, _, _, whole in taken:
                    track.offsets.committed(changes)
                    track.full = not whole
                self._changed()
                return


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # the library has no types
    """What the library calls; it logs what is raised here, and goes on."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._membership.revoked()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        await self._membership.assigned(assigned)
