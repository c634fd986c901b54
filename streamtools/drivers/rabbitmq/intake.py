"""One consumer's channel: deliveries come in, acknowledgements go out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import count

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from streamtools.drivers.rabbitmq import frames
from streamtools.drivers.rabbitmq.channel import HotChannel
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, lost
from streamtools.drivers.rabbitmq.link import CLOSE_TIMEOUT, Link
from streamtools.drivers.rabbitmq.topology import missing
from streamtools.errors import ConnectionLost, StreamToolsError

#: The largest prefetch that basic.qos can say; 0 stands for no limit.
PREFETCH_MAX = 65_535

#: A delivery as it arrived: tag, redelivered, properties, body.
Raw = tuple[int, bool, bytes, bytes]


class Intake(HotChannel):
    """Receives one queue.

    Parameters:
        link: the connection.
        channel: the library's channel, opened without confirms.
        queue: the queue's name.
    """

    def __init__(self, link: Link, channel: AbstractChannel, queue: str) -> None:
        super().__init__(channel.number)
        self.link = link
        self.queue = queue
        self.buffer: deque[Raw] = deque()
        self._channel = channel
        self._consumer_tag: str | None = None
        self._numbers = count(1)
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        #: Every tag below is settled; of those above, these are.
        self._low = 1
        self._settled: set[int] = set()
        self._high = 0

    @classmethod
    async def open(cls, link: Link, queue: str) -> Intake:
        """Open a channel; nothing is received before `consume()`."""
        intake = cls(link, await link.channel(confirms=False), queue)
        link.attach(intake)
        return intake

    # --- the consumer -------------------------------------------------------------------------------

    async def consume(self, prefetch: int) -> None:
        """Have the broker deliver, with at most `prefetch` in hand.

        Raises:
            QueueError: there is no such queue, or it is exclusive to another connection.
            ConnectionLost: the connection has ended.
        """
        limit = prefetch if prefetch <= PREFETCH_MAX else 0
        try:
            await self.link.call(self._channel.basic_qos(prefetch_count=limit))
            # Named by us, before the answer: the first delivery may be settled before that is seen.
            self._consumer_tag = tag = f"streamtools-{next(self._numbers)}"
            consume = self._channel.basic_consume(self.queue, _never, consumer_tag=tag)
            await self.link.call(consume, f"the request to consume {self.queue!r}, which may have no leader,")
        except ChannelNotFoundEntity as error:
            raise missing(self.queue, self.link.where) from error
        except StreamToolsError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self.link.where) from error

    async def cancel(self) -> None:
        """Have the broker deliver no more; what is in hand stays so.

        Raises:
            ConnectionLost: the connection has ended.
        """
        tag, self._consumer_tag = self._consumer_tag, None
        if tag is None or self.error is not None:
            return
        try:
            await self.link.call(self._channel.basic_cancel(tag))
        except StreamToolsError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self.link.where) from error

    async def close(self) -> None:
        """Close the channel, if the broker answers in time: what is not settled is then back in the queue."""
        with suppress(*CLIENT_ERRORS, TimeoutError):  # else it goes back with the connection
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.link.call(self._channel.close())

    # --- what arrives -------------------------------------------------------------------------------

    def deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self._high = tag
        self.buffer.append((tag, redelivered, properties, body))
        if self._waiter is not None:
            self._wake()

    def fail(self, why: str) -> None:
        if self.error is None:
            self.error: ConnectionLost | None = lost(self.link.where, why)
        self._wake()

    async def arrival(self) -> None:
        """Wait until something is in the buffer.

        Raises:
            ConnectionLost: the channel has ended; what is in the buffer is the broker's again.
        """
        while not self.buffer and self.error is None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self.check()

    def check(self) -> None:
        """Raise ConnectionLost when the channel has ended."""
        if self.error is not None:
            raise ConnectionLost(str(self.error))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- settling -----------------------------------------------------------------------------------

    @property
    def in_hand(self) -> int:
        """Deliveries that are not settled."""
        return self._high + 1 - self._low - len(self._settled)

    @property
    def arrived(self) -> int:
        """Deliveries so far."""
        return self._high

    def is_settled(self, tag: int) -> bool:
        """This delivery has been acknowledged or given back."""
        return tag < self._low or tag in self._settled

    def settle(self, acks: Iterable[int], releases: Iterable[int] = ()) -> None:
        """Acknowledge and give back; what is settled already is left out.

        All that is contiguous from the first unsettled delivery goes as one ack; never past one that
        is unfinished. The rest goes singly: it must not count against the prefetch while an early
        one takes its time. What is given back goes to the queue's end (RabbitMQ does so to quorum queues
        without a delivery limit); only a channel that is closed returns all to the front, in order.
        """
        done = sorted(tag for tag in set(acks) if not self.is_settled(tag))
        out = self._ack(done) if done else []
        if back := sorted(tag for tag in set(releases) if not self.is_settled(tag)):
            out += self._release(back)
        if out:
            self.link.write(b"".join(out))

    def _ack(self, tags: list[int]) -> list[bytes]:
        self._mark(tags)
        low, number = self._low, self.number
        # The tag of a multiple ack must itself be outstanding: else the broker acks past it.
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


async def _never(message: object) -> None:
    """The library's callback: deliveries of this channel never get there."""
