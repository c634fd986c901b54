"""PutBack: publishes copies of messages that an operator has read, and acknowledges the originals after that."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Final

from aiormq.exceptions import ChannelAccessRefused

from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.frames import OWN_EXCHANGES
from streamtools.drivers.rabbitmq.looking.copy_channel import Copy, CopyChannel
from streamtools.drivers.rabbitmq.looking.held_channel import Held, HeldChannel
from streamtools.drivers.rabbitmq.topology.broker_lock import BrokerLock
from streamtools.errors import ConnectionLost, QueueError

#: The names of the lock of a queue's readers, and of the exchange for some of the copies, begin with this.
PREFIX: Final = "streamtools.look."
#: Seconds to wait until another reader of the same queue has ended, and seconds between two tries.
LOCK_TIMEOUT: Final = 30.0
LOCK_POLL_INTERVAL: Final = 0.05
#: Seconds to wait for the confirmation of a trial message, and of a copy.
TRIAL_TIMEOUT: Final = 5.0
CONFIRM_TIMEOUT: Final = 30.0
#: Seconds between tries of copies that a queue has refused for the moment (it may have no leader).
RETRY_DELAYS: Final = (0.1, 0.3, 1.0)
#: The broker's code for a permission that is missing.
REFUSED: Final = 403


class PutBack:
    """Puts copies of messages at the end of a queue. Only one reader of a queue at a time may do so.

    Parameters:
        connection: a connection that only this reader uses.
        user: the user who publishes.
    """

    def __init__(self, connection: Connection, queue: str, user: str) -> None:
        self._connection = connection
        self._queue = queue
        self._user = user
        self._lock = BrokerLock(connection, PREFIX, queue)
        self._copies: CopyChannel | None = None
        #: The exchange by which copies keep their routing key; None if not made yet, empty if we may not make one.
        self._detour: str | None = None

    async def open(self) -> None:
        """Check that we can publish copies, and wait until nobody else reads the queue.

        Raises:
            QueueError: another reader has not ended, or we may not publish.
        """
        self._copies = await CopyChannel.open(self._connection)
        await self._try_publishing(self._copies)
        # The lock comes last: during an alarm, the broker does not notice that a connection has ended which has
        # published, and would keep its lock.
        await self._wait_for_others()

    async def put(self, held: Sequence[Held]) -> None:
        """Publish copies in order, and acknowledge the originals whose copies the broker holds.

        Raises:
            QueueError: the queue does not accept all of them.
            ConnectionLost: the connection has ended; messages that were not acknowledged go back to the queue.
        """
        if self._copies is None or self._copies.error is not None:
            self._copies = await CopyChannel.open(self._connection)
        copies = self._copies
        messages = [await self._copy(one) for one in held]
        try:
            refused = await self._publish(copies, messages)
        except TimeoutError:
            raise self._unable("the broker confirms nothing") from None
        except ConnectionLost as error:
            raise self._unable(str(error)) from error
        finally:
            await self._remove_detour()
        if copies.unroutable:
            raise self._unable("it is gone, or no longer bound")
        if refused:
            for place, one in enumerate(held):
                if place not in refused:
                    one.channel.acknowledge([one])
            raise self._unable(f"it accepts no more messages ({len(refused)} of {len(held)} were refused)")
        _acknowledge(held)

    async def _publish(self, copies: CopyChannel, messages: Sequence[Copy]) -> set[int]:
        """Publish messages, and return the positions of those that the queue refuses again and again."""
        refused = await copies.publish(messages, CONFIRM_TIMEOUT)
        for delay in RETRY_DELAYS:
            if not refused:
                break
            await asyncio.sleep(delay)
            left = sorted(refused)
            again = await copies.publish([messages[place] for place in left], CONFIRM_TIMEOUT)
            refused = {left[place] for place in again}
        return refused

    async def _copy(self, held: Held) -> Copy:
        """Return the copy of a message.

        If the message came by an exchange of the user, its copy goes by one of ours that is bound to this queue only.
        So it keeps its routing key, and the header CC does not route it to other queues.
        """
        came_by_theirs = held.exchange and not held.exchange.startswith(OWN_EXCHANGES)
        if came_by_theirs or b"\x02CC" in held.data:
            if self._detour is None:
                self._detour = await self._make_detour()
            if self._detour:
                data = properties.without_counts(held.data, user=self._user)
                return Copy(self._detour, held.key, data, held.body)
        data = properties.without_counts(held.data, user=self._user, routed=False)
        return Copy("", self._queue.encode(), data, held.body)

    async def _make_detour(self) -> str:
        """Make an exchange that is bound to the queue, and return its name; empty if we may not make one."""
        name, request = self._lock.name, self._connection.request
        try:
            await request(
                lambda channel: channel.exchange_declare(name, exchange_type="fanout", auto_delete=True),
                expects=(ChannelAccessRefused,),
            )
        except ChannelAccessRefused:
            return ""
        self._detour = name
        try:
            await request(lambda channel: channel.queue_bind(self._queue, name), expects=(ChannelAccessRefused,))
        except ChannelAccessRefused:
            await self._remove_detour()  # without a binding it would not be deleted automatically
            return ""
        return name

    async def _remove_detour(self) -> None:
        name, self._detour = self._detour, None
        if name and self._connection.lost is None:
            await self._connection.request(lambda channel: channel.exchange_delete(name))

    async def _wait_for_others(self) -> None:
        try:
            async with asyncio.timeout(LOCK_TIMEOUT):
                await self._lock.acquire(LOCK_POLL_INTERVAL)
        except TimeoutError:
            raise QueueError(
                f"Somebody else is reading the queue {self._queue!r} (streamtools receive --follow?) and has its "
                "messages in hand. Try again when that has ended."
            ) from None
        except QueueError as error:
            if not isinstance(error.__cause__, ChannelAccessRefused):
                raise
            # A user who may not create queues reads without a lock.

    async def _try_publishing(self, copies: CopyChannel) -> None:
        """Publish two messages that reach no queue, to find out in time whether we may publish at all."""
        nowhere = Copy("", (PREFIX + secrets.token_hex(8)).encode(), b"\0\0", b"")
        try:
            for _ in range(2):  # during an alarm the broker accepts only the first message of a connection
                await copies.publish([nowhere], TRIAL_TIMEOUT)
        except TimeoutError:
            why = self._connection.blocked or "no answer"
            raise QueueError(
                f"RabbitMQ at {self._connection.where} takes no messages now ({why}), so messages that are read from "
                f"{self._queue!r} could not be put back. Try again when it does: rabbitmq-diagnostics alarms."
            ) from None
        except ConnectionLost as error:
            if copies.code != REFUSED:
                raise
            raise QueueError(
                f"The user {self._user!r} may not write to the default exchange of RabbitMQ at "
                f"{self._connection.where}. Reading {self._queue!r} needs that permission: a quorum queue counts "
                "messages that come back, so they are put back as copies. Allow it: rabbitmqctl set_permissions "
                "with a write pattern that matches amq.default."
            ) from error
        copies.unroutable = 0

    def _unable(self, why: str) -> QueueError:
        return QueueError(
            f"The messages that were read from {self._queue!r} could not be put back as copies: {why}. They are in "
            "the queue again, which has counted that as a delivery."
        )


def _acknowledge(held: Sequence[Held]) -> None:
    """Send one acknowledgement for each channel: everything that came on it so far is copied or settled."""
    last: dict[HeldChannel, Held] = {}
    for one in held:
        if one.channel not in last or last[one.channel].tag < one.tag:
            last[one.channel] = one
    for channel, one in last.items():
        channel.acknowledge_to(one)
