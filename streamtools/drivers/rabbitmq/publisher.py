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
#: Seconds without a confirmation after which that is said.
SLOW: Final = 30.0
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

    __slots__ = ("future", "left", "nacked", "refused", "spans")

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future: asyncio.Future[None] = future
        self.left: int = 0
        #: Message id -> why AMQP cannot carry it, or the broker cannot route it.
        self.refused: dict[str, str] = {}
        #: Message id -> why its queue did not take it.
        self.nacked: dict[str, str] = {}
        #: (first tag, messages) of what was written.
        self.spans: list[tuple[int, list[Message]]] = []

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
        self._watched = 0
        self._probe: asyncio.Task[None] | None = None
        #: What was written long ago is not confirmed: what comes now is better sent over another channel.
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
            chunk = messages[start : start + CHUNK]
            await self._exchanges_of(chunk, batch)
            routes = await self._delayed_routes(chunk, batch)
            self._write(chunk, routes, batch)
            await self._link.drain()
        batch.left -= 1
        batch.settle_if_done()
        await batch.future
        return batch.refused, batch.nacked

    # --- writing ------------------------------------------------------------------------------------

    async def _room(self) -> None:
        while self.error is None and len(self._pending) >= WINDOW:
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

    async def _delayed_routes(self, chunk: Sequence[Message], batch: Batch) -> dict[str, str]:
        """Message id -> the last word of its route through the delay chain, for those due later."""
        now = time.time()
        later = [m for m in chunk if m.deliver_at is not None and m.deliver_at > now and m.id not in batch.refused]
        routes: dict[str, str] = {}
        for message in later:
            try:
                routes[message.id] = await self._delay.prepare(message, now)
            except ConfigurationError as error:
                batch.refused[message.id] = str(error)
            except Unsendable as error:
                batch.refused[message.id] = f"Message {message.id} cannot be sent: {error}"
        return routes

    def _write(self, chunk: Sequence[Message], routes: dict[str, str], batch: Batch) -> None:
        self._check()
        out: list[bytes] = []
        written: list[Message] = []
        for message in chunk:
            if message.id in batch.refused:
                continue
            try:
                out.append(self._encode(message, routes))
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
            self._watch = self._loop.call_later(SLOW, self._look_for_slow)
        self._send(out)

    def _encode(self, message: Message, routes: dict[str, str]) -> bytes:
        body, number, frame_max = message.body, self.number, self._link.frame_max
        if len(body) > self._limits.body:
            raise Unsendable(
                f"its body is {len(body)} bytes; this broker takes {self._limits.body} (max_message_size). "
                "Store it elsewhere and send where it is."
            )
        header = frames.header_frame(number, properties.encode(message), len(body), frame_max)
        return self._route(message, routes) + header + frames.body_frames(number, body, frame_max)

    def _route(self, message: Message, routes: dict[str, str]) -> bytes:
        if routes and (word := routes.get(message.id)) is not None and message.deliver_at is not None:
            exchange, key = self._delay.route(message.deliver_at - time.time(), word)
            if key:  # else it has become due meanwhile
                return frames.publish_frame(self.number, exchange, key)
        exchange = "" if message.exchange is None else message.exchange.name
        route = self._routes.get((exchange, message.queue))
        if route is None:
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            route = frames.publish_frame(self.number, exchange, message.queue)
            self._routes[exchange, message.queue] = route
        return route

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
        oldest = next(iter(self._pending), None)
        if oldest is not None and oldest <= self._watched and not self._link.blocked:
            self.stuck = True
            log.warning(
                "RabbitMQ at %s has not confirmed a message to %r for %g s; that queue, or one of streamtools.delay, "
                "may have no leader: rabbitmq-queues quorum_status NAME.",
                self._link.where, self._pending[oldest].message(oldest).queue, SLOW,
            )  # fmt: skip
            self._probe_oldest()
        self._watched = 0 if self._link.blocked else self._next - 1
        self._watch = self._loop.call_later(SLOW, self._look_for_slow) if self._pending else None

    def _probe_oldest(self) -> None:
        waits = (tag for tag, batch in self._pending.items() if tag <= self._watched and not batch.future.done())
        tag = next(waits, None)  # None: all their callers have given up
        if tag is not None and (self._probe is None or self._probe.done()):
            self._probe = self._loop.create_task(self._send_again(tag, self._pending[tag].message(tag)))

    async def _send_again(self, tag: int, message: Message) -> None:
        """Send a message over another connection; if that is confirmed, and this one is not, our channel is dead.

        RabbitMQ's channels can forget to send again what a queue has not got (seen on 3.10 when the writer of its
        log was killed; github.com/rabbitmq/rabbitmq-server/pull/13095 and /14589 tell of other ways, up to 4.1).
        A queue that is merely slow confirms neither; it may have this one message twice in the end.
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
            self.fail("it does not confirm a message, and does on another connection")

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
            batch.nacked[message.id] = (
                f"The delay of a message to {message.queue!r} needs a queue that is gone from {self._link.where}: "
                f"one of {PREFIX}."
            )
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
