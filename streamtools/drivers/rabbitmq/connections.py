"""The two connections of a process, for each event loop and address: one receives, the other sends.

All consumers, producers, buses and admins have channels of them. The first who needs one opens it, the last one who
has it closes it, and one that is lost is made anew once for all. What a broker that blocks publishers holds up is
the connection that sends; acknowledgements go over the other one.
"""

from __future__ import annotations

import sys
from asyncio import Semaphore
from collections.abc import Coroutine
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from streamtools.drivers.rabbitmq.amqp.connection import Connection, open_connection
from streamtools.drivers.rabbitmq.topology.delay_chain import DelayChain
from streamtools.engine.tasks.sharing import Lease, Sharing
from streamtools.exchange import Exchange
from streamtools.settings import RabbitMQSettings

#: Channels at once that try routes; see `Sending.tried`.
TRYING: Final = 32
#: Routes of one exchange that are tried; those of an exchange with more are taken to be as those before.
ROUTES: Final = 1000


class Receiving:
    """The connection that receives, acknowledges and declares."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection


class Sending:
    """The connection that sends, and what all who send over it know of the broker.

    Attributes:
        chain: the queues of delayed messages.
        exchanges: those that are known to be there.
        trying: held while a route is tried.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.chain: DelayChain = DelayChain(connection)
        self.exchanges: set[Exchange] = set()
        self.trying: Semaphore = Semaphore(TRYING)
        self._tried: dict[str, set[str]] = {}

    def is_tried(self, exchange: str, topic: str) -> bool:
        """The broker has taken a message to this topic of this exchange from us.

        One that we may not send to ends the channel, and with it the confirmations of all that was sent over it
        before; so the first message to each has a channel of its own.
        """
        topics = self._tried.get(exchange)
        return topics is not None and (topic in topics or len(topics) >= ROUTES)

    def note_tried(self, exchange: str, topic: str) -> None:
        """The broker takes messages to this topic of this exchange."""
        topics = self._tried.setdefault(exchange, set())
        if len(topics) < ROUTES:
            topics.add(topic)

    def forget(self, exchange: str) -> None:
        """It may be gone, or no longer ours to send to."""
        self._tried.pop(exchange, None)
        self.exchanges = {one for one in self.exchanges if one.name != exchange}


class _Shared(Protocol):
    connection: Connection


S = TypeVar("S", bound=_Shared)


async def _close(shared: _Shared) -> None:
    await shared.connection.close()


def _is_lost(shared: _Shared) -> bool:
    return shared.connection.lost is not None


_receiving: Final[Sharing[Receiving]] = Sharing(_close, is_dead=_is_lost)
_sending: Final[Sharing[Sending]] = Sharing(_close, is_dead=_is_lost)


class Place(Generic[S]):
    """A consumer's or producer's place on a shared connection, until `release()`."""

    def __init__(self, lease: Lease[S]) -> None:
        self._lease = lease
        self._released = False
        self.shared: S = lease.value
        self.connection: Connection = lease.value.connection

    @classmethod
    async def take(cls, sharing: Sharing[S], kind: type[S], settings: RabbitMQSettings, name: str) -> Self:
        """A place on the first connection that has one: a second one is opened when all channels are in use."""
        address = settings.model_copy(update={"management_url": None})
        for number in count():
            lease = await sharing.acquire((address, number), partial(_open, kind, settings, name))
            if lease.value.connection.join():
                return cls(lease)
            await lease.release()
        raise AssertionError  # count() does not end

    async def release(self) -> None:
        """Give the place up; the last one closes the connection. Safe to repeat."""
        if not self._released:
            self._released = True
            self.connection.leave()
            await self._lease.release()


async def _open(kind: Any, settings: RabbitMQSettings, name: str) -> Any:
    return kind(await open_connection(settings, name))


def receiving(settings: RabbitMQSettings, name: str | None) -> Coroutine[Any, Any, Place[Receiving]]:
    """A place on the connection that receives.

    Parameters:
        name: shown by the broker as the connection's, if this opens it; the program's when None.

    Raises:
        ConnectError: it cannot be opened.
    """
    return Place[Receiving].take(_receiving, Receiving, settings, f"{name or _program()} (receiving)")


def sending(settings: RabbitMQSettings, name: str | None) -> Coroutine[Any, Any, Place[Sending]]:
    """A place on the connection that sends; as `receiving`."""
    return Place[Sending].take(_sending, Sending, settings, f"{name or _program()} (sending)")


def _program() -> str:
    return f"streamtools in {Path(sys.argv[0]).name or 'python'}" if sys.argv and sys.argv[0] else "streamtools"
