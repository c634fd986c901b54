"""MessageSender: the verbs of a bus, each awaited until its message has left or waits in an outbox."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Never, Self, TypeVar, overload

from streamtools import codec
from streamtools.bus.message_factory import MessageFactory, refuse, seconds_until
from streamtools.bus.requests import call
from streamtools.bus.transport import Transport
from streamtools.delivery import current
from streamtools.engine.dispatch import chain
from streamtools.engine.messages.times import wrong_time
from streamtools.engine.outbox import Outbox, current_outbox, outbox, send_all
from streamtools.errors import ConfigurationError
from streamtools.exchange import Exchange
from streamtools.message import Message
from streamtools.receipt import Receipt
from streamtools.types import Middleware
from streamtools.validation.checks import Seconds, check_seconds

T = TypeVar("T")


class MessageSender:
    """Sends, publishes, defers, replies and requests; in a handler or a transaction once that has succeeded.

    Parameters:
        factory: makes the messages.
        transport: sends them.
        mandatory: publishing is an error if nobody has subscribed.
        outgoing: middleware for everything that is sent, outermost first.
    """

    def __init__(
        self, factory: MessageFactory, transport: Transport, *, mandatory: bool, outgoing: list[Middleware]
    ) -> None:
        #: Publishing is an error if nobody has subscribed.
        self.mandatory = mandatory
        #: Middleware for everything that is sent, outermost first; add, reorder, replace before the bus starts.
        self.outgoing: list[Middleware] = outgoing
        self._factory = factory
        self._transport = transport

    async def send(
        self,
        command: object,
        to: str | None = None,
        *,
        exchange: Exchange | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
        key: str | bytes | None = None,
        ttl: Seconds | None = None,
        immediately: bool = False,
        **unknown: Never,
    ) -> Receipt:
        """Send a command to its one owner.

        Parameters:
            to: the owner's queue, or a routing key with an exchange; what `route` or the contract says when None.
            headers: the user's own, `str -> str`.
            type: the name of the type on the wire, for a payload without a contract.
            key: messages with the same key keep their order for a bus with `ordered_by="key"`.
            ttl: seconds after which it is dropped instead of handled.
            immediately: send now, even in a handler or a transaction.

        Raises:
            SendError: there is no such queue, or it was not confirmed in time.
            ConfigurationError: it is an event, or nothing says where it goes.
        """
        if unknown:
            refuse("send", unknown)
        message = self._factory.command(command, to, exchange, headers=headers, type=type, key=key, ttl=ttl)
        return await self._let_go(message, immediately=immediately)

    async def publish(
        self,
        event: object,
        topic: str | None = None,
        *,
        exchange: Exchange | None = None,
        mandatory: bool | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
        key: str | bytes | None = None,
        ttl: Seconds | None = None,
        immediately: bool = False,
        **unknown: Never,
    ) -> Receipt:
        """Publish an event to every queue that subscribed to its topic; parameters as for `send`, and:

        Parameters:
            topic: the contract's own when None.
            exchange: `streamtools.topic` when None.
            mandatory: it is an error if nobody has subscribed; the bus's own setting when None.

        Raises:
            SendError: nobody has subscribed, or it was not confirmed in time.
            ConfigurationError: it is a command, or its topic is not known.
        """
        if unknown:
            refuse("publish", unknown)
        must = self.mandatory if mandatory is None else mandatory
        message = self._factory.event(
            event, topic, exchange, mandatory=must, headers=headers, type=type, key=key, ttl=ttl
        )
        return await self._let_go(message, immediately=immediately)

    async def defer(
        self,
        command: object,
        *,
        delay: timedelta | float | None = None,
        at: datetime | None = None,
        to: str | None = None,
        exchange: Exchange | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
        key: str | bytes | None = None,
        ttl: Seconds | None = None,
        immediately: bool = False,
    ) -> Receipt:
        """Send a command for later; parameters as for `send`, and:

        Parameters:
            delay: seconds, or a timedelta.
            at: a datetime with its time zone.

        Raises:
            FeatureError: the protocol cannot delay messages.
            SendError: there is no such queue, or it was not confirmed in time. With an exchange, also if no queue is
                bound; not on RabbitMQ, which looks for the queues when the message is due.
            ConfigurationError: neither or both times are given.
        """
        delay = seconds_until(delay, at)
        message = self._factory.command(
            command, to, exchange, delay=delay, headers=headers, type=type, key=key, ttl=ttl
        )
        return await self._let_go(message, immediately=immediately)

    async def reply(
        self,
        payload: object,
        *,
        exchange: Exchange | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
    ) -> Receipt:
        """Answer the message that this handler has in hand; parameters as for `send`.

        If the sender's address may not get a reply, the answer is dropped, with a line in the log.

        Raises:
            ConfigurationError: outside a handler, or the message does not say where a reply is to go.
        """
        delivery = current.get()
        if delivery is None:
            raise ConfigurationError("reply() answers the message being handled, and none is: send() instead.")
        message = self._factory.reply(delivery.message, payload, exchange, headers=headers, type=type)
        if (box := current_outbox()) is not None:
            box.replied = True
        if not self._factory.may_reply(delivery.message):
            return Receipt(message.id, message.queue)
        return await self._let_go(message, immediately=False)

    @overload
    async def request(
        self,
        command: object,
        to: str | None = ...,
        *,
        timeout: Seconds = ...,
        returns: type[T],
        exchange: Exchange | None = ...,
        headers: Mapping[str, str] | None = ...,
        type: str | None = ...,
    ) -> T: ...
    @overload
    async def request(
        self,
        command: object,
        to: str | None = ...,
        *,
        timeout: Seconds = ...,
        returns: Any = ...,
        exchange: Exchange | None = ...,
        headers: Mapping[str, str] | None = ...,
        type: str | None = ...,
    ) -> Any: ...
    async def request(
        self,
        command: object,
        to: str | None = None,
        *,
        timeout: Seconds = 5.0,  # noqa: ASYNC109
        returns: Any = None,
        exchange: Exchange | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
    ) -> Any:
        """Send a command at once and wait for what its handler replies or returns; parameters as for `send`, and:

        Parameters:
            timeout: seconds; a request that is not handled by then is dropped.
            returns: the type that the reply is validated into. None for a contract that this bus knows, or else for
                plain data.

        Raises:
            RequestTimeout: no reply came in time.
            RemoteError: the handler failed for good.
            SendError: there is no such queue.
        """
        timeout = check_seconds("timeout", timeout)
        message = self._factory.command(
            command, to, exchange, intent="request", headers=headers, type=type, ttl=timeout
        )
        if self._transport.sender.features.reply:
            reply = await call(message, timeout, self.send_now)
        else:
            reply = await self._transport.connections.here().requests.ask(message, timeout, self.send_now)
        if returns is None:
            returns = self._factory.contracts.find(reply.type) or Any
        return _decoder(returns)(reply)

    # --- transactions ---------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Self]:
        """Send the messages of this block at its end, in order, in one confirmed batch. Send none if it raises.

        The block is for the task that opened it and for the tasks that this one starts in it. In a handler, or in
        another transaction, its messages leave together with those around it.

        Raises:
            SendError: the broker refused some messages; it holds the others.
        """
        around = current_outbox()
        box = around.nested() if around is not None else Outbox()
        token = outbox.set(box)
        try:
            yield self
        finally:
            box.open = False
            outbox.reset(token)
        if around is not None:
            around.take(box)
        else:
            await send_all(box)

    # --- the way of a message -------------------------------------------------------------------

    async def _let_go(self, message: Message, *, immediately: bool) -> Receipt:
        if not immediately and (box := current_outbox()) is not None:
            return box.add(self, message).receipt
        await self.send_now([message])
        return Receipt(message.id, message.queue)

    @property
    def place(self) -> object:
        """Where its messages leave: a consumer of the same place sends them with its acknowledgement."""
        return self._transport.sender.place

    async def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the outgoing middleware changes them."""
        if not self.outgoing:
            return list(messages)
        let_go: list[Message] = []

        async def last(message: Message) -> None:
            if (why := wrong_time(message)) is not None:
                raise ConfigurationError(f"An outgoing middleware has changed message {message.id}: {why}.")
            let_go.append(message)

        handler = chain(last, self.outgoing)
        for message in messages:
            await handler(message)
        return let_go

    async def send_now(self, messages: Sequence[Message]) -> list[Receipt]:
        """Send complete messages through the outgoing middleware. Returns when they are confirmed.

        Raises:
            SendError: the broker is not known to hold some of them.
        """
        return await self._transport.sender.send_messages(await self.prepare(messages))


_decoder: Final = lru_cache(maxsize=256)(codec.decoder)
