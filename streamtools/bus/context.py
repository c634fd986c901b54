"""MessageContext: the message that a handler has in hand, and the verbs to send others."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Never

from streamtools.bus.message_factory import MessageFactory, refuse, seconds_until
from streamtools.bus.message_sender import MessageSender
from streamtools.engine.functions.invoke import RESOLVERS, Resolver
from streamtools.engine.outbox import Outbox, Sent, outbox
from streamtools.errors import HandlerError
from streamtools.exchange import Exchange
from streamtools.message import Message
from streamtools.validation.checks import Seconds


class MessageContext:
    """The message being handled, for a handler that asks for it: `async def place(command, context: MessageContext)`.

    What it sends leaves when the handler has succeeded, before the message is acknowledged. An attempt that fails
    sends nothing. An `async def` handler may await the methods, and a `def` handler just calls them.

    Attributes:
        message: the whole message.
    """

    __slots__ = ("_factory", "_outbox", "_sender", "message")

    def __init__(
        self, message: Message, factory: MessageFactory, sender: MessageSender, outbox: Outbox | None
    ) -> None:
        self.message: Message = message
        self._sender = sender
        self._factory = factory
        self._outbox = outbox

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that the sender gave."""
        return self.message.headers

    @property
    def correlation_id(self) -> str:
        """The id that all messages of this conversation have in common."""
        return self.message.correlation_id or self.message.id

    @property
    def source(self) -> str | None:
        """Who sent it."""
        return self.message.source

    @property
    def attempt(self) -> int:
        """The number of this attempt; the first is 1."""
        return self.message.attempt

    def send(
        self,
        command: object,
        to: str | None = None,
        *,
        exchange: Exchange | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
        key: str | bytes | None = None,
        ttl: Seconds | None = None,
        **unknown: Never,
    ) -> Sent:
        """Send a command; parameters as for `Bus.send`."""
        if unknown:
            refuse("send", unknown)
        return self._add(self._factory.command(command, to, exchange, headers=headers, type=type, key=key, ttl=ttl))

    def publish(
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
        **unknown: Never,
    ) -> Sent:
        """Publish an event; parameters as for `Bus.publish`."""
        if unknown:
            refuse("publish", unknown)
        must = self._sender.mandatory if mandatory is None else mandatory
        message = self._factory.event(
            event, topic, exchange, mandatory=must, headers=headers, type=type, key=key, ttl=ttl
        )
        return self._add(message)

    def defer(
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
    ) -> Sent:
        """Send a command for later; parameters as for `Bus.defer`."""
        delay = seconds_until(delay, at)
        message = self._factory.command(
            command, to, exchange, delay=delay, headers=headers, type=type, key=key, ttl=ttl
        )
        return self._add(message)

    def reply(
        self,
        payload: object,
        *,
        exchange: Exchange | None = None,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002
    ) -> Sent:
        """Answer the sender; parameters as for `Bus.reply`.

        If the sender's address may not get a reply, the answer is dropped, with a line in the log.

        Raises:
            ConfigurationError: the message does not say where a reply is to go.
        """
        answer = self._factory.reply(self.message, payload, exchange, headers=headers, type=type)
        sent = self._add(answer) if self._factory.may_reply(self.message) else Sent(answer)
        if self._outbox is not None:
            self._outbox.replied = True
        return sent

    def _add(self, message: Message) -> Sent:
        if self._outbox is None or not self._outbox.open:
            raise HandlerError(
                "The handler of this context has ended, so nothing is sent with it any more: await bus.send(...)."
            )
        return self._outbox.add(self._sender, message)

    def __repr__(self) -> str:
        return f"<MessageContext of {self.message.id}, attempt {self.attempt}>"


def resolvers(provided: Mapping[type, Any], factory: MessageFactory, sender: MessageSender) -> dict[type, Resolver]:
    """Finds the values for further parameters of handlers, by their types.

    Parameters:
        provided: values that are the same for every message.
        factory: makes the messages of a context.
        sender: the bus.
    """

    def context(message: Message) -> MessageContext:
        return MessageContext(message, factory, sender, outbox.get())

    constant = {kind: _constant(value) for kind, value in provided.items()}
    return {**RESOLVERS, **constant, MessageContext: context}


def _constant(value: Any) -> Resolver:
    return lambda _: value
