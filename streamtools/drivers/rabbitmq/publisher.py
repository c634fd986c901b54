"""Publishing with confirms: many in flight, one future for each batch.

A batch is written in chunks while the window has room, each chunk in one piece; the broker confirms
in any order, singly or up to a number. A message that reaches no queue comes back before its
confirm does, and is then refused.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq import frames, properties
from streamtools.drivers.rabbitmq.channel import HotChannel
from streamtools.drivers.rabbitmq.delay import PREFIX, DelayChain
from streamtools.drivers.rabbitmq.errors import lost
from streamtools.drivers.rabbitmq.frames import Unsendable
from streamtools.drivers.rabbitmq.link import Link
from streamtools.drivers.rabbitmq.topology import Topology
from streamtools.errors import ConfigurationError, ConnectionLost, StreamToolsError
from streamtools.exchange import Exchange, no_subscriber
from streamtools.message import Message, ids

log: logging.Logger = logging.getLogger("streamtools")

#: Messages written and not yet confirmed, at most.
WINDOW: Final = 2000
#: Messages written in one piece.
CHUNK: Final = 100
#: Seconds without a confirmation after which that is said; less than a sender waits by default, so that it helps.
SLOW: Final = 20.0
#: Looks in this time.
LOOKS: Final = 4
#: Seconds for a confirmation that may be on its way.
GRACE: Final = 1.0
#: Routes remembered with their encoded frames.
ROUTES: Final = 1000
#: Bytes that RabbitMQ 3.8 to 3.13 takes in one body (max_message_size); 4.0 takes 16 MiB by default.
BODY_MAX: Final = 128 * 1024 * 1024
#: "message size 20000000 is larger than configured max size 16777216"
_TOO_LARGE: Final = re.compile(r"message size \d+ .*max size (\d+)")


class Limits:
    """What the broker was found to take; kept over reconnects.

    Attributes:
        body: bytes in one body, at most.
    """

    def __init__(self) -> None:
        self.body: int = BODY_MAX

    def learn(self, why: str) -> None:
        """Read a channel's end: a body over the limit ends it, and must not be sent again."""
        if found := _TOO_LARGE.search(why):
            self.body = min(self.body, int(found[1]))


class Batch:
    """What one call publishes, until all of it is confirmed."""

    __slots__ = ("future", "left", "levels", "nacked", "refused", "spans", "words")

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future: asyncio.Future[None] = future
        self.left: int = 0
        #: Message id -> why AMQP cannot carry it, or the broker cannot route it.
        self.refused: dict[str, str] = {}
        #: Message id -> why its queue did not take it.
        self.nacked: dict[str, str] = {}
        #: (first tag, messages) of what was written.
        self.spans: list[tuple[int, list[Message]]] = []
        #: Message id -> the last word of its route through the delay chain, of those due later.
        self.words: dict[str, str] = {}
        #: Message id -> the level of the delay chain that it was sent to.
        self.levels: dict[str, str] = {}

    def message(self, tag: int) -> Message:
        """The message that was written under this tag."""
        return next(m[tag - first] for first, m in self.spans if first <= tag < first + len(m))

    def settle_if_done(self) -> None:
        """Wake the caller when nothing is outstanding."""
        if self.left == 0 and not self.future.done():
            self.future.set_result(None)


