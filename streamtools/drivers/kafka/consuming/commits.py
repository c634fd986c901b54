"""Committer: when finished offsets are committed, and what becomes of those that could not be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TYPE_CHECKING, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import OffsetAndMetadata

from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, client_error
from streamtools.drivers.kafka.offsets import METADATA_LIMIT, Run
from streamtools.errors import StreamToolsError

if TYPE_CHECKING:
    from streamtools.drivers.kafka.consuming.member import GroupMember

log: logging.Logger = logging.getLogger("streamtools")

#: Finished messages after which their offsets are committed at once, and seconds after which in any case.
COMMIT_COUNT: Final = 1000
COMMIT_AGE: Final = 0.2
#: Seconds after which a group with transactions commits that it has read past offsets that are no messages.
MARKER_AGE: Final = 1.0


class Committer:
    """Commits for one member of a group.

    With `exactly_once=True` transactions commit the messages; what is left for the Committer are offsets without one.

    Parameters:
        member: whose partitions these are.
        pass_over: commits, with `exactly_once=True`, that these partitions were read up to their positions.

    Attributes:
        limit: characters of a commit's metadata at most; halved when the broker takes less.
    """

    def __init__(
        self, member: GroupMember, pass_over: Callable[[Collection[AssignedPartition]], Awaitable[None]]
    ) -> None:
        self.limit: int = METADATA_LIMIT
        self._unconfirmed: dict[TopicPartition, tuple[int, list[Run]]] = {}
        self._member = member
        self._pass_over = pass_over
        self._lock = asyncio.Lock()
        self._now = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._uncommitted = 0

    def start(self) -> None:
        """Begin committing."""
        self._task = asyncio.create_task(self._run(), name="streamtools-commits")

    async def stop(self) -> None:
        """End; this commits nothing."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def finished(self, number: int = 1, *, at_once: bool = False) -> None:
        """So many more messages are finished: commit them soon.

        Parameters:
            at_once: something was sent for them, which a crash before the commit would send twice.
        """
        exactly_once = self._member.config.exactly_once
        self._uncommitted += number
        if not exactly_once and (at_once or self._uncommitted >= COMMIT_COUNT):
            self._now.set()
        elif self._timer is None:
            age = MARKER_AGE if exactly_once else COMMIT_AGE
            self._timer = asyncio.get_running_loop().call_later(age, self._now.set)

    async def _run(self) -> None:
        while True:
            await self._now.wait()
            self._now.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            try:
                if self._member.config.exactly_once:
                    await self._pass_over([p for p in self._member.partitions.values() if _is_idle(p)])
                else:
                    await self.commit()
            except Exception as error:  # there would be no further commit, and nobody would be told
                self._member.fail_by(error)
                return

    async def commit(self) -> None:
        """Commit what is finished now.

        Raises:
            ConnectionLost: it failed, though the partitions are still this member's.
        """
        if self._member.config.exactly_once:
            return
        async with self._lock:
            self._uncommitted = 0
            partitions = [p for p in self._member.partitions.values() if p.offsets.uncommitted]
            if partitions:
                await self._commit(partitions)

    async def _commit(self, partitions: Collection[AssignedPartition]) -> None:
        member = self._member
        while partitions:
            taken = [(p, p.offsets.changes, *p.offsets.commit(self.limit)) for p in partitions]
            offsets = {p.place: OffsetAndMetadata(at, metadata) for p, _, at, metadata, _ in taken}
            try:
                await member.unless_deleted(member.get_coordinator().commit(offsets, member.group_place), offsets)
            except StreamToolsError:
                raise
            except kafka.OffsetMetadataTooLargeError:
                self.limit //= 2
                log.warning(
                    "%s takes less metadata with a commit (offset.metadata.max.bytes) than usual; going on with %d.",
                    member.settings.safe_url,
                    self.limit,
                )
            except kafka.UnknownTopicOrPartitionError:
                # What is finished of a deleted topic can be committed nowhere; the topic is revoked soon.
                partitions = [p for p in partitions if member.get_coordinator().has([p.place])]
            except kafka.CommitFailedError:
                # Another member may have the partitions by now. What is finished is kept until they come back.
                log.warning(
                    "Group %s: this member has lost its place: it sent no heartbeat for session_timeout=%g s, or "
                    "took longer than revoke_timeout=%g s to let partitions go. It joins again; messages that it had "
                    "in hand may be handled twice.",
                    member.group,
                    member.settings.session_timeout,
                    member.config.revoke_timeout,
                )
                return
            except CLIENT_ERRORS as error:
                raise client_error(error, member.settings) from error
            else:
                for partition, changes, at, _, whole in taken:
                    partition.offsets.committed(changes)
                    partition.committed_offset = at
                    partition.metadata_full = not whole
                member.changed()
                return

    def keep_unconfirmed(self, partitions: Iterable[AssignedPartition]) -> None:
        """Remember what is finished of these revoked partitions and was not committed."""
        if not self._member.config.exactly_once:
            for partition in partitions:
                if partition.offsets.uncommitted:
                    self._unconfirmed[partition.place] = (partition.committed_offset, partition.offsets.finished)

    def take_unconfirmed(self, *, anew: Collection[str]) -> dict[TopicPartition, tuple[int, list[Run]]]:
        """What is remembered of partitions, once: the last committed offset and what is finished.

        Parameters:
            anew: topics that were made anew, of which nothing holds any more.
        """
        found, self._unconfirmed = self._unconfirmed, {}
        return {place: known for place, known in found.items() if place.topic not in anew}


def _is_idle(partition: AssignedPartition) -> bool:
    """It has something to commit, and no transaction is under way."""
    transactions = partition.transactions
    if partition.revoking or (transactions is not None and transactions.lock.locked()):
        return False
    return bool(partition.offsets.uncommitted)
