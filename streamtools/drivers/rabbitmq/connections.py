"""The two connections of a process, for each event loop and address: one receives, the other sends.

All consumers, producers, buses and admins have channels of them. The first that needs a connection opens it, the last
that has it closes it, and a lost one is opened again once for all. A broker that is short of memory stops reading
from the connection that sends; acknowledgements go over the other one.
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

#: Channels at once that try routes; see `Routes.is_tried`.
TRYING: Final = 32
#: Topics of one exchange that are tried; further ones are taken to be as those before.
MOST_TOPICS: Final = 1000


class Routes:
    """What all who send over one connection know of exchanges and their topics.

    Attributes:
        exchanges: those that are known to exist.
        trying: held while a route is tried.
    """

    def __init__(self) -> None:
        self.exchanges: set[Exchange] = set()
        self.trying: Semaphore = Semaphore(TRYING)
        self._tried: dict[str, set[str]] = {}

    def is_tried(self, exchange: str, topic: str) -> bool:
        """The broker has taken a message to this topic of this exchange from us.

        A message that we may not send ends its channel, and with it the confirmations of all that was sent there
        before. So the first message to each topic has a channel of its own.
        """
        topics = self._tried.get(exchange)
        return topics is not None and (topic in topics or len(topics) >= MOST_TOPICS)

    def note_tried(self, exchange: str, topic: str) -> None:
        """The broker takes messages to this topic of this exchange."""
        topics = self._tried.setdefault(exchange, set())
        if len(topics) < MOST_TOPICS:
            topics.add(topic)

    def forget(self, exchange: str) -> None:
        """It may be deleted, or we may no longer send to it."""
        self._tried.pop(exchange, None)
        self.exchanges = {one for one in self.exchanges if one.name != exchange}


class SharedConnection:
    """A connection, and what is known of the broker behind it.

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
        """Let go of the connection; the last one closes it. Safe to repeat."""
        if not self._released:
            self._released = True
            self.connection.channels.leave()
            await self._lease.release()


async def receiving(settings: RabbitMQSettings, name: str | None) -> ConnectionLease:
    """A lease of the connection that receives, acknowledges and declares.

    Parameters:
        name: shown by the broker as the connection's, if this opens it; the program's when None.

    Raises:
        ConnectError: it cannot be opened.
    """
    return await _lease(settings, name, "receiving")


async def sending(settings: RabbitMQSettings, name: str | None) -> ConnectionLease:
    """A lease of the connection that sends; as `receiving`."""
    return await _lease(settings, name, "sending")


async def _lease(settings: RabbitMQSettings, name: str | None, role: str) -> ConnectionLease:
    """A lease of the first connection that has room: another one is opened when all channels are in use."""
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
