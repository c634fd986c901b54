"""One consumer's channel: deliveries come in, acknowledgements go out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from streamtools.drivers.rabbitmq import frames
from streamtools.drivers.rabbitmq.channel import HotChannel
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, lost
from streamtools.drivers.rabbitmq.link import Link
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
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._last = 0
        #: The last tag that came to an earlier consumer of this channel.
        self._boundary = 0
        #: Every tag below is settled; of those above, these are.
        self._low = 1
        self._settled: set[int] = set()

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
        count = prefetch if prefetch <= PREFETCH_MAX else 0
        self._boundary = self._last
        try:
            await self.link.call(self._channel.basic_qos(prefetch_count=count))
            answer = await self.link.call(self._channel.basic_consume(self.queue, _never))
        except ChannelNotFoundEntity as error:
            raise missing(self.queue, self.link.where) from error
        except StreamToolsError:
            raise
        except CLIENT_ERRORS as error:
            raise channel_error(error, self.link.where) from error
        self._consumer_tag = answer.consumer_tag

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

    # --- what arrives -------------------------------------------------------------------------------

    def deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self.buffer.append((tag, redelivered, properties, body))
        self._last = tag
        if self._waiter is not None:
            self._wake()

    def fail(self, why: str) -> None:
        if self.error is None:
            self.error = lost(self.link.where, why)
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

    def is_settled(self, tag: int) -> bool:
        """This delivery has been acknowledged or given back."""
        return tag < self._low or tag in self._settled

    def settle(self, acks: Iterable[int], releases: Iterable[int] = ()) -> None:
        """Acknowledge and give back; what is settled already is left out.

        All that is contiguous from the first unsettled delivery goes as one ack; never past one that
        is unfinished. The rest goes singly: it must not count against the prefetch while an early
        one takes its time.
        """
        done = sorted(tag for tag in set(acks) if not self.is_settled(tag))
        # First the acks: what is given back as "all up to" must find them done.
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
        """Together where nothing unfinished is in between: a quorum queue keeps the order of such a return only.

        Seen on RabbitMQ 3.10: returns that follow each other closely come back in another order.
        """
        self._mark(tags)
        low, number = self._low, self.number
        together = [tag for tag in tags if tag < low]
        # The broker returns what two consumers of the channel held in an order of its own.
        parts = ([t for t in together if t <= self._boundary], [t for t in together if t > self._boundary])
        out = [frames.release_frame(number, part[-1], multiple=True) for part in parts if part]
        return out + [frames.release_frame(number, tag, multiple=False) for tag in tags if tag >= low]

    def _mark(self, tags: Iterable[int]) -> None:
        self._settled.update(tags)
        while self._low in self._settled:
            self._settled.remove(self._low)
            self._low += 1

    def only(self, tags: Iterable[int]) -> bool:
        """Nothing is unsettled but these and what is in the buffer."""
        mine = {*tags, *(raw[0] for raw in self.buffer)}
        return all(tag in mine or tag in self._settled for tag in range(self._low, self._last + 1))

    def give_back(self, tags: Iterable[int] = ()) -> None:
        """Give these back, and what nobody has taken yet."""
        if self.error is None:
            self.settle((), [*tags, *(raw[0] for raw in self.buffer)])
        self.buffer.clear()


async def _never(message: object) -> None:
    """The library's callback: deliveries of this channel never get there."""
