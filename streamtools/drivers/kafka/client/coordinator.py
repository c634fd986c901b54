"""Coordinator: what a member asks the coordinator of its group.

The client library (aiokafka 0.14) commits with whatever generation it has at that moment. A member that has lost its
place has generation -1, and with that Kafka takes every commit while the group has no members. So a commit here
names the place in the group that it is made for, and is refused once that place is lost.
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
class GroupPlace:
    """A member's place in its group, from one assignment of the partitions to the next.

    Attributes:
        generation: counts the assignments.
        member_id: the coordinator's name for the member.
    """

    generation: int
    member_id: str


class Coordinator:
    """Commits of a group, and this member's place in it.

    Parameters:
        consumer: the library's, whose `start()` is under way or done.
        static_id: the member's own name in the group; None without one.
        session_timeout: seconds after which the coordinator gives a silent member's partitions to others.
        fenced: called when another member has taken the static name over.
        doubted: called with True when the coordinator has been silent for `session_timeout`, also after the process
            itself was stopped; and with False when it has confirmed the membership again.
    """

    def __init__(
        self,
        consumer: Any,
        *,
        static_id: str | None,
        session_timeout: float,
        fenced: Callable[[], None],
        doubted: Callable[[bool], None],
    ) -> None:
        self._inner = inner = consumer._coordinator
        self._static_id = static_id
        self._session_timeout = session_timeout
        self._fenced = fenced
        self._doubted = doubted
        self._former_id = ""
        self._send = inner._send_req
        inner._send_req = self._send_request
        self._confirmed_at = time.monotonic()  # when the coordinator last said that we are in the group
        self._in_doubt = False
        self._look: asyncio.TimerHandle | None = None
        self._left = False

    @property
    def is_doubtful(self) -> bool:
        """The coordinator has been silent for so long that others may have our partitions: begin nothing more."""
        return time.monotonic() - self._confirmed_at >= self._session_timeout

    @property
    def place(self) -> GroupPlace | None:
        """This member's place now; None while it has none."""
        found = GroupPlace(self._inner.generation, self._inner.member_id)
        return found if found.generation >= 0 and found.member_id else None

    async def committed(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """What the group has committed, with its metadata; partitions without a commit are missing."""
        found: dict[TopicPartition, OffsetAndMetadata] = await self._inner.fetch_committed_offsets(list(partitions))
        return found

    async def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata], place: GroupPlace | None) -> None:
        """Commit as the holder of this place; tried again while the coordinator is away.

        Raises:
            CommitFailedError: the place is lost.
            UnknownTopicOrPartitionError: a topic was deleted. The next one of that name must not get this commit.
            KafkaError: the broker refuses it.
        """
        inner = self._inner
        while True:
            await inner.ensure_coordinator_known()
            try:
                async with inner._commit_lock:
                    if place is None or self.place != place:
                        raise kafka.CommitFailedError
                    # Shielded: the library expects an answer to each request, in the order of the requests.
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
        """All of these partitions exist, as far as is known."""
        cluster = self._inner._client.cluster
        return all(p.partition in (cluster.partitions_for_topic(p.topic) or ()) for p in partitions)

    async def leave(self) -> None:
        """Tell the coordinator that this member leaves, so that the others need not wait for it.

        Used where the library has not done so. While a member joins, its connection waits for the answer to that; so
        this goes over another one.
        """
        self._left = True
        if self._look is not None:
            self._look.cancel()
        inner = self._inner
        member_id, node = inner.member_id, inner.coordinator_id
        if self._static_id is not None or not member_id or node is None:
            return
        with suppress(*CLIENT_ERRORS):  # a TimeoutError is an OSError
            async with asyncio.timeout(DROP_TIMEOUT):
                await inner._client.send(node, LeaveGroupRequest(inner.group_id, member_id))

    async def _send_request(self, request: Any) -> Any:
        if isinstance(request, JoinGroupRequest):
            self._name_former_id(request)
        sent = time.monotonic()
        response = await self._send(request)
        code = getattr(response, "error_code", 0)
        if code == FENCED_INSTANCE_ID and self._static_id is not None:
            self._fenced()
        if isinstance(request, JoinGroupRequest):
            self._remember_id(code, response.member_id)
        if code == 0 and isinstance(request, HeartbeatRequest | SyncGroupRequest):
            # The answer to a SyncGroup waits for the other members, and confirms from its arrival on.
            self._confirmed_at = sent if isinstance(request, HeartbeatRequest) else time.monotonic()
            self._watch()
        return response

    def _watch(self) -> None:
        """Say when the membership becomes doubtful, and when it is no more so.

        In a process that was stopped for so long, the timer is due when it goes on: before the next handler begins.
        """
        if self._look is not None:
            self._look.cancel()
        if self._left:
            return
        if self.is_doubtful != self._in_doubt:
            self._in_doubt = not self._in_doubt
            self._doubted(self._in_doubt)
        if not self._in_doubt:
            loop, due = asyncio.get_running_loop(), self._confirmed_at + self._session_timeout
            self._look = loop.call_later(due - time.monotonic(), self._watch)

    def _name_former_id(self, request: Any) -> None:
        """With a static name, send the former member id: it alone shows whether another has taken the name over.

        The library forgets its member id as soon as the coordinator does not know it. Two members of one name would
        then push each other out for ever.
        """
        if self._static_id is not None and not request._member_id:
            request._member_id = self._former_id

    def _remember_id(self, code: int, member_id: str) -> None:
        if code == 0:
            self._former_id = member_id
        elif code == kafka.UnknownMemberIdError.errno:  # nobody has the name; it is ours again with a new id
            self._former_id = ""
