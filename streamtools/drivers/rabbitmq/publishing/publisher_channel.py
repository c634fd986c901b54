"""PublisherChannel: publishes with confirms, many messages at a time, with one future for each batch.

A batch is written in chunks, each in one piece, while the window has room. The broker confirms in any order, one
message or all up to a number. A message that reaches no queue comes back before it is confirmed, and counts as
refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from aiormq.abc import AbstractChannel

from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.amqp.channel import Channel
from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.drivers.rabbitmq.connections import SharedConnection
from streamtools.drivers.rabbitmq.errors import channel_lost, lost, trouble
from streamtools.drivers.rabbitmq.publishing.batch import EXCHANGE, Batch, Limits, NeverSent, TooEarly
from streamtools.drivers.rabbitmq.publishing.encoder import Encoder
from streamtools.drivers.rabbitmq.publishing.window import Window
from streamtools.drivers.rabbitmq.rare.unconfirmed import UnconfirmedWatch
from streamtools.drivers.rabbitmq.rare.unusable_delays import Unheld
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.delay_levels import PREFIX, is_route
from streamtools.drivers.rabbitmq.topology.queues import nowhere_to_send
from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost
from streamtools.exchange import no_subscriber
from streamtools.message import Message

#: The most messages that are written and not confirmed yet.
WINDOW: Final = 2000
#: The number of messages that are written in one piece.
CHUNK: Final = 100


class PublisherChannel(Channel):
    """A channel in confirm mode.

    Parameters:
        shared: the connection, with the state that its users share.
        library: the client library's channel, opened with confirms.
        limits: the limits of the broker.
        declares: whether to create missing exchanges and delay queues.

    Attributes:
        pending: tag of each message that is not confirmed -> its batch.
        last_tag: the tag of the message that was written last.
        watch: handles messages whose confirmations do not come.
    """

    error: ConnectionLost | None

    def __init__(
        self, shared: SharedConnection, library: AbstractChannel, limits: Limits, *, declares: bool = True
    ) -> None:
        super().__init__(shared.connection, library)
        self.shared = shared
        self._declares = declares
        self._encoder = Encoder(self.number, self.connection.frame_max, limits, shared.chain)
        self._loop = asyncio.get_running_loop()
        self.pending: dict[int, Batch] = {}
        self.last_tag: int = 0
        #: Every tag below is confirmed.
        self._low = 1
        #: (message id, routing key) -> how many such messages came back and are not confirmed yet.
        self._returned: Counter[tuple[str, str]] = Counter()
        #: The number of calls of `publish` that have not ended.
        self._users = 0
        self._retired = self._discarded = False
        self._window = Window()
        #: The frames of all tasks that publish in one turn of the event loop; they are written in one piece.
        self._out: list[bytes] = []
        self.watch: UnconfirmedWatch = UnconfirmedWatch(self)

    @classmethod
    async def open(cls, shared: SharedConnection, limits: Limits, *, declares: bool = True) -> PublisherChannel:
        """Open a channel for publishing on this connection."""
        channel = cls(shared, await shared.connection.channels.open(confirms=True), limits, declares=declares)
        shared.connection.attach(channel)
        return channel

    @property
    def limits(self) -> Limits:
        """The limits of the broker."""
        return self._encoder.limits

    @property
    def usable(self) -> bool:
        """Whether more messages may be written to this channel."""
        return self.error is None and not self.watch.stuck

    async def publish(self, messages: Sequence[Message]) -> Batch:
        """Publish messages once; the batch names those that cannot be sent and those that the broker did not accept.

        Raises:
            ConnectionLost: the connection ended; the broker may hold messages that it has not confirmed.
        """
        self._users += 1
        try:
            return await self._publish(messages)
        finally:
            self._users -= 1
            self._close_if_done()

    def retire(self) -> None:
        """Close the channel when nobody publishes on it any more."""
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and self._users == 0 and not self._discarded:
            self._discarded = True
            self.watch.stop()
            self.discard("it was replaced")

    async def _publish(self, messages: Sequence[Message]) -> Batch:
        batch = Batch(self._loop.create_future())
        # Confirms may come before the last chunk is written, so one extra keeps the batch open until then.
        batch.left = 1
        for start in range(0, len(messages), CHUNK):
            chunk = messages[start : start + CHUNK]
            for message in chunk:
                if message.exchange is not None or message.deliver_at is not None:
                    await self._prepare(message, batch)
            await self._room()
            if self.watch.stuck or self.closed:
                why = str(self.error) if self.closed else self.watch.silence
                left = (id(m) for m in messages[start:] if id(m) not in batch.refused)
                batch.nacked.update(dict.fromkeys(left, why))
                break
            self._write(chunk, batch)
            await self.connection.drain()
        batch.left -= 1
        batch.settle_if_done()
        await batch.future
        return batch

    async def _prepare(self, message: Message, batch: Batch) -> None:
        """Create the exchange and the delay levels that a message needs.

        If a message went to an exchange that does not exist, the broker would close the channel.
        """
        exchanges, now = self.shared.routes.exchanges, time.time()
        try:
            if message.exchange is not None and message.exchange not in exchanges:
                await Declarations(self.connection).declare_exchange(message.exchange, self._declares)
                exchanges.add(message.exchange)
            if message.deliver_at is not None and message.deliver_at > now:
                batch.delay_targets[id(message)] = await self.shared.chain.prepare(
                    message, now, declares=self._declares
                )
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

    # --- writing ------------------------------------------------------------------------------------

    async def _room(self) -> None:
        while len(self.pending) >= WINDOW and self.usable:
            await self._window.wait()
        self._check_connection()

    def _check_connection(self) -> None:
        if self.error is not None and not self.closed:
            self.check()

    def _write(self, chunk: Sequence[Message], batch: Batch) -> None:
        self._check_connection()
        out: list[bytes] = []
        written: list[Message] = []
        is_part = bool(batch.refused or batch.nacked)
        for message in chunk:
            if is_part and batch.is_held_back(message):
                continue
            try:
                out.append(self._encoder.encode(message, batch))
            except Exception as error:  # Unsendable, or any other error of this one message
                batch.refused[id(message)] = NeverSent(f"Message {message.id} cannot be sent: {error}")
            else:
                written.append(message)
        if not written:
            return
        first, self.last_tag = self.last_tag + 1, self.last_tag + len(written)
        batch.spans.append((first, written))
        batch.left += len(written)
        self.pending.update(dict.fromkeys(range(first, self.last_tag + 1), batch))
        if self.watch.timer is None:
            self.watch.start()
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += out

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self.error is None:
            self.connection.write(b"".join(out))

    # --- for UnconfirmedWatch -----------------------------------------------------------------------

    async def publish_copy(self, message: Message, delay_route: tuple[str, str] | None) -> bool:
        """Publish a message once more, and return whether the broker holds it.

        Parameters:
            delay_route: exchange and routing key in the delay chain; None if the message goes to its queue directly.
        """
        batch = Batch(self._loop.create_future())
        if delay_route is not None:
            batch.delay_routes[id(message)] = delay_route
        self._write([message], batch)
        self.watch.stop()  # the caller itself watches this channel
        await batch.future
        return not batch.refused and not batch.again

    def give_back(self, tag: int, why: str) -> None:
        """Mark a message to be sent again, over a new channel."""
        batch = self.pending.pop(tag)
        batch.nacked[id(batch.message(tag))] = why
        batch.left -= 1
        batch.settle_if_done()

    def wake_all(self) -> None:
        """Wake all tasks that wait for room, because nothing more is written to this channel."""
        self._window.wake_all()

    # --- answers of the broker ----------------------------------------------------------------------

    def confirm(self, tag: int, *, multiple: bool, held: bool) -> None:
        if not multiple:
            self.confirm_one(tag, held)
        else:
            for number in range(self._low, tag + 1):
                self.confirm_one(number, held)
            self._low = tag + 1
        if self._window.waiting:
            self._window.wake(WINDOW - len(self.pending))

    def confirm_one(self, tag: int, held: bool) -> None:
        """Handle the broker's answer whether it holds one message."""
        batch = self.pending.pop(tag, None)
        if batch is None:
            return
        if not held or self._returned:
            self._note_refusal(batch, tag, held)
        batch.left -= 1
        if batch.left == 0:
            batch.settle_if_done()

    def returned(self, routing_key: str, properties_: bytes, body: bytes) -> None:
        message, _ = properties.decode(properties_, body, "", str)
        self._returned[message.id, routing_key] += 1

    def _note_refusal(self, batch: Batch, tag: int, held: bool) -> None:
        message = batch.message(tag)
        if (message.id, message.queue) in self._returned:
            self._returned -= Counter([(message.id, message.queue)])
            if message.mandatory:
                batch.refused[id(message)] = self._unrouted(message)
                if message.exchange is None:
                    batch.unrouted.add(id(message))
        elif message.deliver_at is not None and (back := self._back_from_chain(message)) is not None:
            self._returned -= Counter([back])
            self.shared.chain.forget()  # so that the next try creates the queue again
            batch.nacked[id(message)] = (
                f"The delay of a message to {message.queue!r} needs a queue that is gone from "
                f"{self.connection.where}: one of {PREFIX}."
            )
        elif not held:
            # A reply does not wait for a full queue, because the requester chose that queue.
            kept = batch.refused if message.intent == "reply" else batch.nacked
            kept[id(message)] = (
                f"The queue {message.queue!r} at {self.connection.where} does not take it: it is full (x-max-length "
                "with x-overflow reject-publish), or its node has failed."
            )

    def _back_from_chain(self, message: Message) -> tuple[str, str] | None:
        """Return the (id, routing key) under which this message came back from the delay chain, or None."""
        found = (r for r in self._returned if r[0] == message.id and is_route(r[1], message))
        return next(found, None)

    def _unrouted(self, message: Message) -> str:
        if message.exchange is not None:
            return str(no_subscriber(message.queue, message.exchange))
        return nowhere_to_send(message.queue, self.connection.where)

    def fail(self, why: str, *, connection: bool = False) -> None:
        if self.error is not None:
            return
        super().fail(why, connection=connection)
        make = lost if connection else channel_lost
        for batch in dict.fromkeys(self.pending.values()):
            if not batch.future.done():
                batch.future.set_exception(make(self.connection.where, why))
                batch.future.exception()  # mark it as retrieved: the caller may have been cancelled
        self.pending.clear()

    def _on_end(self) -> None:
        self.watch.stop()
        self.wake_all()

    def refuse(self, code: int, text: str) -> None:
        """Handle that the broker closed the channel because of one message; the results of the others are unknown."""
        if self.error is not None:
            return
        self.limits.learn(text)
        kind = trouble(code, text)
        self.error = channel_lost(self.connection.where, f"{code} {text}")
        why = f"RabbitMQ at {self.connection.where} {'cannot take it now' if kind.passes else 'refuses it'}: {text}."
        pending, self.pending = self.pending, {}
        meant = {tag for tag, batch in pending.items() if batch.is_meant(text, batch.message(tag), self.limits)}
        if code == 404 and (
            named := EXCHANGE.search(text)
        ):  # the next message looks for the exchange, and creates it
            self.shared.routes.forget(named["name"])
            self.shared.chain.forget()
        for tag, batch in pending.items():
            message = batch.message(tag)
            if tag not in meant:
                batch.doubt(message, why, alone=not meant)
            elif kind.passes or code == 404:
                batch.nacked[id(message)] = why
            else:
                batch.refused[id(message)] = self._reason(why, text, is_delayed=id(message) in batch.delay_routes)
            batch.left -= 1
        for batch in dict.fromkeys(pending.values()):
            batch.passes = kind.passes
            batch.settle_if_done()
        self._on_end()

    def _reason(self, why: str, text: str, *, is_delayed: bool) -> str:
        """Return why the broker refuses this message; the class of the text says when sending it again can help."""
        if EXCHANGE.search(text) is None:
            return NeverSent(why)
        if not is_delayed:
            return why
        self.shared.chain.forbid(why)
        return TooEarly(why)
