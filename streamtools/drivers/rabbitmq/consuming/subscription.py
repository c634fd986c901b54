"""What a consumer has while it is connected. It ends with its channel; the next one takes nothing over from it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final

from streamtools.consumer import Consumer
from streamtools.drivers.rabbitmq.amqp.connection import CLOSE_TIMEOUT
from streamtools.drivers.rabbitmq.connections import ConnectionLease
from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel
from streamtools.drivers.rabbitmq.consuming.isolation import Isolation
from streamtools.drivers.rabbitmq.publishing.sender import Sender
from streamtools.drivers.rabbitmq.rare.forgotten_consumer import ForgottenConsumer
from streamtools.drivers.rabbitmq.topology.broker_lock import BrokerLock
from streamtools.drivers.rabbitmq.topology.declarations import Declarations, needs_no_lock
from streamtools.drivers.rabbitmq.topology.queues import Queue
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.errors import QueueError, StreamToolsError

#: Before the name of the exclusive queue that is the lock of an ordered one.
LOCK_PREFIX: Final = "streamtools.order."
#: Seconds between two tries for the lock of an ordered queue; a standby takes over within this time.
LOCK_POLL_INTERVAL: Final = 1.0
#: Seconds for messages that are on their way to a consumer that stops; other consumers may get them instead.
DRAIN_TIMEOUT: Final = 1.0
#: Seconds between two questions whether the queue is empty.
DRAIN_POLL_INTERVAL: Final = 0.005
#: Seconds for a change of the prefetch that is under way when the consumer stops.
STOP_TIMEOUT: Final = 5.0


class Subscription:
    """A lease of a connection, a channel on it, and what goes on there.

    Parameters:
        queue: the queue as it is; None where we may not look.
        owner: the consumer.

    Attributes:
        sender: publishes what is sent before a delivery is settled.
        is_counted: the queue counts deliveries, as far as is known; else a count in a header was copied by somebody.
        is_checked: the first delivery of the channel was looked at.
    """

    def __init__(
        self, lease: ConnectionLease, channel: ConsumerChannel, sender: Sender, queue: Queue | None, owner: Consumer
    ) -> None:
        self._lease = lease
        self.channel = channel
        self._queue = queue
        self.sender = sender
        self._is_ordered = owner.ordered_by is not None
        self._stopping = owner._stopping
        self.isolation: Isolation = Isolation(channel, owner.prefetch, queue, is_ordered=self._is_ordered)
        self.is_counted: bool = queue is None or not queue.is_classic
        self.is_checked: bool = False
        has_lock = self._is_ordered and not needs_no_lock(channel.queue, queue, owner.declare)
        self._lock = BrokerLock(lease.connection, LOCK_PREFIX, channel.queue) if has_lock else None
        self._turn: asyncio.Task[None] | None = None
        #: Nothing is taken in any more, by a stop or a cancellation; the channel is about to be closed.
        self._is_ending = False
        #: Set while that lasts: nothing is on its way to us any more.
        self._calm = asyncio.Event()

    async def begin(self, forgotten: ForgottenConsumer) -> None:
        """Have the queue deliver, once the lock is ours.

        Parameters:
            forgotten: looks after a channel to which nothing is delivered.
        """
        if self._lock is None:
            await self.channel.consume(self.isolation.prefetch)
            self.channel.beside(forgotten.watch, self.channel, self._is_stopping)
        else:
            self._turn = self.channel.beside(self._take_turn, self._lock, forgotten)

    async def _take_turn(self, lock: BrokerLock, forgotten: ForgottenConsumer) -> None:
        await lock.acquire(LOCK_POLL_INTERVAL)
        await self.channel.consume(self.isolation.prefetch)
        await forgotten.watch(self.channel, self._is_stopping)

    def _is_stopping(self) -> bool:
        return self._is_ending or self._stopping.is_set()

    async def settle(self, acks: Sequence[int], releases: Sequence[int]) -> None:
        """Acknowledge and give back.

        Raises:
            ConnectionLost: the channel has ended.
        """
        if self._is_ending:
            await self._calm.wait()
        self.channel.check()  # it may have ended while the copies were confirmed
        ends = self._is_ending or self._stopping.is_set()
        if self.isolation.widens_after and acks and not releases and not ends:
            await self.isolation.widen_and_settle(acks)
        else:  # what is given back while we stop stays with us until the channel is closed; see `_take_no_more`
            self.channel.settle(acks, () if ends else releases)
        await self.channel.connection.drain()

    # --- the end ------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Take nothing in any more; what is in hand can still be settled."""
        if self.channel.error is not None:
            return
        self._is_ending = True
        stopping = self._take_no_more()
        try:
            if asked_to_stop():  # the program ends: it does not wait long for a broker that has fallen silent
                await _by(asyncio.get_running_loop().time() + CLOSE_TIMEOUT, stopping)
            else:
                await stopping
        finally:
            self._calm.set()

    async def _take_no_more(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            await asyncio.wait({self._turn})
        prefetch = await self.isolation.stop(STOP_TIMEOUT)
        # Messages that have arrived, and those that the loop gives back, stay with us until the channel is closed:
        # then they go to the front of the queue, in order. Given back now, they would go to its end.
        if not self._is_ordered and not (self._queue is not None and self._queue.is_single_active):
            await self._drain(prefetch)
            await self.channel.cancel()
        # Else another process would become the active consumer, and overtake the messages that we still hold. So the
        # broker goes on delivering, up to the prefetch, and nobody takes these messages.

    async def _drain(self, prefetch: int) -> None:
        """Wait until nothing is on its way to us: what crosses with a cancel goes to the queue's end (seen on 3.10).

        Nothing is on its way once we hold as much as we asked for and acknowledge nothing, or the queue is empty.
        """
        channel, loop = self.channel, asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_TIMEOUT
        with suppress(QueueError):  # it was deleted
            while channel.in_hand < prefetch and channel.error is None and loop.time() < deadline:
                ready, _ = await Declarations(channel.connection).count(channel.queue)
                if not ready:
                    break
                await asyncio.sleep(DRAIN_POLL_INTERVAL)

    async def close(self, *, deletes: bool) -> None:
        """Close the channel; what was not settled goes back to the queue.

        Parameters:
            deletes: delete the queue, unless somebody else consumes it.
        """
        self._calm.set()
        self.sender.stop()
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        try:
            await _by(deadline, self._close_channel())
            if self._lock is not None:
                await _by(deadline, self._lock.release())  # now: the next must find what we held
            if deletes:
                await _by(deadline, Declarations(self.channel.connection).delete_unused(self.channel.queue))
        finally:
            await asyncio.gather(self.sender.close(), self._lease.release())

    async def _close_channel(self) -> None:
        """Close the channel, also if we are cancelled meanwhile; others go on using its connection."""
        tasks = set(self.channel.tasks)
        try:
            await self._last_acknowledgements()
        finally:
            for task in tasks:
                task.cancel()
            closing = self.channel.discard()
        if tasks:
            await asyncio.wait(tasks)
        if self.channel.connection.lost is None:
            await asyncio.wait({closing})

    async def _last_acknowledgements(self) -> None:
        # The channel of a quorum queue sends 32 acknowledgements at a time, and forgets the others when it is closed
        # right after them (seen on 3.10); a cancel waits for the queue.
        # A classic queue with a single active consumer crashes at the next message once that one is cancelled
        # while it has its whole prefetch in hand and another waits (seen on 3.10); it forgets nothing.
        if not self._is_ordered and not (self._queue is not None and self._queue.is_classic):
            with suppress(StreamToolsError):  # what is lost with the connection comes again
                await self.channel.cancel()


async def _by(deadline: float, work: Coroutine[Any, Any, None]) -> None:
    """Await this until then, on the loop's clock: what a silent broker does not answer ends with the connection."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await work
