"""MessageFactory: makes the message for what a verb is given, and checks that the verb is the right one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, Final, Literal

from streamtools import codec
from streamtools.bus.contracts import Command, Contract, Contracts, Event
from streamtools.bus.transport import Transport
from streamtools.compat import pikabus
from streamtools.delivery import current
from streamtools.engine.outbox import current_outbox
from streamtools.engine.replies import ReplyRule
from streamtools.errors import ConfigurationError, FeatureError, OptionError, suggest
from streamtools.exchange import TOPIC, Exchange
from streamtools.message import NO_HEADERS, Message, id_generator
from streamtools.validation.checks import Seconds, check_headers, check_name, check_seconds, check_texts, check_topic
from streamtools.wire import checked_key

Intent = Literal["command", "event", "request", "reply"]
#: The parameters of verbs, for the error about one that a verb does not have.
PARAMETERS: Final[dict[str, tuple[str, ...]]] = {
    "send": ("to", "exchange", "headers", "type", "key", "ttl", "immediately"),
    "publish": ("topic", "exchange", "mandatory", "headers", "type", "key", "ttl", "immediately"),
}


class MessageFactory:
    """Makes the messages of one bus.

    `Bus` and `MessageContext` have the same verbs. Both hand what a verb is given to this object, and differ in when
    the message leaves.

    Parameters:
        transport: what the bus sends and receives by.
        client_id: the name of the bus; the name of its queue when None.
        content_type: the format of payloads; None for JSON, text and bytes by what they are.
        replies: patterns of the addresses that may get a reply; None for every queue that takes replies.

    Attributes:
        queue: the bus's own queue, where replies that no request waits for go; None for a bus that only sends.
        topic: the exchange of events.
        direct: the exchange of commands and replies; None where they go to their queue itself.
        contracts: the contracts that are handled or routed here.
    """

    def __init__(
        self,
        transport: Transport,
        client_id: str | None,
        content_type: str | None = None,
        replies: Sequence[str] | None = None,
    ) -> None:
        codec.check_content_type(content_type)
        queue, sender = transport.queue, transport.sender
        self.queue = queue
        self.topic: Exchange = TOPIC
        self.direct: Exchange | None = None
        self.contracts: Contracts = Contracts()
        self._source = client_id or queue
        if transport.style is not None:
            self.topic = pikabus.TOPIC
            self.direct = pikabus.DIRECT if sender.features.topics else None
            self._source = queue or client_id  # an address, as PikaBus has it
        self._protocol = sender.protocol
        self._features = sender.features
        self._replies = (
            ReplyRule(sender.validate_reply, replies) if queue is None else transport.consumer.reply_rule(replies)
        )
        self._content_type = content_type
        self._new_id: Callable[[], str] = id_generator()
        #: By the contract's name: a class that is imported from two packages is one contract.
        self._routes: dict[str, tuple[str, Exchange | None]] = {}

    def route(self, contract: type[Command], to: str, exchange: Exchange | None) -> None:
        """Send commands of this contract there, if the call does not say otherwise.

        Raises:
            ConfigurationError: it is not a command, or this is no name of a queue and no routing key.
            FeatureError: an exchange is given, and the protocol has none.
        """
        given: Any = contract
        if not isinstance(given, type) or not issubclass(given, Command):
            raise ConfigurationError(
                f"route() is for commands, and {contract!r} is not one. An event goes by its topic."
            )
        self.contracts.add(contract)
        self._check_destination(to, exchange)
        self._routes[contract.__terms__.name] = (to, exchange)

    # --- verbs ----------------------------------------------------------------------------------

    def command(
        self,
        payload: object,
        to: str | None,
        exchange: Exchange | None,
        *,
        intent: Intent = "command",
        delay: float | None = None,
        **given: Any,
    ) -> Message:
        """A message for the one queue that handles it."""
        if isinstance(payload, Event):
            raise ConfigurationError(
                f"{type(payload).__name__} is an event, and an event is not sent: await bus.publish(...) it."
            )
        if to is None:
            to, exchange = self._destination(payload, exchange)
        self._check_destination(to, exchange)
        if delay is not None and not self._features.delay:
            raise FeatureError(f"{self._protocol!r} cannot delay messages: send it when its time has come.")
        if exchange is None and not delay:  # a message with a delay goes to its queue itself
            exchange = self.direct
        return self._message(payload, to, exchange, intent, _incoming(), delay=delay, **given)

    def event(
        self, payload: object, topic: str | None, exchange: Exchange | None, *, mandatory: bool, **given: Any
    ) -> Message:
        """A message for every queue that subscribed to its topic."""
        if isinstance(payload, Command):
            raise ConfigurationError(
                f"{type(payload).__name__} is a command, and a command is not published: await bus.send(...) it."
            )
        self.need_topics()
        topic = check_topic(topic if topic is not None else _topic(payload, exchange))
        exchange = exchange or self.topic
        return self._message(payload, topic, exchange, "event", _incoming(), mandatory=mandatory, **given)

    def reply(self, to: Message, payload: object, exchange: Exchange | None = None, **given: Any) -> Message:
        """The answer to a message.

        Raises:
            ConfigurationError: that message does not say where a reply is to go.
        """
        by_call = self._features.reply  # the reply goes in the response of the call, whatever the message names
        if to.reply_to is None and not by_call:
            raise ConfigurationError(
                f"Message {to.id} has no reply-to, so it cannot be replied to. Send to a queue by name, to=..., or "
                "return the answer where the sender waits for the response, as over HTTP."
            )
        target = to.queue if by_call or to.reply_to is None else to.reply_to
        # Nobody may be waiting any more: a reply that reaches no queue is no failure of the handler that replies.
        return self._message(payload, target, exchange or self.direct, "reply", to, mandatory=False, **given)

    def may_reply(self, to: Message) -> bool:
        """Whether a reply may go where this message says; logs why not.

        The sender of the message chose the address. A response of a call needs no address.
        """
        return self._features.reply or self._replies.allows(to)

    # --- where a message goes -------------------------------------------------------------------

    def need_topics(self) -> None:
        """Check that the protocol has exchanges.

        Raises:
            FeatureError: it has none.
        """
        if not self._features.topics:
            raise FeatureError(
                f"{self._protocol!r} has no exchanges, so nothing is published there: send to each queue."
            )

    def _check_destination(self, to: str, exchange: Exchange | None) -> None:
        if exchange is None:
            check_name(to)
        else:
            self.need_topics()
            check_topic(to)

    def _destination(self, payload: object, exchange: Exchange | None) -> tuple[str, Exchange | None]:
        if exchange is not None and exchange.type == "fanout":
            return "", exchange
        if isinstance(payload, Command):
            terms = payload.__terms__
            if terms.name in self._routes:
                to, routed = self._routes[terms.name]
                return to, exchange or routed
            if terms.to is not None:
                return terms.to, exchange
        name = type(payload).__name__
        raise ConfigurationError(
            f"Where is {name} to go? Give to='queue', or once bus.route({name}, 'queue')"
            + (f", or class {name}(Command, to='queue')." if isinstance(payload, Command) else ".")
        )

    # --- messages -------------------------------------------------------------------------------

    def _message(
        self,
        payload: object,
        queue: str,
        exchange: Exchange | None,
        intent: Intent,
        cause: Message | None,
        *,
        mandatory: bool = True,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002 - the field's name everywhere
        key: str | bytes | None = None,
        delay: float | None = None,
        ttl: Seconds | None = None,
    ) -> Message:
        body, content_type = codec.encode(payload, self._content_type)
        type, version = _named(payload, type)  # noqa: A001
        id, now = self._id(queue, type, body, intent), time.time()  # noqa: A001
        return Message(
            body=body,
            queue=queue,
            id=id,
            exchange=exchange,
            mandatory=mandatory,
            type=type,
            version=version,
            source=self._source,
            time=now,
            content_type=content_type,
            correlation_id=id if cause is None else cause.correlation_id or cause.id,
            causation_id=None if cause is None else cause.id,
            reply_to=self.queue,
            intent=intent,
            topic=queue if intent == "event" else None,
            key=None if key is None else checked_key(key),
            headers=check_headers(headers) if headers else NO_HEADERS,
            deliver_at=now + check_seconds("delay", delay) if delay else None,
            expires_at=None if ttl is None else now + check_seconds("ttl", ttl),
        )

    def _id(self, queue: str, type: str | None, body: bytes, intent: Intent) -> str:  # noqa: A002
        """A new id; in a handler the same for each run of it.

        Whoever knows the id of a request can answer it, so nobody must be able to work it out from another id.
        """
        asks = intent == "request"
        box = current_outbox()
        if box is not None and (derived := box.id(queue, f"{queue}\n{type}\n".encode() + body if asks else b"")):
            return derived
        return token_hex(16) if asks else self._new_id()


def _topic(payload: object, exchange: Exchange | None) -> str:
    if isinstance(payload, Event):
        return payload.__terms__.topic
    if exchange is not None and exchange.type == "fanout":
        return ""
    raise ConfigurationError(f"Under which topic is a {type(payload).__name__} to be published? Give topic='...'.")


def _named(payload: object, type: str | None) -> tuple[str | None, int | None]:  # noqa: A002
    """The type on the wire and its version: as given, or else those of the contract."""
    check_texts({"type": type})
    if type or not isinstance(payload, Contract):
        return type or None, None
    return payload.__terms__.name, payload.__terms__.version


def _incoming() -> Message | None:
    """The message that this code handles."""
    delivery = current.get()
    return delivery.message if delivery is not None else None


def seconds_until(delay: timedelta | float | None, at: datetime | None) -> float:
    """The delay of a deferred message, from the two ways to give it.

    Raises:
        ConfigurationError: neither or both are given, or a time without its zone.
    """
    if delay is not None and at is None:
        return max(0.0, delay.total_seconds()) if isinstance(delay, timedelta) else check_seconds("delay", delay)
    if delay is None and at is not None:
        if at.tzinfo is None:
            raise ConfigurationError(f"at={at!r} has no time zone: datetime.now(UTC) + timedelta(...).")
        return max(0.0, (at - datetime.now(UTC)).total_seconds())
    raise ConfigurationError("defer() takes one of delay= (seconds or a timedelta) and at= (a datetime).")


def refuse(verb: str, unknown: Mapping[str, object]) -> None:
    """Raise the error for a parameter that a verb does not have, and name what to use.

    Raises:
        OptionError: always; there is at least one such parameter.
    """
    for name in unknown:
        if name in ("delay", "at"):
            raise OptionError(f"{verb}() takes no {name}=, since it sends at once: await defer(command, {name}=...).")
        if name in ("correlation_id", "id", "reply_to"):
            raise OptionError(f"{verb}() takes no {name}=: the bus sets it. A Producer's send() takes what you give.")
        if name == "immediately":
            raise OptionError(
                f"What a context sends leaves when its handler succeeds: await bus.{verb}(..., immediately=True)."
            )
        raise OptionError(f"{verb}() takes no {name!r}. {suggest(name, PARAMETERS[verb])}")
