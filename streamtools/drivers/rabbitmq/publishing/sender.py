"""Sender: publishes for a consumer or a reader: copies, replies, and messages of handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from streamtools.drivers.rabbitmq.connections import ConnectionLease, sending
from streamtools.drivers.rabbitmq.publishing.batch import Limits
from streamtools.drivers.rabbitmq.publishing.publisher import Publisher
from streamtools.errors import ConnectionLost
from streamtools.message import Message
from streamtools.settings import RabbitMQSettings


class Sender:
    """Publishes over the shared connection for sending, which it leases at the first message and after a loss.

    Parameters:
        name: the name of the connection that the broker shows; None for the program's name.
        limits: the limits of the broker.
        declares: whether to create missing exchanges and delay queues.
    """

    def __init__(self, settings: RabbitMQSettings, name: str | None, limits: Limits, *, declares: bool) -> None:
        self._settings = settings
        self._name = name
        self._limits = limits
        self._declares = declares
        self._lease: ConnectionLease | None = None
        self._publisher: Publisher | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, and return when the broker holds each in its queue.

        Raises:
            SendError: the broker refuses the messages that the error names; it holds the others.
            ConnectError: the connection cannot be opened, or has ended.
        """
        publisher = self._publisher
        if publisher is None or publisher.error is not None:
            publisher = await self._open()
        await publisher.publish(messages)

    def stop(self) -> None:
        """Close the channel; calls that are publishing get an error."""
        self._closed = True
        if self._publisher is not None:
            self._publisher.close()

    async def close(self) -> None:
        """Close the channel, and release the connection. Safe to repeat."""
        self.stop()
        await self._release()

    async def _open(self) -> Publisher:
        async with self._opening:
            if self._publisher is None or self._publisher.error is not None:
                await self._release()
                lease = await sending(self._settings, self._name)
                if self._closed:
                    await lease.release()
                    raise ConnectionLost("The consumer was closed while it opened its connection for sending.")
                self._lease = lease
                self._publisher = Publisher(lease.shared, self._limits, declares=self._declares)
            return self._publisher

    async def _release(self) -> None:
        lease, self._lease = self._lease, None
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()
        if lease is not None:
            await lease.release()
