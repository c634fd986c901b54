"""MessageSender: what a bus sends, and when it leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Never, Self, TypeVar, overload

from streamtools import codec
from streamtools.bus.fan_out import pass_middleware
from streamtools.bus.handler_registry import HandlerRegistry
from streamtools.bus.message_factory import MessageFactory, refuse, seconds_until
from streamtools.bus.requests import Requests, call
from streamtools.delivery import current
from streamtools.engine.outbox import Outbox, current_outbox, outbox, send_all
from streamtools.errors import ConfigurationError
from streamtools.exchange import Exchange
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.types import Middleware
from streamtools.validation.checks import Seconds, check_seconds

T = TypeVar("T")


class MessageSender:
    """Sends, publishes, defers, replies and requests: within a handler or a transaction when that has succeeded.

    Attributes:
        mandatory: publishing what nobody subscribed to is an error.
        outgoing: middleware for everything that is sent, outermost first; add, reorder, replace.
    """

    mandatory: bool
    outgoing: list[Middleware]
    _factory: MessageFactory
    _handlers: HandlerRegistry
    _sender: Producer

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
            to: the owner's queue (with an exchange: a routing key); what `route` or the contract says when not given.
            headers: the user's own, `str -> str`.
            type: the name of the kind of payload, for a payload without a contract.
            key: messages of one key keep their order for a bus with `ordered_by="key"`.
            ttl: seconds after which it is not handled any more.
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
            topic: the contract's own when not given.
            exchange: `streamtools.topic` when not given.
            mandatory: it is an error if nobody has subscribed; what the bus says when None.

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
            SendError: there is no such queue, or it was not confirmed in time; by an exchange also that nobody is
                bound, but on RabbitMQ, which looks for the queues when the time has come.
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
        message = self._factory.reply(delivery.message, payload, exchange=exchange, headers=headers, type=type)
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
            returns: what the reply is validated into; a contract known to this bus, else plain data, when None.

        Raises:
            RequestTimeout: no reply came in time.
            RemoteError: the handler failed for good.
            SendError: there is no such queue.
        """
        timeout = check_seconds("timeout", timeout)
        message = self._factory.command(
            command, to, exchange, intent="request", headers=headers, type=type, ttl=timeout
        )
        if self._sender.features.reply:
            reply = await call(message, timeout, self.send_now)
        else:
            reply = await self._replies().ask(message, timeout, self._send_now)
        if returns is None:
            returns = self._handlers.contract(reply.type) or Any
        return _decoder(returns)(reply)

    # --- transactions ---------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Self]:
        """Send the messages of this block at its end, in order, in one confirmed batch; send none if the block
        raises.

        It belongs to the task that opened it, and to tasks that this one starts within the block, until the block
        ends.
        Inside a handler, or another transaction, it is sent together with that.

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

    def _replies(self) -> Requests:
        """The requests that wait in the running event loop."""
        raise NotImplementedError

    async def _let_go(self, message: Message, *, immediately: bool) -> Receipt:
        if not immediately and (box := current_outbox()) is not None:
            return await box.add(self, message)
        await self._send_now(message)
        return Receipt(message.id, message.queue)

    async def _send_now(self, message: Message) -> None:
        await self.send_now([message])

    @property
    def place(self) -> object:
        """The place where its messages leave: a consumer of the same place settles them with its own message."""
        return self._sender.place

    async def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The messages after the outgoing middleware."""
        return await pass_middleware(messages, self.outgoing)

    async def send_now(self, messages: Sequence[Message]) -> list[Receipt]:
        """Send complete messages, outgoing middleware included; returns once they are confirmed.

        Raises:
            SendError: some were not taken.
        """
        return await self._sender.send_messages(await self.prepare(messages))


@lru_cache(maxsize=256)
def _decoder(returns: Any) -> codec.Decoder:
    return codec.decoder(returns)
