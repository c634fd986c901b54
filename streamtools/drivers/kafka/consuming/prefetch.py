"""Prefetcher: moves fetched records from the library's buffers into ours, and pauses partitions that are full.

The library asks a broker for records of all its partitions with one request at a time, and a request for partitions
where nothing waits is answered late. It asks for the quiet ones when its buffer of a busy one was not emptied for a
moment, and the busy one then waits for that answer. So its buffers are emptied in time, and a partition is paused
only if handlers are slow, so that the others have their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from streamtools.drivers.kafka.client.consumers import ConsumerClient
from streamtools.drivers.kafka.client.fetched import FetchedBuffers
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, client_error
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.errors import StreamToolsError

#: Milliseconds that the library waits for records before other work is done here.
FETCH_MS: Final = 1000
#: Records of a partition that wait here, and bytes of them, from which on it is paused if handlers are slow.
HIGH: Final = 3000
HIGH_BYTES: Final = 4 * 1024 * 1024
#: Bytes of compressed batches that are being read, from which on no further partition's batch is unpacked.
UNPACKED: Final = 16 * 1024 * 1024
#: Records that wait in all; with fewer, the next are fetched at once.
LOW: Final = 1500
#: Seconds after which the library's buffer is emptied all the same.
PATIENCE: Final = 0.2


class Prefetcher:
    """Fills the `arrived` of each assigned partition.

    Parameters:
        member: whose partitions; it has joined.
        changed: called when something has arrived.
        failed: called with the error that ends the prefetching.
    """

    def __init__(
        self,
        member: GroupMember,
        client: ConsumerClient,
        *,
        changed: Callable[[], None],
        failed: Callable[[StreamToolsError], None],
    ) -> None:
        self._member = member
        self._client = client
        self._changed = changed
        self._failed = failed
        self._low = asyncio.Event()
        self._turn = 0
        client.read_busy_partitions_first()
        client.hand_over(FetchedBuffers)
        self._task = asyncio.create_task(self._run(), name="streamtools-prefetcher")

    async def stop(self) -> None:
        """End; what has arrived and was not handed over is not finished, and comes again."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # looked at: `failed` was called with it

    def ready(self) -> list[AssignedPartition]:
        """Partitions with records that have arrived; each time another one is the first."""
        ready = [partition for partition in self._member.partitions.values() if partition.arrived]
        if sum(partition.unpacked for partition in ready) >= UNPACKED:
            ready = [partition for partition in ready if partition.unpacked]
        if len(ready) > 1:
            self._turn = (self._turn + 1) % len(ready)
            ready = ready[self._turn :] + ready[: self._turn]
        return ready

    def taken(self) -> None:
        """Some records were taken: fetch more, if few are left."""
        self.pause_and_resume()
        if self._waiting() < LOW:
            self._low.set()

    def pause_and_resume(self, *, slow: bool = False) -> None:
        """Fetch no more of the partitions that are full.

        Parameters:
            slow: handlers are slow: a partition with many records is full, too.
        """
        consumer = self._member.consumer
        for partition in self._member.partitions.values():
            full = partition.metadata_full or partition.not_due.is_full
            if partition.paused:
                full = full or partition.waiting >= LOW
            elif slow:
                full = full or partition.waiting >= HIGH or partition.waiting_bytes >= HIGH_BYTES
            if full != partition.paused:
                partition.paused = full
                (consumer.pause if full else consumer.resume)(partition.place)

    def _waiting(self) -> int:
        return sum(partition.waiting for partition in self._member.partitions.values())

    async def _run(self) -> None:
        try:
            while True:
                fetched = await self._client.get_many(timeout_ms=FETCH_MS)
                for place, found in fetched.items():
                    partition = self._member.partitions.get(place)
                    if partition is not None and not partition.revoking:  # else its next owner reads it
                        partition.arrive(found)
                self._pass_over_markers()
                if not fetched:
                    if self._member.topic_changes.deleted:
                        self._client.look_for_topics()
                    continue
                self.pause_and_resume()
                self._changed()
                await self._wait_for_room()
        except CLIENT_ERRORS as error:
            self._failed(client_error(error, self._member.settings))
        except Exception as error:
            self._failed(client_error(error, self._member.settings))
            raise

    def _pass_over_markers(self) -> None:
        """The end of a transaction has an offset and is no message: no commit waits for it, and it is no lag."""
        for partition in self._member.partitions.values():
            if not (partition.arrived or partition.revoking):
                position = self._client.position(partition.place)
                partition.reach(position)
                if partition.offsets.pass_over(position):
                    self._member.commits.finished()

    async def _wait_for_room(self) -> None:
        if self._waiting() < LOW:
            return
        self._low.clear()
        if not await is_set_within(self._low, PATIENCE):
            self.pause_and_resume(slow=True)
