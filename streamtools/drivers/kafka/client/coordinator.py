"""Coordinator: what a member asks its group's coordinator. All private names of the library's group side stand here.

The library (aiokafka 0.14) commits with whatever generation it has at that moment. A member that has lost its place
has generation -1, with which Kafka takes every commit while the group has no members. So a commit here names the
place in the group for which it is made, and is refused where that is no longer ours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest, LeaveGroupRequest, SyncGroupRequest
from aiokafka.structs import OffsetAndMetadata

from streamtools.drivers.kafka.client.connect import BACKOFF, DROP_TIMEOUT
from streamtools.drivers.kafka.errors import CLIENT_ERRORS

#: The broker's answer to a member whose `static_id` another member has taken over (KIP-345); unknown to the library.
FENCED_INSTANCE_ID: Final = 82


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a group, from one sharing out of the partitions until the next.

    Attributes:
        generation: counts how often the partitions were shared out.
        member_id: as the coordinator calls us.
    """

    generation: int
    member_id: str


class Coordinator:
    """Commits of a group, and our place in it.

    Parameters:
        consumer: the library's, whose `start()` is under way or done.
        static_id: our name in the group; None without one.
        fenced: called when another member has taken this name over.
        confirmed: called when the coordinator says that we are in the group.
    """

    def __init__(
        self, consumer: Any, *, static_id: str | None, fenced: Callable[[], None], confirmed: Callable[[], None]
    ) -> None:
        self._inner = inner = consumer._coordinator
        self._static_id = static_id
        self._fenced = fenced
        self._confirmed = confirmed
        self._former_id = ""
        self._send = inner._send_req
        inner._send_req = self._send_request
        #: When the coordinator last said that we are in the group, by `time.monotonic()`.
        self.confirmed_at: float = time.monotonic()

    @property
    def place(self) -> Place | None:
        """Ours now; None while we have none."""
        found = Place(self._inner.generation, self._inner.member_id)
        return found if found.generation >= 0 and found.member_id else None

    async def committed(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """What the group has committed, with its metadata; partitions without a commit are missing."""
        found: dict[TopicPartition, OffsetAndMetadata] = await self._inner.fetch_committed_offsets(list(partitions))
        return found

    async def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata], place: Place | None) -> None:
        """Commit, as the holder of this place; tried again while the coordinator is away.

        Raises:
            CommitFailedError: the place is not ours any more.
            UnknownTopicOrPartitionError: a topic was deleted. The next one of that name is not to have this commit.
            KafkaError: the broker refuses it.
        """
        inner = self._inner
        while True:
            await inner.ensure_coordinator_known()
            try:
                async with inner._commit_lock:
                    if place is None or self.place != place:
                        raise kafka.CommitFailedError
                    # Shielded: the library counts on an answer to each request in its turn.
                    await asyncio.shield(inner._do_commit_offsets(None, offsets))
            except (
                kafka.UnknownMemberIdError,
                kafka.IllegalGenerationError,
                kafka.RebalanceInProgressError,
            ) as error:
                raise kafka.CommitFailedError from error
            except kafka.KafkaError as error:
                if not error.retriable or (
                    isinstance(error, kafka.UnknownTopicOrPartitionError) and not self.has(offsets)
                ):
                    raise
                await asyncio.sleep(BACKOFF / 1000)
            else:
                return

    def has(self, partitions: Collection[TopicPartition]) -> bool:
        """All of them exist, as far as is known."""
        cluster = self._inner._client.cluster
        return all(p.partition in (cluster.partitions_for_topic(p.topic) or ()) for p in partitions)

    async def leave(self) -> None:
        """Tell the coordinator that we go, where the library has not done so; others then need not wait for us.

        While we join, our connection waits for the answer to that; so this goes over another one.
        """
        inner = self._inner
        member_id, node = inner.member_id, inner.coordinator_id
        if self._static_id is not None or not member_id or node is None:
            return
        with suppress(*CLIENT_ERRORS):  # a TimeoutError is an OSError
            async with asyncio.timeout(DROP_TIMEOUT):
                await inner._client.send(node, LeaveGroupRequest(inner.group_id, member_id))

    async def _send_request(self, request: Any) -> Any:
        if isinstance(request, JoinGroupRequest):
            self._introduce(request)
        sent = time.monotonic()
        response = await self._send(request)
        code = getattr(response, "error_code", 0)
        if code == FENCED_INSTANCE_ID and self._static_id is not None:
            self._fenced()
        if isinstance(request, JoinGroupRequest):
            self._remember(code, response.member_id)
        if code == 0 and isinstance(request, HeartbeatRequest | SyncGroupRequest):
            # It waits with a SyncGroup for others, and counts from its answer on.
            self.confirmed_at = sent if isinstance(request, HeartbeatRequest) else time.monotonic()
            self._confirmed()
        return response

    def _introduce(self, request: Any) -> None:
        """With a static name, say who we were: that alone tells whether another has taken the name over.

        The library forgets its member id as soon as the coordinator does not know it. Two members of one name would
        then push each other out without end.
        """
        if self._static_id is not None and not request._member_id:
            request._member_id = self._former_id

    def _remember(self, code: int, member_id: str) -> None:
        if code == 0:
            self._former_id = member_id
        elif code == kafka.UnknownMemberIdError.errno:  # nobody has the name; it is ours again by a new id
            self._former_id = ""
