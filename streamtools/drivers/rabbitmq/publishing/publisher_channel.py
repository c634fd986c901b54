"""Publishing with confirms: many in flight, one future for each batch.

A batch is written in chunks while the window has room, each chunk in one piece; the broker confirms
in any order, singly or up to a number. A message that reaches no queue comes back before its
confirm does, and is then refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp import frames, properties
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.amqp.frames import NeverSent, TooEarly, Unsendable
from streamtools.drivers.rabbitmq.connections import Sending
from streamtools.drivers.rabbitmq.errors import channel_lost, lost, trouble
from streamtools.drivers.rabbitmq.publishing.batch import EXCHANGE, Batch, Limits
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.delay_chain import PREFIX, DelayChain, Unheld
from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost, StreamToolsError
from streamtools.exchange import no_subscriber
from streamtools.message import Message, id_generator

log: logging.Logger = logging.getLogger("streamtools")

#: Messages written and not yet confirmed, at most.
WINDOW: Final = 2000
#: Messages written in one piece.
CHUNK: Final = 100
#: Seconds without a confirmation after which another channel is asked whether it gets one from the same queue. With
#: TRIAL_TIMEOUT this is less than a sender waits by default, so that it helps.
CONFIRM_TIMEOUT: Final = 15.0
#: Looks in this time.
CHECKS: Final = 4
#: Seconds for that answer.
TRIAL_TIMEOUT: Final = 5.0
#: Seconds for a confirmation that may be on its way.
GRACE_TIMEOUT: Final = 1.0
#: Queues asked at once.
ASKED: Final = 50
#: Seconds until a queue that gave no answer is asked again; doubled each time, up to the last.
ASK_INTERVAL: Final = (15.0, 300.0)
#: Routes remembered with their encoded frames.
ROUTES: Final = 1000


class PublisherChannel(FastChannel):
    """A channel in confirm mode.

    Parameters:
        sending: the connection, and what is known of it.
        channel: the library's channel, opened with confirms.
        limits: what the broker is known to take.
        declares: exchanges and queues of delays that are missing are made.
    """

    def __init__(self, sending: Sending, channel: AbstractChannel, limits: Limits, *, declares: bool = True) -> None:
        super().__init__(channel.number)
        self._sending = sending
        self._connection: Connection = sending.connection
        self._library = channel
        self._limits = limits
        self._declares = declares
        self._delay: DelayChain = sending.chain
        self._next = 1
        self._low = 1
        self._pending: dict[int, Batch] = {}
        #: How often one of this id and routing key came back, and was not confirmed since.
        self._returned: Counter[tuple[str, str]] = Counter()
        self._routes: dict[tuple[str, str], bytes] = {}
        self._topology = Declarations(sending.connection)
        self._users = 0
        self._retired = False
        self._discarded = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._new_id = id_generator()
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        #: The tags written last at each of the last looks.
        self._looks: deque[int] = deque(maxlen=CHECKS)
        #: What gave no answer here for long: whether it gave another channel one.
        self._answers: dict[str, bool] = {}
        #: Those that gave none: when they are asked again, on the loop's clock, and seconds until then.
        self._ask_at: dict[str, tuple[float, float]] = {}
        self._trial: asyncio.Task[None] | None = None
        #: What was written long ago is not confirmed: nothing more is written here.
        self.stuck: bool = False

    @classmethod
    async def open(cls, sending: Sending, limits: Limits, *, declares: bool = True) -> PublisherChannel:
        """Open a channel for publishing on this connection."""
        channel = cls(sending, await sending.connection.channel(confirms=True), limits, declares=declares)
        sending.connection.attach(channel)
        return channel

    async def publish(self, messages: Sequence[Message]) -> Batch:
        """Publish once; what cannot be sent, and what the broker did not take just now, stands in the batch.

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
        if self._retired and self._users == 0 and not self._discarded:
            self._discarded = True
            self._watch_no_more()
            self.error = self.error or channel_lost(self._connection.where, "it was replaced")
            self._connection.discard(self, self._library)

    async def _publish(self, messages: Sequence[Message]) -> Batch:
        batch = Batch(self._loop.create_future())
        # Held open by one until all is written: confirms may come before the last chunk is.
        batch.left = 1
        for start in range(0, len(messages), CHUNK):
            chunk = messages[start : start + CHUNK]
            await self._exchanges_of(chunk, batch)
            await self._prepare_delays(chunk, batch)
            await self._room()
            if self.stuck or self.closed:
                why = str(self.error) if self.closed else self._silence
                left = (id(m) for m in messages[start:] if id(m) not in batch.refused)
                batch.nacked.update(dict.fromkeys(left, why))
                break
            self._write(chunk, batch)
            await self._connection.drain()
        batch.left -= 1
        batch.settle_if_done()
        await batch.future
        return batch

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
        if self.error is not None and not self.closed:
            raise ConnectionLost(str(self.error))

    async def _exchanges_of(self, chunk: Sequence[Message], batch: Batch) -> None:
        """Make the exchanges that are not known to be there: a message to one that is missing ends the channel."""
        for message in chunk:
            if message.exchange is None or message.exchange in self._sending.exchanges:
                continue
            try:
                await self._topology.declare_exchange(message.exchange, self._declares)
            except ConfigurationError as error:
                batch.refused[id(message)] = str(error)
            except ConnectionLost:
                raise
            except ConnectError as error:
                batch.nacked[id(message)] = str(error)
            else:
                self._sending.exchanges.add(message.exchange)

    async def _prepare_delays(self, chunk: Sequence[Message], batch: Batch) -> None:
        now = time.time()
        for message in chunk:
            if message.deliver_at is None or message.deliver_at <= now or batch.is_held_back(message):
                continue
            try:
                batch.words[id(message)] = await self._delay.prepare(message, now, declares=self._declares)
            except Unheld as error:
                batch.refused[id(message)] = TooEarly(error)
            except ConfigurationError as error:
                batch.refused[id(message)] = str(error)
            except Unsendable as error:
                batch.refused[id(message)] = NeverSent(f"Message {message.id} cannot be sent: {error}")
            except ConnectionLost:
                raise
            except ConnectError as error:
                batch.nacked[id(message)] = str(error)

    def _write(self, chunk: Sequence[Message], batch: Batch) -> None:
        self._check()
        out: list[bytes] = []
        written: list[Message] = []
        is_part = bool(batch.refused or batch.nacked)
        for message in chunk:
            if is_part and batch.is_held_back(message):
                continue
            try:
                out.append(self._encode(message, batch))
            except Exception as error:  # Unsendable, or whatever is wrong in it: it is this message's alone
                batch.refused[id(message)] = NeverSent(f"Message {message.id} cannot be sent: {error}")
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
        body, number, frame_max = message.body, self.number, self._connection.frame_max
        if body is None:
            raise Unsendable("it has no body (a tombstone), which AMQP cannot carry; kafka:// can.")
        if len(body) > self._limits.body:
            raise Unsendable(
                f"its body is {len(body)} bytes; this broker takes {self._limits.body} (max_message_size). "
                "Store it elsewhere and send where it is."
            )
        header = frames.header_frame(number, properties.encode(message), len(body), frame_max)
        return self._route(message, batch) + header + frames.body_frames(number, body, frame_max)

    def _route(self, message: Message, batch: Batch) -> bytes:
        if batch.words and (word := batch.words.get(id(message))) is not None:
            way = self._delay.route((message.deliver_at or 0.0) - time.time(), word)
            if way[1]:  # else it has become due meanwhile
                batch.ways[id(message)] = way
        if batch.ways and id(message) in batch.ways:
            return frames.publish_frame(self.number, *batch.ways[id(message)])
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
            self._connection.write(b"".join(out))

    # --- what is not confirmed ----------------------------------------------------------------------

    @property
    def _silence(self) -> str:
        return f"A channel of RabbitMQ at {self._connection.where} confirms nothing any more."

    def _look_for_slow(self) -> None:
        """Help what waits for its confirmation since the first of the last looks.

        A channel whose first message to a queue finds no leader there stands still for 65 s (rabbit_fifo_client in
        3.10: net_ticktime + 5). And a channel can forget to send again what a queue has not got (seen on 3.10 when
        the writer of its log was killed; github.com/rabbitmq/rabbitmq-server/pull/13095 and /14589 tell of other
        ways, up to 4.1). So each queue concerned is asked over a channel of its own, by one message.
        """
        slow = self._looks[0] if len(self._looks) == CHECKS else 0
        oldest = next(iter(self._pending), None)
        if oldest is not None and oldest <= slow and not self._connection.blocked:
            self.stuck = True
            self._wake(len(self._waiting))
            self._help(self._looks[-1])  # what is behind it, too
        self._watch = None
        if self._pending:
            self._look_later()
        else:
            self._looks.clear()

    def _look_later(self) -> None:
        self._looks.append(0 if self._connection.blocked else self._next - 1)
        self._watch = self._loop.call_later(CONFIRM_TIMEOUT / CHECKS, self._look_for_slow)

    def _help(self, last: int) -> None:
        """Of what was written up to `last`, have sent again what need not wait, and ask about the rest."""
        unknown: dict[str, int] = {}
        for tag, batch in [(tag, batch) for tag, batch in self._pending.items() if tag <= last]:
            place, is_level = _place(batch.message(tag), batch)
            if self._answers.get(place) or (is_level and place in self._answers):
                self._give_back(tag)
            elif not batch.future.done() and self._ask_at.get(place, (0.0, 0.0))[0] <= self._loop.time():
                if len(unknown) < ASKED:
                    unknown.setdefault(place, tag)
        if unknown and (self._trial is None or self._trial.done()):
            self._trial = self._loop.create_task(self._try(unknown, last))

    def _give_back(self, tag: int) -> None:
        """Have a message sent again, over a new channel."""
        batch = self._pending.pop(tag)
        batch.nacked[id(batch.message(tag))] = self._silence
        batch.left -= 1
        batch.settle_if_done()

    async def _try(self, places: dict[str, int], last: int) -> None:
        """Send one message to each place over another connection, a channel for each; help those that wait."""
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                connection = await self._connection.another()
        except (StreamToolsError, TimeoutError):
            return  # it is not only ours; at the next look it is tried again
        try:
            other = Sending(connection)
            held = await asyncio.gather(*(self._ask(other, tag) for tag in places.values()))
            await asyncio.sleep(GRACE_TIMEOUT)
            if not (connection.lost or connection.blocked or self._connection.blocked):
                self._learn(dict(zip(places.items(), held, strict=True)))
                self._help(last)
        finally:
            await connection.close()

    def _learn(self, held: dict[tuple[str, int], bool | None]) -> None:
        waiting = {asked: holds for asked, holds in held.items() if asked[1] in self._pending}
        for (place, tag), holds in waiting.items():
            self._answers[place] = holds is not None
            if holds is None:
                self._note_silence(place, self._pending[tag].message(tag), self._pending[tag])
            elif holds:
                self._confirm_one(tag, True)
        if answering := [place for (place, _), holds in waiting.items() if holds is not None]:
            log.warning(
                "A channel of RabbitMQ at %s does not confirm messages to %s%s, and another one does; what it "
                "has not confirmed is sent again.",
                self._connection.where, ", ".join(map(repr, answering[:5])), ", ..." if answering[5:] else "",
            )  # fmt: skip

    async def _ask(self, other: Sending, tag: int) -> bool | None:
        """Whether the broker holds a copy of this message; None: it gives no answer."""
        batch = self._pending.get(tag)
        if batch is None:
            return None
        message = batch.message(tag)
        copy = Batch(self._loop.create_future())
        if id(message) in batch.ways:
            copy.ways[id(message)] = batch.ways[id(message)]
        try:
            async with asyncio.timeout(TRIAL_TIMEOUT):
                channel = await PublisherChannel.open(other, self._limits)
                channel._write([message], copy)
                channel._watch_no_more()  # it is we who wait for it
                await copy.future
        except (StreamToolsError, TimeoutError):
            return None
        return not copy.refused and not copy.again

    def _note_silence(self, place: str, message: Message, batch: Batch) -> None:
        _, waited = self._ask_at.get(place, (0.0, 0.0))
        wait = min(2 * waited, ASK_INTERVAL[1]) or ASK_INTERVAL[0]
        self._ask_at[place] = self._loop.time() + wait, wait
        if _place(message, batch)[1]:
            self._delay.avoid(place)
        log.warning(
            "RabbitMQ at %s has not confirmed a message to %r for %g s, nor one over a new channel; its queue "
            "may have no leader: rabbitmq-queues quorum_status.", self._connection.where, place, CONFIRM_TIMEOUT,
        )  # fmt: skip

    def _watch_no_more(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._trial is not None:
            self._trial.cancel()

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
            self._returned -= Counter([(message.id, message.queue)])
            if message.mandatory:
                batch.refused[id(message)] = self._unrouted(message)
                if message.exchange is None:
                    batch.unrouted.add(id(message))
        elif message.deliver_at is not None and (back := self._back_from_chain(message)) is not None:
            self._returned -= Counter([back])
            self._delay.forget()  # so that the next try makes it anew
            batch.nacked[id(message)] = (
                f"The delay of a message to {message.queue!r} needs a queue that is gone from "
                f"{self._connection.where}: one of {PREFIX}."
            )
        elif not held:
            # Whoever asked gave a reply's address: the request does not wait for a queue that is full.
            kept = batch.refused if message.intent == "reply" else batch.nacked
            kept[id(message)] = (
                f"The queue {message.queue!r} at {self._connection.where} does not take it: it is full (x-max-length "
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
            f"There is no queue {message.queue!r} at {self._connection.where}. Open a consumer of it first, or a "
            "producer with declare=True."
        )

    def returned(self, routing_key: str, properties_: bytes, body: bytes) -> None:
        message, _ = properties.decode(properties_, body, "", self._new_id)
        self._returned[message.id, routing_key] += 1

    def fail(self, why: str, *, connection: bool = False) -> None:
        if self.error is not None:
            return
        self._watch_no_more()
        make = lost if connection else channel_lost
        self.error = make(self._connection.where, why)
        for batch in dict.fromkeys(self._pending.values()):
            if not batch.future.done():
                batch.future.set_exception(make(self._connection.where, why))
                batch.future.exception()  # its caller may have been cancelled
        self._pending.clear()
        self._wake(len(self._waiting))

    def refuse(self, code: int, text: str) -> None:
        """One message has ended the channel, and nothing is known of the others that are not confirmed."""
        if self.error is not None:
            return
        self._watch_no_more()
        self._limits.learn(text)
        kind = trouble(code, text)
        self.error: ConnectionLost | None = channel_lost(self._connection.where, f"{code} {text}")
        why = f"RabbitMQ at {self._connection.where} {'cannot take it now' if kind.passes else 'refuses it'}: {text}."
        pending, self._pending = self._pending, {}
        meant = {tag for tag, batch in pending.items() if batch.is_meant(text, batch.message(tag), self._limits)}
        if code == 404:
            self._forget(text)
        for tag, batch in pending.items():
            message = batch.message(tag)
            if tag not in meant:
                batch.doubt(message, why, alone=not meant)
            elif kind.passes or code == 404:
                batch.nacked[id(message)] = why
            else:
                batch.refused[id(message)] = self._reason(why, text, is_delayed=id(message) in batch.ways)
            batch.left -= 1
        for batch in dict.fromkeys(pending.values()):
            batch.passes = kind.passes
            batch.settle_if_done()
        self._wake(len(self._waiting))

    def _reason(self, why: str, text: str, *, is_delayed: bool) -> str:
        """Why the broker does not take this message, as the class of the text tells it."""
        if EXCHANGE.search(text) is None:
            return NeverSent(why)
        if not is_delayed:
            return why
        self._delay.forbid(why)
        return TooEarly(why)

    def _forget(self, text: str) -> None:
        """An exchange is gone: it is looked for, and made, before the next message."""
        if named := EXCHANGE.search(text):
            self._sending.forget(named["name"])
            self._delay.forget()


def _place(message: Message, batch: Batch) -> tuple[str, bool]:
    """What is to confirm this message, and whether that is a level of the delay chain."""
    if batch.ways and id(message) in batch.ways:
        return batch.ways[id(message)][0], True
    return message.queue if message.exchange is None else f"{message.exchange.name} {message.queue}", False
