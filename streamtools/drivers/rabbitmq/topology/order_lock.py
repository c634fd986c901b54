"""One consumer at a time where the queue itself does not see to it.

A queue declared without x-single-active-consumer cannot become one, and quorum queues take no notice of an
exclusive consumer (seen on RabbitMQ 3.10: a second one is let in). What every broker does keep is an
exclusive queue: it belongs to one connection and ends with it. So the consumer of an ordered queue holds an
empty exclusive queue as its lock, on the connection that it consumes on. Among those that share the connection a
lock of asyncio decides who that is.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from hashlib import blake2b
from typing import Final

from aiormq.exceptions import ChannelLockedResource

from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error
from streamtools.errors import StreamToolsError

PREFIX: Final = "streamtools.order."
#: Seconds between two tries for the lock; a standby takes over within this time.
POLL_INTERVAL: Final = 1.0


class OrderLock:
    """Held from `acquire()` until `release()`, or until the connection ends."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self._connection = connection
        name = PREFIX + queue
        fits = len(name.encode()) <= 255
        self._held = False
        self.name: str = name if fits else PREFIX + blake2b(queue.encode(), digest_size=16).hexdigest()

    async def acquire(self) -> None:
        """Wait until nobody else holds it.

        Raises:
            ConnectionLost: the connection has ended.
        """
        self._near = self._connection.locks.setdefault(self.name, asyncio.Lock())
        await self._near.acquire()
        self._held = True
        # An exclusive queue sends no word when it ends, so there is nothing to wait for but the time.
        while not await self._try():  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL)

    async def release(self) -> None:
        """Let another have it. Safe to repeat, and while `acquire()` waits (cancel that first)."""
        if not self._held:
            return
        self._held = False
        try:
            with suppress(StreamToolsError, *CLIENT_ERRORS):  # else it ends with the connection
                async with self._connection.declaring() as channel:
                    await self._connection.call(channel.queue_delete(self.name))
        finally:
            self._near.release()

    async def _try(self) -> bool:
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(
                    channel.queue_declare(self.name, exclusive=True, arguments={"x-queue-type": "classic"})
                )
        except ChannelLockedResource:
            return False
        except StreamToolsError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self._connection.where) from error
        return True
