"""Reading ahead of the handlers, without ever being in their way.

The library asks a broker for records of all its partitions with one request at a time, and a request for
partitions where nothing waits is answered late. It asks for the quiet ones when its buffer of a busy one was
not emptied for a moment, and the busy one then waits for that answer. So we empty its buffer into ours in
time, and only where handlers are slow is a partition paused, so that others have their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from streamtools.drivers.kafka.client.connect import get_many
from streamtools.drivers.kafka.client.fetched import Buffers
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, client_error
from streamtools.errors import StreamToolsError
from streamtools.settings import KafkaSettings

#: Milliseconds that the library waits for records before it looks around.
FETCH_MS: Final = 1000
#: Records of a partition that wait here, and bytes of them, from which on it is paused if handlers are slow.
HIGH: Final = 3000
HIGH_BYTES: Final = 4 * 1024 * 1024
#: Bytes of batches that were compressed and are being read, from which on no further partition's batch is unpacked.
UNPACKED: Final = 16 * 1024 * 1024
#: Records that wait in all; with fewer the next are fetched at once.
LOW: Final = 1500
#: Seconds after which the library's buffer is emptied even so.
PATIENCE: Final = 0.2
#: Seconds after which the library would ask on while a buffer is full.
LIBRARY_PATIENCE: Final = 2.0


class Prefetcher:
    """Fills the `arrived` of each track.

    Parameters:
        changed: called when something has arrived.
        failed: called with what ends it.
    """

    def __init__(
        self,
        membership: GroupMember,
        settings: KafkaSettings,
        *,
        changed: Callable[[], None],
        failed: Callable[[StreamToolsError], None],
    ) -> None:
        self._membership = membership
        self._settings = settings
        self._changed = changed
        self._failed = failed
        self._low = asyncio.Event()
        self._turn = 0
        fetcher = membership.consumer._fetcher
        fetcher._prefetch_backoff = LIBRARY_PATIENCE
        fetcher._records = Buffers(fetcher._records, membership.answers)
        self._task = asyncio.create_task(self._run(), name="streamtools-intake")

    async def stop(self) -> None:
        """End; what has arrived and was not handed over is not finished, and comes again."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # looked at: it was told to `failed`

    def tracks(self) -> list[AssignedPartition]:
        """Those with something to take; each time another one is the first."""
        ready = [track for track in self._membership.tracks.values() if track.arrived]
        if sum(track.unpacked for track in ready) >= UNPACKED:
            ready = [track for track in ready if track.unpacked]
        if len(ready) > 1:
            self._turn = (self._turn + 1) % len(ready)
            ready = ready[self._turn :] + ready[: self._turn]
        return ready

    def taken(self) -> None:
        """Something was taken: fetch more, if little is left."""
        self.pause_and_resume()
        if self._waiting() < LOW:
            self._low.set()

    def pause_and_resume(self, *, slow: bool = False) -> None:
        """Ask for no more of what has no room.

        Parameters:
            slow: what is here lasts for a while.
        """
        consumer = self._membership.consumer
        for track in self._membership.tracks.values():
            if track.paused:
                held_up = track.full or track.shelf_full or track.waiting >= LOW
            else:
                long = track.waiting >= HIGH or track.waiting_bytes >= HIGH_BYTES
                held_up = track.full or track.shelf_full or (slow and long)
            if held_up != track.paused:
                track.paused = held_up
                (consumer.pause if held_up else consumer.resume)(track.partition)

    def _waiting(self) -> int:
        return sum(track.waiting for track in self._membership.tracks.values())

    async def _run(self) -> None:
        try:
            while True:
                fetched = await get_many(self._membership.consumer, timeout_ms=FETCH_MS)
                for partition, found in fetched.items():
                    track = self._membership.tracks.get(partition)
                    if track is not None and not track.going:  # else whoever has it next reads it
                        track.arrive(found)
                self._pass_over_markers()
                if not fetched:
                    self._membership.subscribed.look(self._membership.consumer)
                    continue
                self.pause_and_resume()
                self._changed()
                await self._wait_for_room()
        except CLIENT_ERRORS as error:
            self._failed(client_error(error, self._settings))
        except Exception as error:
            self._failed(client_error(error, self._settings))
            raise

    def _pass_over_markers(self) -> None:
        """The end of a transaction has an offset and is no message: nobody is to wait for it, and no lag is left."""
        for track in self._membership.tracks.values():
            if not (track.arrived or track.going):
                position = self._membership.position(track.partition)
                track.reach(position)
                if track.offsets.pass_over(position):
                    self._membership.finished()

    async def _wait_for_room(self) -> None:
        if self._waiting() < LOW:
            return
        self._low.clear()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._low.wait()
        except TimeoutError:
            self.pause_and_resume(slow=True)
