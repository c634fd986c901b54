"""Publishing again what was taken out of a queue to be looked at, and only then acknowledging it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Sequence
from hashlib import blake2b
from typing import Any, Final

from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource

from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.frames import OWN_EXCHANGES
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error
from streamtools.drivers.rabbitmq.looking.held import REFUSED, CopyChannel, Held, HoldingChannel
from streamtools.errors import ConnectionLost, QueueError, StreamToolsError

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


class PutBack:
    """Puts copies of messages at a queue's end. Held by one look at a time.

    Parameters:
        user: who publishes.
    """

    def __init__(self, connection: Connection, queue: str, user: str) -> None:
        self._connection = connection
        self._queue = queue
        self._user = user
        name = PREFIX + queue
        fits = len(name.encode()) <= 255
        self._name: str = name if fits else PREFIX + blake2b(queue.encode(), digest_size=16).hexdigest()
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
        # Afterwards: while an alarm lasts, the broker does not see that a connection that has published is gone.
        await self._lock()

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

    async def _publish(self, copies: CopyChannel, messages: Sequence[tuple[str, bytes, bytes, bytes]]) -> set[int]:
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

    async def _copy(self, held: Held) -> tuple[str, bytes, bytes, bytes]:
        """Exchange, routing key, content header and body.

        What came by an exchange of the user's goes by one of ours, which is bound to this queue alone: so it keeps
        its routing key, and CC routes it nowhere else.
        """
        queue = self._queue.encode()
        came_by_theirs = held.exchange and not held.exchange.startswith(OWN_EXCHANGES)
        if came_by_theirs or b"\x02CC" in held.data:
            if self._detour is None:
                self._detour = await self._make_detour()
            if self._detour:
                return self._detour, held.key, properties.without_counts(held.data, user=self._user), held.body
        return "", queue, properties.without_counts(held.data, user=self._user, routed=False), held.body

    async def _make_detour(self) -> str:
        is_made = False
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(
                    channel.exchange_declare(self._name, exchange_type="fanout", auto_delete=True)
                )
                is_made = True
                await self._connection.call(channel.queue_bind(self._queue, self._name))
        except ChannelAccessRefused:
            if is_made:  # without a binding it does not end by itself
                await self._declaring(lambda channel: channel.exchange_delete(self._name))
            return ""
        except CLIENT_ERRORS as error:
            raise _mapped(error, self._connection.where) from error
        return self._name

    async def _remove_detour(self) -> None:
        name, self._detour = self._detour, None
        if name and self._connection.lost is None:
            await self._declaring(lambda channel: channel.exchange_delete(name))

    async def _lock(self) -> None:
        """Hold an exclusive queue, which ends with this connection; who may make none looks without."""
        try:
            async with asyncio.timeout(LOCK_TIMEOUT):
                # An exclusive queue sends no word when it ends, so there is nothing to wait for but the time.
                while not await self._try_lock():  # noqa: ASYNC110
                    await asyncio.sleep(LOCK_POLL_INTERVAL)
        except TimeoutError:
            raise QueueError(
                f"Somebody else looks at the queue {self._queue!r} (streamtools receive --follow?) and has its "
                "messages in hand. Try again when that look has ended."
            ) from None

    async def _try_lock(self) -> bool:
        try:
            await self._declaring(
                lambda channel: channel.queue_declare(
                    self._name, exclusive=True, arguments={"x-queue-type": "classic"}
                ),
                passing=(ChannelLockedResource, ChannelAccessRefused),
            )
        except ChannelLockedResource:
            return False
        except ChannelAccessRefused:
            return True
        return True

    async def _try_publishing(self, copies: CopyChannel) -> None:
        """Publish two messages that reach no queue: to be refused later would be too late."""
        nowhere = (PREFIX + secrets.token_hex(8)).encode()
        try:
            for _ in range(2):  # while an alarm lasts, the first one of a connection is taken, and no other
                await copies.publish([("", nowhere, b"\0\0", b"")], TRIAL_TIMEOUT)
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

    async def _declaring(self, request: Any, *, passing: tuple[type[Exception], ...] = ()) -> None:
        try:
            async with self._connection.declaring() as channel:
                work: Awaitable[Any] = request(channel)
                await self._connection.call(work)
        except passing:
            raise
        except CLIENT_ERRORS as error:
            raise _mapped(error, self._connection.where) from error

    def _unable(self, why: str) -> QueueError:
        return QueueError(
            f"What was looked at in {self._queue!r} could not be put back as copies: {why}. It is in the queue "
            "again, which has counted that as a delivery."
        )


def _acknowledge(held: Sequence[Held]) -> None:
    """One frame for each channel: all that came there before its last one is copied, or settled."""
    last: dict[HoldingChannel, Held] = {}
    for one in held:
        if one.channel not in last or last[one.channel].tag < one.tag:
            last[one.channel] = one
    for channel, one in last.items():
        channel.acknowledge_to(one)


def _mapped(error: BaseException, where: str) -> StreamToolsError:
    return error if isinstance(error, StreamToolsError) else channel_error(error, where)
