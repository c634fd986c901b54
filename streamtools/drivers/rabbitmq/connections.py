"""Shares two connections in a process, for each event loop and address: one receives, the other sends.

All consumers, producers, buses and admins have channels on them. The first that needs a connection opens it, and the
last that uses it closes it. If a connection is lost, one new connection serves all of them. A broker that is short of
memory stops reading from the connection that sends; acknowledgements go over the other one.
"""

from __future__ import annotations

import sys
from asyncio import Semaphore
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

from streamtools.drivers.rabbitmq.amqp.connection import Connection, open_connection
from streamtools.drivers.rabbitmq.topology.delay_chain import DelayChain
from streamtools.engine.tasks.sharing import Lease, Sharing
from streamtools.exchange import Exchange
from streamtools.settings import RabbitMQSettings

#: The most channels that try routes at the same time; see `Routes.is_tried`.
TRYING: Final = 32
#: The most topics of one exchange that are tried; further topics are assumed to work as well.
MOST_TOPICS: Final = 1000


class Routes:
    """The exchanges and topics that the senders of one connection know.

    Attributes:
        exchanges: the exchanges that exist.
        trying: limits how many routes are tried at the same time.
    """

    def __init__(self) -> None:
        self.exchanges: set[Exchange] = set()
        self.trying: Semaphore = Semaphore(TRYING)
        self._tried: dict[str, set[str]] = {}

    def is_tried(self, exchange: str, topic: str) -> bool:
        """Whether the broker has accepted a message to this topic of this exchange from us.

        If we are not allowed to send a message, the broker closes the channel, and the confirmations of all earlier
        messages on that channel are lost. So the first message to each topic gets its own channel.
        """
        topics = self._tried.get(exchange)
        return topics is not None and (topic in topics or len(topics) >= MOST_TOPICS)

    def note_tried(self, exchange: str, topic: str) -> None:
        """Note that the broker accepts messages to this topic of this exchange."""
        topics = self._tried.setdefault(exchange, set())
        if len(topics) < MOST_TOPICS:
            topics.add(topic)

    def forget(self, exchange: str) -> None:
        """Forget an exchange, which may have been deleted, or to which we may no longer send."""
        self._tried.pop(exchange, None)
        self.exchanges = {one for one in self.exchanges if one.name != exchange}


class SharedConnection:
    """A connection, with the state that its users share.

    Attributes:
        chain: the queues of delayed messages.
        routes: the exchanges and topics that messages were sent to.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.chain: DelayChain = DelayChain(connection)
        self.routes: Routes = Routes()


async def _close(shared: SharedConnection) -> None:
    await shared.connection.close()


def _is_lost(shared: SharedConnection) -> bool:
    return shared.connection.lost is not None


_shared: Final[Sharing[SharedConnection]] = Sharing(_close, is_dead=_is_lost)


class ConnectionLease:
    """The right of a consumer or a producer to use a shared connection, until `release()`."""

    def __init__(self, lease: Lease[SharedConnection]) -> None:
        self._lease = lease
        self._released = False
        self.shared: SharedConnection = lease.value
        self.connection: Connection = lease.value.connection

    async def release(self) -> None:
        """Release the connection; the last release closes it. Safe to repeat."""
        if not self._released:
            self._released = True
            self.connection.channels.leave()
            await self._lease.release()


async def receiving(settings: RabbitMQSettings, name: str | None) -> ConnectionLease:
    """Return a lease of the connection that receives, acknowledges and declares.

    Parameters:
        name: the name of the connection that the broker shows, if this call opens it; None for the program's name.

    Raises:
        ConnectError: the connection cannot be opened.
    """
    return await _lease(settings, name, "receiving")


async def sending(settings: RabbitMQSettings, name: str | None) -> ConnectionLease:
    """Return a lease of the connection that sends. Parameters and errors are those of `receiving`."""
    return await _lease(settings, name, "sending")


async def _lease(settings: RabbitMQSettings, name: str | None, role: str) -> ConnectionLease:
    """Return a lease of the first connection that has a free channel; if none has, open another connection."""
    address = settings.model_copy(update={"management_url": None})
    opens = partial(_open, settings, f"{name or _program()} ({role})")
    for number in count():
        lease = await _shared.acquire((address, role, number), opens)
        if lease.value.connection.channels.join():
            return ConnectionLease(lease)
        await lease.release()
    raise AssertionError  # count() does not end


async def _open(settings: RabbitMQSettings, name: str) -> SharedConnection:
    return SharedConnection(await open_connection(settings, name))


def _program() -> str:
    return f"streamtools in {Path(sys.argv[0]).name or 'python'}" if sys.argv and sys.argv[0] else "streamtools"