class Publisher(HotChannel):
    """A channel in confirm mode.

    Parameters:
        link: the connection.
        channel: the library's channel, opened with confirms.
        limits: what the broker is known to take.
        after: the channel before it on this connection, whose knowledge of what stands it takes over.
    """

    def __init__(self, link: Link, channel: AbstractChannel, limits: Limits, after: Publisher | None = None) -> None:
        super().__init__(channel.number)
        self._link = link
        self._channel = channel
        self._limits = limits
        self._delay: DelayChain = DelayChain(link) if after is None else after._delay
        self._next = 1
        self._low = 1
        self._pending: dict[int, Batch] = {}
        self._returned: set[tuple[str, str]] = set()
        self._routes: dict[tuple[str, str], bytes] = {}
        self._topology = Topology(link)
        self._exchanges: set[Exchange] = set() if after is None else after._exchanges
        self._users = 0
        self._retired = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._new_id = ids()
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        #: The tags written last at each of the last looks.
        self._looks: deque[int] = deque(maxlen=LOOKS)
        self._probe: asyncio.Task[None] | None = None
        #: What was written long ago is not confirmed: nothing more is written here.
        self.stuck: bool = False

    @classmethod
    async def open(cls, link: Link, limits: Limits, *, after: Publisher | None = None) -> Publisher:
        """Open a channel for publishing on this connection."""
        publisher = cls(link, await link.channel(confirms=True), limits, after)
        link.attach(publisher)
        return publisher

    async def publish(self, messages: Sequence[Message]) -> tuple[dict[str, str], dict[str, str]]:
        """Publish once; ids with reasons of what cannot be sent, and of what the broker did not take just now.

        Raises:
            ConnectionLost: the connection ended; nothing is known of what was not confirmed.
        """
        self._users += 1
        try:
            return await self._publish(messages)
        finally:
            self._users -= 1
            self._close_if_done()

    def retire(self) -> None:
        """Close the channel once nobody publishes on it any more."""
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and self._users == 0 and self.error is None:
            self._watch_no_more()
            self.error: ConnectionLost | None = lost(self._link.where, "its channel was replaced")
            self._link.discard(self, self._channel)

    async def _publish(self, messages: Sequence[Message]) -> tuple[dict[str, str], dict[str, str]]:
        batch = Batch(self._loop.create_future())
        # Held open by one until all is written: confirms may come before the last chunk is.
        batch.left = 1
        for start in range(0, len(messages), CHUNK):
            await self._room()
            if self.stuck:
                why = f"A channel of RabbitMQ at {self._link.where} gives no confirmations."
                batch.nacked.update(dict.fromkeys((m.id for m in messages[start:]), why))
                break
            chunk = messages[start : start + CHUNK]
            await self._exchanges_of(chunk, batch)
            await self._prepare_delays(chunk, batch)
            self._write(chunk, batch)
            await self._link.drain()
        batch.left -= 1
        batch.settle_if_done()
        await batch.future
        return batch.refused, batch.nacked

    # --- writing ------------------------------------------------------------------------------------

    async def _room(self) -> None:
        while self.error is None and not self.stuck and len(self._pending) >= WINDOW:
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake(1)  # it was meant for us; pass it on
                raise
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise ConnectionLost(str(self.error))

    async def _exchanges_of(self, chunk: Sequence[Message], batch: Batch) -> None:
        """Make the exchanges that are not known to be there: a message to one that is missing ends the channel."""
        for message in chunk:
            if message.exchange is None or message.exchange in self._exchanges:
                continue
            try:
                await self._topology.declare_exchange(message.exchange)
            except ConfigurationError as error:
                batch.refused[message.id] = str(error)
            else:
                self._exchanges.add(message.exchange)

    async def _prepare_delays(self, chunk: Sequence[Message], batch: Batch) -> None:
        now = time.time()
        for message in chunk:
            if message.deliver_at is None or message.deliver_at <= now or message.id in batch.refused:
                continue
            try:
                batch.words[message.id] = await self._delay.prepare(message, now)
            except ConfigurationError as error:
                batch.refused[message.id] = str(error)
            except Unsendable as error:
                batch.refused[message.id] = f"Message {message.id} cannot be sent: {error}"

    def _write(self, chunk: Sequence[Message], batch: Batch) -> None:
        self._check()
        out: list[bytes] = []
        written: list[Message] = []
        for message in chunk:
            if message.id in batch.refused:
                continue
            try:
                out.append(self._encode(message, batch))
            except Unsendable as error:
                batch.refused[message.id] = f"Message {message.id} cannot be sent: {error}"
            else:
                written.append(message)
        if not written:
            return
        first, self._next = self._next, self._next + len(written)
        batch.spans.append((first, written))
        batch.left += len(written)
        self._pending.update(dict.fromkeys(range(first, self._next), batch))
        if self._watch is None:
            self._look_later()
        self._send(out)

    def _encode(self, message: Message, batch: Batch) -> bytes:
        body, number, frame_max = message.body, self.number, self._link.frame_max
        if len(body) > self._limits.body:
            raise Unsendable(
                f"its body is {len(body)} bytes; this broker takes {self._limits.body} (max_message_size). "
                "Store it elsewhere and send where it is."
            )
        header = frames.header_frame(number, properties.encode(message), len(body), frame_max)
        return self._route(message, batch) + header + frames.body_frames(number, body, frame_max)

    def _route(self, message: Message, batch: Batch) -> bytes:
        if batch.words and message.id in batch.words:
            exchange, key = self._way(message, batch)
            if key:  # else it has become due meanwhile
                batch.levels[message.id] = exchange
                return frames.publish_frame(self.number, exchange, key)
        exchange = "" if message.exchange is None else message.exchange.name
        route = self._routes.get((exchange, message.queue))
        if route is None:
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            route = frames.publish_frame(self.number, exchange, message.queue)
            self._routes[exchange, message.queue] = route
        return route

    def _way(self, message: Message, batch: Batch) -> tuple[str, str]:
        """Exchange and routing key for a message that was to be delayed; two empty strings once it is due."""
        return self._delay.route((message.deliver_at or 0.0) - time.time(), batch.words[message.id])

    def _send(self, out: list[bytes]) -> None:
        # What many tasks publish in one turn of the loop leaves in one piece.
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += out

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self.error is None:
            self._link.write(b"".join(out))

    def _look_for_slow(self) -> None:
        """Say it when the oldest message has waited for its confirmation since the last look, and try to help it."""
        slow = self._looks[0] if len(self._looks) == LOOKS else 0
        oldest = next(iter(self._pending), None)
        if oldest is not None and oldest <= slow and not self._link.blocked:
            self._looks.clear()
            self.stuck = True
            batch = self._pending[oldest]
            message = batch.message(oldest)
            queue = batch.levels.get(message.id) or message.queue
            log.warning(
                "RabbitMQ at %s has not confirmed a message to %r for %g s; that queue, or one that its channel sent "
                "to before, may have no leader: rabbitmq-queues quorum_status %s",
                self._link.where, queue, SLOW, queue,
            )  # fmt: skip
            self._wake(len(self._waiting))
            self._send_past_levels(slow)
            self._probe_oldest(slow)
        self._watch = None
        if self._pending:
            self._look_later()
        else:
            self._looks.clear()

    def _look_later(self) -> None:
        self._looks.append(0 if self._link.blocked else self._next - 1)
        self._watch = self._loop.call_later(SLOW / LOOKS, self._look_for_slow)

    def _send_past_levels(self, slow: int) -> None:
        """Have delayed messages sent again on a way that needs no level which has not confirmed them for long."""
        waits = [(tag, batch, batch.message(tag)) for tag, batch in self._pending.items() if tag <= slow]
        late = [(tag, batch, message) for tag, batch, message in waits if message.id in batch.levels]
        for _, batch, message in late:
            self._delay.avoid(batch.levels[message.id])
        for tag, batch, message in late:
            level = batch.levels[message.id]
            if self._way(message, batch)[0] != level:
                self._give_back(tag, _no_level(message, level, self._link.where))

    def _give_back(self, tag: int, why: str) -> None:
        """Have a message sent again, over a new channel: this one may wait for a queue that gives no answer."""
        batch = self._pending.pop(tag)
        batch.nacked[batch.message(tag).id] = why
        batch.left -= 1
        batch.settle_if_done()

    def _probe_oldest(self, slow: int) -> None:
        waits = (tag for tag, batch in self._pending.items() if tag <= slow and not batch.future.done())
        tag = next(waits, None)  # None: all their callers have given up
        if tag is not None and (self._probe is None or self._probe.done()):
            self._probe = self._loop.create_task(self._send_again(tag, self._pending[tag].message(tag)))

    async def _send_again(self, tag: int, message: Message) -> None:
        """Send a message over another connection; if that is confirmed, and this one is not, our channel is dead.

        A channel whose first message to a queue finds no leader there stands still for 65 s (rabbit_fifo_client in
        3.10: net_ticktime + 5). And a channel can forget to send again what a queue has not got (seen on 3.10 when
        the writer of its log was killed; github.com/rabbitmq/rabbitmq-server/pull/13095 and /14589 tell of other
        ways, up to 4.1). A queue that is merely slow confirms neither; it may have this one message twice in the end.
        """
        try:
            async with asyncio.timeout(SLOW):
                link = await self._link.another()
                try:
                    refused, nacked = await (await Publisher.open(link, self._limits)).publish([message])
                finally:
                    await link.close()
        except (StreamToolsError, TimeoutError):
            return  # it is not only ours; at the next look it is tried again
        await asyncio.sleep(GRACE)
        if not refused and not nacked and tag in self._pending:
            why = f"A channel of RabbitMQ at {self._link.where} does not confirm a message, and another one does."
            log.warning("%s All that it has not confirmed is sent again.", why)
            for unconfirmed in list(self._pending):
                self._give_back(unconfirmed, why)

    def _watch_no_more(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._probe is not None:
            self._probe.cancel()

    # --- what the broker says -----------------------------------------------------------------------

    def confirm(self, tag: int, *, multiple: bool, held: bool) -> None:
        if not multiple:
            self._confirm_one(tag, held)
        else:
            for number in range(self._low, tag + 1):
                self._confirm_one(number, held)
            self._low = tag + 1
        if self._waiting:
            self._wake(WINDOW - len(self._pending))

    def _wake(self, number: int) -> None:
        while self._waiting and number > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                number -= 1

    def _confirm_one(self, tag: int, held: bool) -> None:
        batch = self._pending.pop(tag, None)
        if batch is None:
            return
        if not held or self._returned:
            self._refuse(batch, tag, held)
        batch.left -= 1
        if batch.left == 0:
            batch.settle_if_done()

    def _refuse(self, batch: Batch, tag: int, held: bool) -> None:
        message = batch.message(tag)
        if (message.id, message.queue) in self._returned:
            self._returned.discard((message.id, message.queue))
            if message.mandatory:
                batch.refused[message.id] = self._unrouted(message)
        elif message.deliver_at is not None and (back := self._back_from_chain(message)) is not None:
            self._returned.discard(back)
            self._delay.forget()  # so that the next try makes it anew
            batch.nacked[message.id] = _no_level(message, f"one of {PREFIX}", self._link.where)
        elif not held:
            batch.nacked[message.id] = (
                f"The queue {message.queue!r} at {self._link.where} does not take it: it is full (x-max-length "
                "with x-overflow reject-publish), or its node has failed."
            )

    def _back_from_chain(self, message: Message) -> tuple[str, str] | None:
        """What was returned, when it is this message: it had a route through the delay chain for its key."""
        found = (r for r in self._returned if r[0] == message.id and self._delay.is_route(r[1], message))
        return next(found, None)

    def _unrouted(self, message: Message) -> str:
        if message.exchange is not None:
            return str(no_subscriber(message.queue, message.exchange))
        return (
            f"There is no queue {message.queue!r} at {self._link.where}. Open a consumer of it first, or a "
            "producer with declare=True."
        )

    def returned(self, routing_key: str, properties_: bytes, body: bytes) -> None:
        message, _ = properties.decode(properties_, body, "", self._new_id)
        self._returned.add((message.id, routing_key))

    def fail(self, why: str) -> None:
        if self.error is not None:
            return
        self._watch_no_more()
        self._limits.learn(why)
        self.error = lost(self._link.where, why)
        for batch in dict.fromkeys(self._pending.values()):
            if not batch.future.done():
                batch.future.set_exception(lost(self._link.where, why))
                batch.future.exception()  # its caller may have been cancelled
        self._pending.clear()
        self._wake(len(self._waiting))


def _no_level(message: Message, level: str, where: str) -> str:
    return (
        f"The delay of a message to {message.queue!r} needs a queue that is gone from {where}, or gives no answer: "
        f"{level}."
    )
