"""Subscription: everything that a consumer has while it is connected; after a reconnect there is a new one."""

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

#: An exclusive queue whose name begins with this is the lock of an ordered queue.
LOCK_PREFIX: Final = "streamtools.order."
#: Seconds between two tries for the lock of an ordered queue; a standby takes over within this time.
LOCK_POLL_INTERVAL: Final = 1.0
#: A consumer that stops waits this many seconds for messages that are on their way to it.
DRAIN_TIMEOUT: Final = 1.0
#: Seconds between two questions whether the queue is empty.
DRAIN_POLL_INTERVAL: Final = 0.005
#: A consumer that stops waits this many seconds for a change of its prefetch that has begun.
STOP_TIMEOUT: Final = 5.0


class Subscription:
    """A lease of a connection, a channel on it, and the work on that channel.

    Parameters:
        queue: the real queue; None if we may not ask for it.
        owner: the consumer.

    Attributes:
        sender: publishes the messages that are sent before a delivery is settled.
        is_counted: whether the queue counts deliveries, as far as is known. If not, a count in a header was copied
            from another queue.
        is_checked: whether the first delivery of the channel was checked.
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
        #: True from a stop on: nothing more is received, and the channel will be closed.
        self._is_ending = False
        #: Set when, after that, no message is on its way to us any more.
        self._calm = asyncio.Event()

    async def begin(self, forgotten: ForgottenConsumer) -> None:
        """Begin to consume; if the queue has a lock, wait for it first.

        Parameters:
            forgotten: checks a channel that gets no deliveries.
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
        """Acknowledge some deliveries, and give others back.

        Raises:
            ConnectionLost: the channel has ended.
        """
        if self._is_ending:
            await self._calm.wait()
        self.channel.check()  # the channel may have ended while the copies were confirmed
        ends = self._is_ending or self._stopping.is_set()
        if self.isolation.widens_after and acks and not releases and not ends:
            await self.isolation.widen_and_settle(acks)
        else:  # while we stop, messages are given back only by closing the channel; see `_take_no_more`
            self.channel.settle(acks, () if ends else releases)
        await self.channel.connection.drain()

    # --- the end ------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop receiving; messages in hand can still be settled."""
        if self.channel.error is not None:
            return
        self._is_ending = True
        stopping = self._take_no_more()
        try:
            if asked_to_stop():  # the program ends: do not wait long for a broker that does not answer
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
        # We keep the messages that have arrived, and those that the loop releases, until the channel is closed. Then
        # they go to the front of the queue, in order. If we gave them back now, they would go to its end.
        if not self._is_ordered and not (self._queue is not None and self._queue.is_single_active):
            await self._drain(prefetch)
            await self.channel.cancel()
        # A single active consumer is not cancelled: another process would become the active consumer, and would
        # overtake the messages that we still hold. The broker delivers up to the prefetch, and we keep these
        # messages.

    async def _drain(self, prefetch: int) -> None:
        """Wait until no message is on its way to us.

        A message that is on its way while we cancel goes to the end of the queue (seen on 3.10). None is on its way
        if we hold a full prefetch and acknowledge nothing, or if the queue is empty.
        """
        channel, loop = self.channel, asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_TIMEOUT
        with suppress(QueueError):  # the queue was deleted
            while channel.in_hand < prefetch and channel.error is None and loop.time() < deadline:
                ready, _ = await Declarations(channel.connection).count(channel.queue)
                if not ready:
                    break
                await asyncio.sleep(DRAIN_POLL_INTERVAL)

    async def close(self, *, deletes: bool) -> None:
        """Close the channel; messages that are not settled go back to the queue.

        Parameters:
            deletes: whether to delete the queue if nobody else consumes it.
        """
        self._calm.set()
        self.sender.stop()
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        try:
            await _by(deadline, self._close_channel())
            if self._lock is not None:
                await _by(deadline, self._lock.release())  # only now, when our messages are back in the queue
            if deletes:
                await _by(deadline, Declarations(self.channel.connection).delete_unused(self.channel.queue))
        finally:
            await asyncio.gather(self.sender.close(), self._lease.release())

    async def _close_channel(self) -> None:
        """Close the channel, even if we are cancelled meanwhile, because others go on using its connection."""
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
        # In the broker, the channel of a quorum queue passes on 32 acknowledgements at a time. If it is closed, it
        # forgets those that it has not passed on (seen on 3.10). The answer to a cancel comes after them.
        # A classic queue forgets nothing. But if it has a single active consumer, it crashes if that one is cancelled
        # with its whole prefetch in hand while another one waits (seen on 3.10).
        if not self._is_ordered and not (self._queue is not None and self._queue.is_classic):
            with suppress(StreamToolsError):  # if the connection is lost, the messages are delivered again
                await self.channel.cancel()


async def _by(deadline: float, work: Coroutine[Any, Any, None]) -> None:
    """Await some work until a deadline on the loop's clock; give up silently if the broker does not answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await work
