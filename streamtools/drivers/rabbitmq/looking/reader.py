"""RabbitMQReader: reads the messages of a queue, and leaves the queue unchanged.

A classic queue puts messages that are given back into their places, and does not count that. A quorum queue counts
each message that comes back in any way (basic.nack, basic.recover, the end of a channel or a connection). After its
delivery limit it moves or drops the message; the limit is 20 by default from RabbitMQ 4 on, and may be 0. So the
reader gives nothing back to a quorum queue. It receives all messages, publishes a copy of each, byte for byte and in
order, waits until the broker holds the copies, and then acknowledges the originals. It finds out the type of the
queue before it receives anything. If it may not ask for the type, it does the same as for a quorum queue.
docs/adr/021 says why.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from typing import Final

from streamtools.delivery import Delivery, Settlement, publish_first
from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.amqp.connection import Connection, open_connection
from streamtools.drivers.rabbitmq.looking.held_channel import Held, HeldChannel
from streamtools.drivers.rabbitmq.looking.put_back import PutBack
from streamtools.drivers.rabbitmq.options import QueueOptions, work_queue
from streamtools.drivers.rabbitmq.publishing.batch import Limits
from streamtools.drivers.rabbitmq.publishing.sender import Sender
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import STREAM, missing
from streamtools.errors import Closed, ConnectionLost, QueueError
from streamtools.message import Message, id_generator
from streamtools.settings import RabbitMQSettings

#: The broker's codes for a queue that does not exist, and for one that refuses basic.get.
NOT_FOUND: Final = 404
LOCKED: Final = 405
#: The reader first asks for FIRST messages, then for GROWTH times as many as have come.
FIRST: Final = 10
GROWTH: Final = 9
#: The most messages in hand, and their bytes; a longer queue is copied in parts.
MOST: Final = 10_000
MOST_BYTES: Final = 64 * 1024 * 1024
#: Messages of at most so many consumers are acknowledged at once.
CONSUMERS: Final = 12
#: Who asks for at least so many messages at once is going through the queue.
BATCH: Final = 100
#: If no message comes for this many seconds, the queue has no more for us.
SILENCE_TIMEOUT: Final = 1.0
#: Seconds between two questions to an empty queue.
POLL_INTERVAL: Final = 0.1


class RabbitMQReader:
    """Holds messages in hand while an operator reads them; those that are not settled stay in the queue unchanged.

    Parameters:
        most: the most messages to read.
    """

    def __init__(self, queue: str, settings: RabbitMQSettings, *, most: int, client_id: str | None) -> None:
        self._queue = queue
        self._settings = settings
        self._most = max(1, most)
        self._name = client_id or f"streamtools look at {queue}"
        self._new_id = id_generator()
        self._connection: Connection | None = None
        self._sender = Sender(settings, client_id, Limits(), declares=True)
        self._putback: PutBack | None = None
        self._channel: HeldChannel | None = None
        #: The messages in hand, in the queue's order; how many of them `receive` has returned, and how many messages
        #: it has returned in all.
        self._held: list[Held] = []
        self._seen = self._given = 0
        #: Whether the queue may count messages that are given back.
        self._counts = True
        #: Whether to receive by basic.get, because the queue may be deleted with its last consumer.
        self._gets = True
        #: Whether the queue has a single active consumer: then a second consumer of ours would get nothing.
        self._alone = False

    # --- for the admin ------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and wait until nobody else reads the queue.

        Raises:
            QueueError: there is no such queue, it is a stream, another reader has not ended, or messages could not be
                put back.
        """
        self._connection = connection = await open_connection(self._settings, self._name)
        try:
            try:
                await self._learn(connection)
            except ConnectionLost:  # see rare.unworded_difference; the type of the queue stays unknown
                await connection.close()
                self._connection = connection = await open_connection(self._settings, self._name)
            self._putback = PutBack(connection, self._queue, self._settings.username)
            await self._putback.open()
            self._channel = await self._open_channel()
        except BaseException:
            await self._disconnect()
            raise

    async def receive(self, max_messages: int = 1, *, timeout: float | None = None) -> list[Delivery]:
        """Return the next messages as soon as one is there; return none if none comes within `timeout` seconds.

        Parameters:
            timeout: the seconds to wait; None waits for ever.
        """
        wanted = min(max_messages, self._most - self._given)
        if wanted > 0 and len(self._held) == self._seen:
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            while not await self._take(wanted, deadline):
                if time.monotonic() + POLL_INTERVAL > deadline:
                    return []
                await asyncio.sleep(POLL_INTERVAL)
        new = self._held[self._seen : self._seen + max(0, wanted)]
        self._seen += len(new)
        self._given += len(new)
        return [self._delivery(held) for held in new]

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        # An earlier call in which one settlement was refused may have settled some of these already.
        settlements = [s for s in settlements if not s.delivery.token.settled]
        done, refused = await publish_first(self._publish, settlements)
        if self._channel is not None:
            await self._acknowledge(self._channel, [s.delivery.token for s in done])
        if refused is not None:
            raise refused

    async def _acknowledge(self, channel: HeldChannel, done: Sequence[Held]) -> None:
        if not self._gets and not self._alone:
            await channel.cancel()
        tags = {held.tag for held in done}
        first_left = next((held.tag for held in self._held if not held.settled and held.tag not in tags), math.inf)
        if done and max(tags) < first_left:
            channel.acknowledge_all(done)
        else:
            channel.acknowledge(done)
        self._forget_settled()

    def _forget_settled(self) -> None:
        """Let go of what was settled, once it is half of what is held."""
        settled = sum(held.settled for held in self._held[: self._seen])
        if 2 * settled > self._seen:
            left = [held for held in self._held[: self._seen] if not held.settled]
            self._held[: self._seen] = left
            self._seen = len(left)

    async def _publish(self, messages: Sequence[Message], _settlements: Sequence[Settlement]) -> None:
        await self._sender.publish(messages)

    async def _stop(self) -> None:
        # In the broker, the channel of a quorum queue passes on 32 acknowledgements at a time, and forgets the others
        # if it is closed. The answer to a cancel comes after them.
        if self._channel is not None and self._channel.error is None:
            await self._channel.cancel(flush=not self._gets)

    async def close(self) -> None:
        """Put all messages that are not settled back, and disconnect.

        Raises:
            QueueError: the broker refused the copies; the messages in hand go back to the queue, which counts that.
        """
        try:
            if self._channel is not None and self._channel.error is None:
                await self._leave(self._channel)
        finally:
            await self._disconnect()

    # --- receiving ----------------------------------------------------------------------------------

    async def _learn(self, connection: Connection) -> None:
        """Find out the type of the queue before anything is received; without permission it stays unknown."""
        probably = work_queue(self._queue, QueueOptions(), "error")
        if (queue := await Declarations(connection).as_it_is(probably, "passive", "looked at")) is not None:
            self._counts = not queue.is_classic
            self._gets = queue.is_classic
            self._alone = queue.is_single_active and not queue.is_classic

    def _delivery(self, held: Held) -> Delivery:
        message, count = properties.decode(
            held.data, held.body, self._queue, self._new_id, topic=held.topic, redelivered=held.redelivered
        )
        return Delivery(message, held, count or int(held.redelivered))

    async def _take(self, number: int, deadline: float) -> bool:
        """Receive up to `number` more messages, as soon as one has come; return False if the queue is empty."""
        channel = self._opened()
        if not self._gets:
            number = MOST if self._alone else self._more(number)
        left = None if deadline == math.inf else max(SILENCE_TIMEOUT, deadline - time.monotonic())
        try:
            self._held += await channel.take(number, left)
        except ConnectionLost:
            if not self._gets:
                raise
            await self._reopen(channel)
        return len(self._held) > self._seen

    def _more(self, wanted: int) -> int:
        """How many to take. Each time is a consumer, and there should be few; but who asks for few gets few."""
        if wanted < BATCH:
            return wanted
        return min(self._most - self._given, MOST, max(FIRST, GROWTH * self._given))

    async def _reopen(self, channel: HeldChannel) -> None:
        """Continue with a consumer if the queue has refused basic.get: it has a single active consumer.

        Raises:
            QueueError: the queue refused for another reason: it is missing, or it is a stream.
        """
        if channel.code == NOT_FOUND:
            raise missing(self._queue, self._opened_connection().where)
        if "stream queue" in self._opened_connection().said:
            raise QueueError(f"The queue {self._queue!r} cannot be looked at: {STREAM}.")
        if channel.code != LOCKED:
            raise QueueError(f"The queue {self._queue!r} cannot be looked at: {channel.error}")
        self._gets, self._alone = False, True
        self._channel = await self._open_channel()

    async def _open_channel(self) -> HeldChannel:
        return await HeldChannel.open(self._opened_connection(), self._queue, gets=self._gets)

    def _opened(self) -> HeldChannel:
        if self._channel is None:
            raise Closed(f"The look at {self._queue!r} was closed.")
        return self._channel

    def _opened_connection(self) -> Connection:
        if self._connection is None:
            raise Closed(f"The look at {self._queue!r} was closed.")
        return self._connection

    # --- putting back -------------------------------------------------------------------------------

    async def _leave(self, channel: HeldChannel) -> None:
        """Put the messages that are not settled back into the queue, in their order."""
        if not self._counts:
            await channel.close()
            return
        while self._alone and channel.due > 0 and await self._ready():
            if not (more := await channel.take(MOST, SILENCE_TIMEOUT)):
                break
            self._held += more
        await channel.cancel()
        self._held += channel.drain()
        left = [held for held in self._held if not held.settled]
        self._held = []
        if not left:
            return
        total = len(left) + await self._ready()
        if _bytes(left) > MOST_BYTES or total > MOST:
            await self._leave_in_parts(left, total)
            return
        left += await self._rest(total - len(left), MOST_BYTES - _bytes(left))
        await self._put_back(left)

    async def _leave_in_parts(self, left: list[Held], total: int) -> None:
        """Copy all messages of a queue in parts, because it has more than we may have in hand.

        When as many messages are copied as the queue had, they are in their old order again.
        """
        while left:
            await self._put_back(left)
            total -= len(left)
            left = await self._rest(min(total, MOST), MOST_BYTES)

    async def _put_back(self, left: Sequence[Held]) -> None:
        """Put these back, in parts: acknowledging those of one consumer is one command for the queue.

        The broker's channel sends 32 commands, and forgets the others if it ends before the queue has answered. The
        queue has answered the commands for one part when it confirms the copies of the next one.
        """
        for part in _by_consumers(left):
            if self._putback is not None:
                await self._putback.put(part)

    async def _rest(self, number: int, room: int) -> list[Held]:
        """Receive further messages of the queue over another channel, up to `number` and about `room` bytes."""
        found: list[Held] = []
        if number <= 0 or room <= 0:
            return found
        channel = await self._open_channel()
        while len(found) < number and _bytes(found) < room:
            new = await channel.take(_next(found, number, room), SILENCE_TIMEOUT)
            if not new:
                break  # somebody else has received them
            found += new
        await channel.cancel()
        return found + channel.drain()

    async def _ready(self) -> int:
        return (await Declarations(self._opened_connection()).count(self._queue))[0]

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._channel = self._putback = None
        try:
            await self._sender.close()
        finally:
            if connection is not None:
                await connection.close()


def _by_consumers(held: Sequence[Held]) -> Iterator[Sequence[Held]]:
    """Parts of what is held, in order, each of a few consumers."""
    part, consumers = list[Held](), set[tuple[int, bytes]]()
    for one in held:
        consumer = one.channel.number, one.consumer
        if consumer not in consumers and len(consumers) == CONSUMERS:
            yield part
            part, consumers = [], set()
        part.append(one)
        consumers.add(consumer)
    if part:
        yield part


def _next(found: Sequence[Held], number: int, room: int) -> int:
    """Return how many more messages to ask for, if `number` messages and about `room` bytes may be in hand."""
    fit = room // (_bytes(found) // len(found) + 1) - len(found) if found else FIRST
    return min(number - len(found), max(1, fit), max(FIRST, GROWTH * len(found)))


def _bytes(held: Sequence[Held]) -> int:
    return sum(len(one.data) + len(one.body) for one in held)
