"""Settler: performs settlements, and waits for the handlers of partitions that are about to be revoked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Final, cast

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.consuming.delays import Delays
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, KafkaDelivery, delivery_of
from streamtools.drivers.kafka.consuming.retries import Reject, RetryPublisher
from streamtools.errors import ConnectionLost, QueueError

#: Seconds for handlers that were cancelled to end.
ABANDONED: Final = 1.0


class Settler:
    """Settles the deliveries of one membership.

    Parameters:
        publisher: sends what settlements send.
        delays: of the same membership.
        changed: called when a delivery is given back.
        by_hand: tells whether deliveries are settled by the user's code, and not by a handler's end.

    Attributes:
        returned: deliveries that were given back, to be handed over again.
    """

    def __init__(
        self,
        member: GroupMember,
        publisher: RetryPublisher,
        delays: Delays,
        *,
        changed: Callable[[], None],
        by_hand: Callable[[], bool],
    ) -> None:
        self.returned: list[KafkaDelivery] = []
        self._member = member
        self._publisher = publisher
        self._delays = delays
        self._changed = changed
        self._by_hand = by_hand
        self._settled = asyncio.Event()
        self._closed = False

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Finish these."""
        number = 0
        for delivery in cast(Sequence[KafkaDelivery], deliveries):
            partition = delivery.partition
            if not partition.revoked and partition.offsets.finish(delivery.offset, delivery):
                number += 1
        self._finished(number)

    def finish(self, settlements: Sequence[Settlement]) -> None:
        """Perform settlements that send nothing: no request is needed."""
        number = 0
        for settlement in settlements:
            delivery = delivery_of(settlement)
            partition = delivery.partition
            if not settlement.verdict.kind.gives_back:
                if not partition.revoked and partition.offsets.finish(delivery.offset, delivery):
                    number += 1
            elif partition.holds(delivery):
                partition.offsets.pending[delivery.offset] = None
                self._give_back(delivery)
        self._finished(number)

    def _finished(self, number: int, *, at_once: bool = False) -> None:
        if number and not self._closed:
            self._member.commits.finished(number, at_once=at_once)
        self._settled.set()

    async def send_and_finish(self, settlements: Sequence[Settlement], reject: Reject) -> None:
        """Send what these send, then finish them; those of which something was refused are in hand again."""
        mine = [s for s in settlements if delivery_of(s).partition.holds(delivery_of(s))]
        for settlement in mine:
            delivery = delivery_of(settlement)
            delivery.partition.offsets.pending[delivery.offset] = None
            delivery.partition.settling += 1
        done: list[Settlement] = []
        try:
            if mine:
                await self._publisher.settle(mine, done, reject)
        finally:
            self._conclude(mine, done)

    def _conclude(self, settlements: Sequence[Settlement], done: Sequence[Settlement]) -> None:
        performed = {id(s) for s in done}
        number = 0
        for settlement in settlements:
            delivery = delivery_of(settlement)
            delivery.partition.settling -= 1
            if id(settlement) not in performed:
                delivery.partition.offsets.pending[delivery.offset] = delivery
            elif settlement.verdict.kind.gives_back:
                self._give_back(delivery)
            else:
                delivery.partition.offsets.finish(delivery.offset)
                number += 1
        self._finished(number, at_once=True)

    async def commit_first(self, settlements: Sequence[Settlement]) -> None:
        """With `ack="on_receive"`: commit what was settled, before any handler begins.

        Raises:
            ConnectionLost: the commit failed. No handler may begin: the messages come again, here or elsewhere.
        """
        partitions = {delivery_of(s).partition for s in settlements}
        wanted = [(partition.offsets, partition.offsets.changes) for partition in partitions]
        try:
            await self._member.commits.commit()
        except QueueError as error:
            raise ConnectionLost(f"What was to be handled could not be committed before: {error}") from error
        if not all(offsets.is_committed(changes) for offsets, changes in wanted):
            raise ConnectionLost(
                f"The group {self._member.group!r} has given the partitions to others before what was to be handled "
                "could be committed; no handler has begun."
            )

    # --- giving back ------------------------------------------------------------------------------

    def _give_back(self, delivery: KafkaDelivery) -> None:
        self.returned.append(delivery)
        self._changed()

    def redeliver(self, batch: list[Delivery], limit: int) -> None:
        """Add deliveries that were given back to `batch`, up to `limit` in all, in the order of their offsets."""
        self.returned.sort(key=lambda delivery: (delivery.partition.place, delivery.offset))
        while self.returned and len(batch) < limit:
            old = self.returned.pop(0)
            if not (old.partition.revoked or old.partition.revoking):
                batch.append(old.partition.deliver(old.offset, old.message, old.token, old.decode_error))

    # --- before partitions are revoked ------------------------------------------------------------

    async def drain(self, partitions: Collection[AssignedPartition], timeout: float) -> None:
        """Begin nothing more of these partitions, and wait for what is at work.

        Parameters:
            timeout: seconds; what is at work then is cancelled.
        """
        for partition in partitions:
            partition.revoking = True
            partition.arrived.clear()
            partition.not_due.clear()
            for delivery in partition.in_hand:
                if delivery.task is None or delivery.wake is not None:
                    delivery.withdraw()
        await self._wait_until_idle(partitions, timeout)
        late = [d for partition in partitions for d in partition.in_hand if d.task is not None]
        for delivery in late:
            delivery.abandon()
        if late:
            await self._wait_until_idle(partitions, ABANDONED)
        await self._publisher.release(partitions)

    async def _wait_until_idle(self, partitions: Collection[AssignedPartition], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not self._closed and self._is_at_work(partitions):
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            pass

    def _is_at_work(self, partitions: Collection[AssignedPartition]) -> bool:
        by_hand = self._by_hand()
        for partition in partitions:
            if partition.settling:
                return True
            for delivery in partition.in_hand:
                if by_hand or delivery.task is not None or delivery.settled:
                    return True
        return not self._delays.is_idle

    def progressed(self) -> None:
        """Something that `drain` waits for may have ended."""
        self._settled.set()

    def close(self) -> None:
        """Have nobody wait any more."""
        self._closed = True
        self._settled.set()
