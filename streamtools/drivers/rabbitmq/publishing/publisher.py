"""Publisher: publishes over the shared connection, on a new channel after one has ended or a queue has refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Final

from streamtools.drivers.rabbitmq.connections import SharedConnection
from streamtools.drivers.rabbitmq.publishing.batch import Batch, Limits, NeverSent, TooEarly
from streamtools.drivers.rabbitmq.publishing.publisher_channel import PublisherChannel
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.errors import ConnectError, ConnectionLost, SendError
from streamtools.message import Message

#: Seconds between two tries to send messages that a queue has refused; the last number is used again and again.
RETRY_DELAYS: Final = (0.05, 0.15, 0.5, 1.5)


class Publisher:
    """Publishes for one consumer or producer, and sends refused messages again.

    A quorum queue without a leader (it was just declared, or its leader's node is down) refuses messages in the same
    way as a full queue. If it refuses the first message of a channel, it refuses all later messages of that channel
    too, while another channel of the same connection works (seen on 3.10). So each try uses a new channel.

    If we may not send a message, the broker closes its channel. If it is not clear which message was the cause, the
    messages are sent one by one.

    Parameters:
        shared: the connection, with the state that its users share.
        limits: the limits of the broker.
        patience: refused messages are sent again for this many seconds.
        declares: whether to create missing exchanges and delay queues.
    """

    def __init__(
        self,
        shared: SharedConnection,
        limits: Limits,
        *,
        patience: float = sum(RETRY_DELAYS),
        declares: bool = True,
    ) -> None:
        self._shared = shared
        self._connection = shared.connection
        self._limits = limits
        self._patience = patience
        self._declares = declares
        self._channel: PublisherChannel | None = None
        self._opening = asyncio.Lock()

    @property
    def error(self) -> ConnectionLost | None:
        """Why the publisher cannot be used any more: its connection has ended; else None."""
        return self._connection.lost

    async def open(self) -> None:
        """Open the channel now, not with the first message."""
        await self._usable_channel()

    def close(self) -> None:
        """Close the channel; calls that are publishing on it get an error."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.fail("it was closed by us")
            channel.retire()

    async def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, and return when the broker holds each in its queue.

        Raises:
            SendError: the broker refuses the messages that the error names; it holds the others.
            ConnectError: the connection has ended, or a part of the broker cannot be reached for the moment.
        """
        begun = time.monotonic()
        channel = self._channel
        if channel is None or not channel.usable or _has_exchange(messages):
            batch, channel = await self._first(messages)
        else:
            batch = await channel.publish(messages)
            if batch.unrouted:
                await self._look_for_queues(messages, batch)
        if batch.refused or batch.nacked or batch.suspects:
            await self._insist(messages, begun, batch, channel)

    async def _insist(
        self, messages: Sequence[Message], begun: float, batch: Batch, channel: PublisherChannel
    ) -> None:
        """Publish messages that were not accepted again, and raise SendError for those that are refused.

        Parameters:
            begun: when the first try began, on the monotonic clock.
            batch: the results of the first try, over `channel`.
        """
        refused, doubtful = dict(batch.refused), set(batch.doubtful)
        # Even if the first answer was late, some tries are made.
        deadline = max(begun + self._patience, time.monotonic() + min(self._patience, sum(RETRY_DELAYS)))
        for delay in chain(RETRY_DELAYS, repeat(RETRY_DELAYS[-1])):
            if not batch.again or time.monotonic() + delay > deadline:
                break
            await asyncio.sleep(delay)
            left = [m for m in messages if id(m) in batch.again]
            if batch.suspects:
                batch = await self._one_by_one(left, batch)
            else:
                channel = await self._usable_channel(newer_than=channel)
                batch = await self._publish(channel, left)
            refused |= batch.refused
            doubtful |= batch.doubtful
        if refused or batch.again:
            raise _refusal(messages, refused, batch.again, doubtful)

    async def _first(self, messages: Sequence[Message]) -> tuple[Batch, PublisherChannel]:
        if _has_exchange(messages):
            return await self._try_routes(messages)
        channel = await self._usable_channel()
        return await self._publish(channel, messages), channel

    async def _publish(self, channel: PublisherChannel, messages: Sequence[Message]) -> Batch:
        batch = await channel.publish(messages)
        await self._look_for_queues(messages, batch)
        return batch

    async def _look_for_queues(self, messages: Sequence[Message], batch: Batch) -> None:
        """Mark messages that came back to be sent again if their queue exists: a classic queue's node may be down."""
        for queue in dict.fromkeys(m.queue for m in messages if id(m) in batch.unrouted):
            try:
                found, why = await Declarations(self._connection).exists(queue), "It is there again."
            except ConnectionLost:
                raise
            except ConnectError as error:
                found, why = True, str(error)
            if found:
                for message in messages:
                    if message.queue == queue and id(message) in batch.unrouted:
                        del batch.refused[id(message)]
                        batch.nacked[id(message)] = why

    # --- messages that we may not be allowed to send ------------------------------------------------

    async def _try_routes(self, messages: Sequence[Message]) -> tuple[Batch, PublisherChannel]:
        """Publish in order; the first message to each topic of an exchange gets its own channel."""
        outcome, before, now = _nothing(), list[Message](), time.time()
        for message in messages:
            exchange = message.exchange
            goes_now = message.deliver_at is None or message.deliver_at <= now
            if exchange is None or not goes_now or self._shared.routes.is_tried(exchange.name, message.queue):
                before.append(message)
                continue
            if before:
                outcome.take_over(await self._publish(await self._usable_channel(), before))
                before = []
            outcome.take_over(await self._alone(message))
        channel = await self._usable_channel()
        if before:
            outcome.take_over(await self._publish(channel, before))
        return outcome, channel

    async def _one_by_one(self, messages: Sequence[Message], batch: Batch) -> Batch:
        """Send each suspect again over its own channel; if that channel ends too, the message is refused."""
        outcome = _nothing()
        for message in messages:
            if id(message) in batch.suspects:
                outcome.take_over(await self._alone(message))
            else:
                outcome.nacked[id(message)] = batch.again[id(message)]
        return outcome

    async def _alone(self, message: Message) -> Batch:
        """Publish one message over its own channel."""
        async with self._shared.routes.trying:
            channel = await self._open_channel()
            try:
                batch = await self._publish(channel, [message])
            finally:
                channel.retire()
        if batch.suspects:
            batch.judge(message)
        elif message.exchange is not None and not batch.refused.keys() - batch.unrouted:
            self._shared.routes.note_tried(message.exchange.name, message.queue)
        return batch

    # --- channels -----------------------------------------------------------------------------------

    async def _usable_channel(self, newer_than: PublisherChannel | None = None) -> PublisherChannel:
        """Return the channel, or a new one; the old one is closed when nobody uses it any more."""
        if self._needs_channel(newer_than):
            async with self._opening:
                if self._needs_channel(newer_than):
                    old, self._channel = self._channel, await self._open_channel()
                    if old is not None:
                        old.retire()
        assert self._channel is not None
        return self._channel

    def _needs_channel(self, newer_than: PublisherChannel | None) -> bool:
        channel = self._channel
        return channel is None or channel is newer_than or not channel.usable

    async def _open_channel(self) -> PublisherChannel:
        return await PublisherChannel.open(self._shared, self._limits, declares=self._declares)


def _refusal(
    messages: Sequence[Message], refused: dict[int, str], again: dict[int, str], doubtful: set[int]
) -> SendError:
    said = refused | again
    reasons = list(dict.fromkeys(said.values()))
    text = " ".join(reasons[:3]) + (f" And {len(reasons) - 3} more." if len(reasons) > 3 else "")
    count = f"{len(said)} of {len(messages)} messages: " if len(messages) > 1 else ""
    unknown = again.keys() & doubtful
    named = [m for m in messages if id(m) in said]
    return SendError(
        count + text,
        refused=[m.id for m in named if id(m) not in unknown],
        unknown=[m.id for m in named if id(m) in unknown],
        unfit=[m.id for m in named if isinstance(said[id(m)], NeverSent)],
        early=[m.id for m in named if isinstance(said[id(m)], TooEarly)],
        messages=named,
    )


def _has_exchange(messages: Sequence[Message]) -> bool:
    for message in messages:  # quicker than any() with a generator, because mostly there is only one message
        if message.exchange is not None:  # noqa: SIM110
            return True
    return False


def _nothing() -> Batch:
    return Batch(asyncio.get_running_loop().create_future())
