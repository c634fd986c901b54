"""ConsumerChannel: the channel of one consumer, which receives deliveries and sends acknowledgements."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Any

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from streamtools.drivers.rabbitmq.amqp import frames
from streamtools.drivers.rabbitmq.amqp.channel import Channel, ignore
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, is_missing
from streamtools.drivers.rabbitmq.topology.queues import missing
from streamtools.errors import ConnectionLost, QueueError, StreamToolsError

#: The largest prefetch that basic.qos can carry; 0 means no limit.
PREFETCH_MAX = 65_535
#: The most bytes of a consumer's name in its tag; AMQP allows 255, including the number after the name.
NAME_MAX = 200

#: A delivery as it arrived: tag, redelivered, properties, body, and its topic if it came by an exchange.
Raw = tuple[int, bool, bytes, bytes, str | None]


class ConsumerChannel(Channel):
    """Receives one queue.

    Parameters:
        connection: the connection of the channel.
        channel: the library's channel, opened without confirms.
        queue: the queue's name.
        name: the name of the consumer that the broker shows.
    """

    error: ConnectionLost | None

    def __init__(self, connection: Connection, channel: AbstractChannel, queue: str, name: str) -> None:
        super().__init__(connection, channel)
        self.queue = queue
        self._name = name.encode()[:NAME_MAX].decode(errors="ignore")
        self.buffer: deque[Raw] = deque()
        self._consumer_tags: list[str] = []
        self._numbers = count(1)
        self._waiter: asyncio.Future[None] | None = None
        self._wrong: QueueError | None = None
        #: While true, messages gather, and do not wake the consumer.
        self._resting = False
        self._loop = asyncio.get_running_loop()
        #: Tasks that run while the channel receives.
        self.tasks: set[asyncio.Task[None]] = set()
        #: Every tag below `_low` is settled; above it, only the tags in `_settled` are.
        self._low = 1
        self._settled: set[int] = set()
        self._high = 0

    @classmethod
    async def open(cls, connection: Connection, queue: str, name: str = "streamtools") -> ConsumerChannel:
        """Open a channel; nothing is received before `consume()`."""
        channel = cls(connection, await connection.channels.open(confirms=False), queue, name)
        connection.attach(channel)
        return channel

    # --- the consumer -------------------------------------------------------------------------------

    async def consume(self, prefetch: int) -> None:
        """Add a consumer with this prefetch; earlier consumers of this channel go on.

        Raises:
            QueueError: there is no such queue, or we may not read it.
            ConnectError: the queue's node is down, or another client has exclusive use of the queue.
            ConnectionLost: the channel or the connection has ended.
        """
        limit = prefetch if prefetch <= PREFETCH_MAX else 0
        # We choose the tag ourselves: the first delivery may come, and be settled, before the broker's answer.
        tag = f"{self._name}-{next(self._numbers)}"
        self._consumer_tags.append(tag)
        try:
            await self.connection.call(self._library.basic_qos(prefetch_count=limit))
            consume = self._library.basic_consume(self.queue, ignore, consumer_tag=tag)
            await self.connection.call(consume, f"the request to consume {self.queue!r}, which may have no leader,")
        except BaseException as error:
            raise self._ended_by(error) from error

    async def widen(self, prefetch: int) -> None:
        """Change the prefetch; messages in hand stay in hand.

        The broker cannot change the limit of a consumer. So a second consumer replaces the first one. It begins
        before the first one ends, because an auto-delete queue is deleted with its last consumer.

        Raises:
            ConnectionLost: the channel or the connection has ended.
        """
        first = list(self._consumer_tags)
        await self.consume(prefetch)
        await self._cancel(first)

    async def cancel(self) -> None:
        """Stop the deliveries; messages in hand stay in hand.

        Raises:
            ConnectionLost: the channel or the connection has ended.
        """
        await self._cancel(list(self._consumer_tags))

    async def _cancel(self, tags: list[str]) -> None:
        for tag in tags:
            self._consumer_tags.remove(tag)
            if self.error is not None:
                continue
            try:
                await self.connection.call(self._library.basic_cancel(tag))
            except BaseException as error:
                raise self._ended_by(error) from error

    def _ended_by(self, error: BaseException) -> BaseException:
        """Return the error to raise. If the request was given up, end the channel, as the library does."""
        if isinstance(error, ChannelNotFoundEntity) and is_missing(error):
            return missing(self.queue, self.connection.where)
        if isinstance(error, StreamToolsError) or not isinstance(error, CLIENT_ERRORS):
            self.fail("a request was given up")
            return error
        return channel_error(error, self.connection.where)

    def beside(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> asyncio.Task[None]:
        """Run a function in a task of this channel; its error ends the channel and reaches the receiver."""
        task = asyncio.create_task(self._guarded(work, *arguments))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _guarded(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            await work(*arguments)
        except StreamToolsError as error:
            self.end(error)

    # --- deliveries ---------------------------------------------------------------------------------

    def deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        if tag != self._high + 1:  # a delivery is missing, whose acknowledgement the broker would wait for
            raise ValueError(f"delivery {tag} after delivery {self._high}")
        self._high = tag
        self.buffer.append((tag, redelivered, properties, body, self.topic))
        if self._waiter is not None and not self._resting:
            self._wake()

    def end(self, error: StreamToolsError) -> None:
        """End the channel with the error of a task of this channel."""
        if isinstance(error, QueueError) and isinstance(error.__cause__, ChannelAccessRefused):
            self._wrong = error  # for a missing queue the consumer opens again, and declares it
        if self.error is None:
            self.error = ConnectionLost(str(error))
        self._on_end()

    async def arrival(self) -> None:
        """Wait until a delivery is in the buffer.

        Raises:
            ConnectionLost: the channel has ended; the broker delivers the messages in the buffer again.
        """
        while (not self.buffer or self._resting) and self.error is None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self.check()

    def rest(self, seconds: float) -> None:
        """Let messages gather for some seconds, without waking the consumer."""
        self._resting = True
        self._loop.call_later(seconds, self._end_rest)

    def _end_rest(self) -> None:
        self._resting = False
        if self.buffer:
            self._wake()

    def check(self) -> None:
        """Raise ConnectionLost if the channel has ended, or the error of the queue if that is known."""
        if self._wrong is not None:
            raise QueueError(str(self._wrong)) from self._wrong
        if self.error is not None:
            super().check()

    def _on_end(self) -> None:
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- settling -----------------------------------------------------------------------------------

    @property
    def in_hand(self) -> int:
        """The number of deliveries that are not settled."""
        return self._high + 1 - self._low - len(self._settled)

    @property
    def arrived(self) -> int:
        """The number of deliveries so far."""
        return self._high

    def is_settled(self, tag: int) -> bool:
        """Whether this delivery was acknowledged or given back."""
        return tag < self._low or tag in self._settled

    def settle(self, acks: Iterable[int], releases: Iterable[int] = ()) -> None:
        """Acknowledge some deliveries and give others back; skip those that are settled already.

        One frame acknowledges all deliveries up to the first one that is not settled. Later ones are acknowledged one
        by one, so that they do not count against the prefetch while an early one takes long. Messages that are given
        back go to the end of the queue (RabbitMQ does so in quorum queues without a delivery limit). Only when the
        channel is closed do they go to the front, in order.
        """
        done = sorted(tag for tag in set(acks) if not self.is_settled(tag))
        out = self._ack(done) if done else []
        if back := sorted(tag for tag in set(releases) if not self.is_settled(tag)):
            out += self._release(back)
        if out and self.error is None:  # after the end, another channel may have this number
            self.connection.write(b"".join(out))

    def _ack(self, tags: list[int]) -> list[bytes]:
        self._mark(tags)
        low, number = self._low, self.number
        # The tag of a multiple ack must itself be unacknowledged, or the broker acknowledges more than this.
        upto = max((tag for tag in tags if tag < low), default=None)
        out = [] if upto is None else [frames.ack_frame(number, upto, multiple=True)]
        return out + [frames.ack_frame(number, tag, multiple=False) for tag in tags if tag >= low]

    def _release(self, tags: list[int]) -> list[bytes]:
        self._mark(tags)
        return [frames.release_frame(self.number, tag) for tag in tags]

    def _mark(self, tags: Iterable[int]) -> None:
        self._settled.update(tags)
        while self._low in self._settled:
            self._settled.remove(self._low)
            self._low += 1
