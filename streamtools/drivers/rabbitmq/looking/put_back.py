"""Messages that were taken out of a queue to be looked at are published again, and only then acknowledged."""

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

#: Before the name of the lock of those who look at a queue, and of the exchange by which some copies go.
PREFIX: Final = "streamtools.look."
#: Seconds to wait for another look at the same queue, and between two tries.
LOCK_TIMEOUT: Final = 30.0
LOCK_POLL_INTERVAL: Final = 0.05
#: Seconds for the first confirmation, and for each further one.
TRIAL_TIMEOUT: Final = 5.0
CONFIRM_TIMEOUT: Final = 30.0
#: Seconds between tries of copies that a queue did not take just now (it has no leader for a moment).
RETRY_DELAYS: Final = (0.1, 0.3, 1.0)
#: The broker's code for a permission that is missing.
REFUSED: Final = 403


class PutBack:
    """Puts copies of messages at a queue's end. One look at a time has it.

    Parameters:
        connection: of this look alone.
        user: who publishes.
    """

    def __init__(self, connection: Connection, queue: str, user: str) -> None:
        self._connection = connection
        self._queue = queue
        self._user = user
        self._lock = BrokerLock(connection, PREFIX, queue)
        self._copies: CopyChannel | None = None
        #: The exchange by which copies keep their routing key; None while there is none, empty where none is allowed.
        self._detour: str | None = None

    async def open(self) -> None:
        """Make sure that copies can be published, and wait until nobody else looks at the queue.

        Raises:
            QueueError: another look has not ended, or we may not publish.
        """
        self._copies = await CopyChannel.open(self._connection)
        await self._try_publishing(self._copies)
        # The lock comes last: during an alarm the broker does not notice the end of a connection that has published.
        await self._wait_for_others()

    async def put(self, held: Sequence[Held]) -> None:
        """Publish these in order, and acknowledge those that the broker holds then.

        Raises:
            QueueError: the queue does not take all of them.
            ConnectionLost: the connection has ended; what was not acknowledged goes back to the queue.
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
            raise self._unable(f"it takes no more messages ({len(refused)} of {len(held)} were refused)")
        _acknowledge(held)

    async def _publish(self, copies: CopyChannel, messages: Sequence[Copy]) -> set[int]:
        """The places of those that the queue does not take."""
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
        """What is published for this message.

        What came by an exchange of the user's goes by one of ours, which is bound to this queue alone: so it keeps
        its routing key, and CC routes it nowhere else.
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
        """An exchange that is bound to the queue; empty where we may not make one."""
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
            await self._remove_detour()  # without a binding it does not end by itself
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
                f"Somebody else looks at the queue {self._queue!r} (streamtools receive --follow?) and has its "
                "messages in hand. Try again when that look has ended."
            ) from None
        except QueueError as error:
            if not isinstance(error.__cause__, ChannelAccessRefused):
                raise
            # A user who may make no queue looks without a lock.

    async def _try_publishing(self, copies: CopyChannel) -> None:
        """Publish two messages that reach no queue: to learn later that we may not would be too late."""
        nowhere = Copy("", (PREFIX + secrets.token_hex(8)).encode(), b"\0\0", b"")
        try:
            for _ in range(2):  # during an alarm the broker takes the first message of a connection, and no other
                await copies.publish([nowhere], TRIAL_TIMEOUT)
        except TimeoutError:
            why = self._connection.blocked or "no answer"
            raise QueueError(
                f"RabbitMQ at {self._connection.where} takes no messages now ({why}), so what is looked at in "
                f"{self._queue!r} could not be put back. Try again when it does: rabbitmq-diagnostics alarms."
            ) from None
        except ConnectionLost as error:
            if copies.code != REFUSED:
                raise
            raise QueueError(
                f"The user {self._user!r} may not write to the default exchange of RabbitMQ at "
                f"{self._connection.where}. To look at {self._queue!r} that is needed: a quorum queue counts what "
                "comes back to it, so its messages are put back as copies. Allow it: rabbitmqctl set_permissions "
                "with a write pattern that matches amq.default."
            ) from error
        copies.unroutable = 0

    def _unable(self, why: str) -> QueueError:
        return QueueError(
            f"What was looked at in {self._queue!r} could not be put back as copies: {why}. It is in the queue "
            "again, which has counted that as a delivery."
        )


def _acknowledge(held: Sequence[Held]) -> None:
    """One frame for each channel: all that came there before its last one is copied, or settled."""
    last: dict[HeldChannel, Held] = {}
    for one in held:
        if one.channel not in last or last[one.channel].tag < one.tag:
            last[one.channel] = one
    for channel, one in last.items():
        channel.acknowledge_to(one)
