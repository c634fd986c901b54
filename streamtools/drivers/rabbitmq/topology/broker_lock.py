"""A lock among all programs that use a broker: an exclusive queue, which belongs to one connection and ends with it.

It lets one consumer at a time receive an ordered queue where the queue itself does not: a queue that was declared
without x-single-active-consumer cannot become one that has it, and quorum queues ignore it when a consumer asks to be
the only one (seen on RabbitMQ 3.10: a second one is let in). It also lets one program at a time look at a queue.
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
        connection: whoever shares it takes turns by a lock of asyncio: an exclusive queue is open to them all.
        prefix: what the lock is for; the name of the exclusive queue begins with it.
        queue: the queue that is locked.

    Attributes:
        name: of the exclusive queue.
    """

    def __init__(self, connection: Connection, prefix: str, queue: str) -> None:
        self._connection = connection
        name = prefix + queue
        fits = len(name.encode()) <= 255
        self.name: str = name if fits else prefix + blake2b(queue.encode(), digest_size=16).hexdigest()
        self._local = connection.locks.setdefault(self.name, asyncio.Lock())
        self._held = False

    async def acquire(self, poll_interval: float) -> None:
        """Wait until nobody else holds it.

        Parameters:
            poll_interval: seconds between two tries.

        Raises:
            QueueError: we may not make the queue.
            ConnectionLost: the connection has ended.
        """
        await self._local.acquire()
        self._held = True
        # Nobody is told when an exclusive queue ends, so there is nothing to wait for but the time.
        while not await self._try():  # noqa: ASYNC110
            await asyncio.sleep(poll_interval)

    async def release(self) -> None:
        """Let another have it. Safe to repeat, and while `acquire()` waits (cancel that first)."""
        if not self._held:
            return
        self._held = False
        try:
            with suppress(StreamToolsError):  # then it ends with the connection
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
