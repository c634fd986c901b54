"""BrokerLock: a lock among all programs that use a broker. It is an exclusive queue, which one connection owns.

With it, only one consumer at a time receives from an ordered queue that does not ensure this itself. Some queues do
not: x-single-active-consumer cannot be added to an existing queue, and a quorum queue ignores the wish of a consumer
to be the only one (seen on RabbitMQ 3.10). The lock also lets only one program at a time read a queue for an
operator.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from hashlib import blake2b

from aiormq.exceptions import ChannelLockedResource

from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.errors import StreamToolsError


class BrokerLock:
    """Held from `acquire()` until `release()`, or until the connection ends.

    Parameters:
        connection: the connection. An exclusive queue does not exclude other users of the same connection, so they
            take turns by a lock of asyncio.
        prefix: what the lock is for; the name of the exclusive queue begins with it.
        queue: the queue that is locked.

    Attributes:
        name: the name of the exclusive queue.
    """

    def __init__(self, connection: Connection, prefix: str, queue: str) -> None:
        self._connection = connection
        name = prefix + queue
        fits = len(name.encode()) <= 255
        self.name: str = name if fits else prefix + blake2b(queue.encode(), digest_size=16).hexdigest()
        self._local = connection.locks.setdefault(self.name, asyncio.Lock())
        self._held = False

    async def acquire(self, poll_interval: float) -> None:
        """Wait until nobody else holds the lock, and take it.

        Parameters:
            poll_interval: seconds between two tries.

        Raises:
            QueueError: we may not create the queue.
            ConnectionLost: the connection has ended.
        """
        await self._local.acquire()
        self._held = True
        # The broker does not tell anybody when an exclusive queue ends, so we have to ask again and again.
        while not await self._try():  # noqa: ASYNC110
            await asyncio.sleep(poll_interval)

    async def release(self) -> None:
        """Release the lock. Safe to repeat; cancel a waiting `acquire()` first."""
        if not self._held:
            return
        self._held = False
        try:
            with suppress(StreamToolsError):  # if this fails, the queue is deleted with the connection
                await self._connection.request(lambda channel: channel.queue_delete(self.name))
        finally:
            self._local.release()

    async def _try(self) -> bool:
        try:
            await self._connection.request(
                lambda channel: channel.queue_declare(
                    self.name, exclusive=True, arguments={"x-queue-type": "classic"}
                ),
                expects=(ChannelLockedResource,),
            )
        except ChannelLockedResource:
            return False
        return True
