"""MessageFactory: what a verb is given, as a message; the rules about which verb is for what."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, Final, Literal

from streamtools import codec
from streamtools.bus.contracts import Command, Contract, Event
from streamtools.delivery import current
from streamtools.engine.outbox import current_outbox
from streamtools.engine.replies import ReplyRule
from streamtools.errors import ConfigurationError, FeatureError, OptionError, suggest
from streamtools.exchange import TOPIC, Exchange
from streamtools.message import NO_HEADERS, Message, id_generator
from streamtools.producer import Producer
from streamtools.validation.checks import Seconds, check_headers, check_name, check_seconds, check_texts, check_topic
from streamtools.wire import checked_key

Intent = Literal["command", "event", "request", "reply"]
#: What a reply that carries a failure is called.
FAILURE: Final = "streamtools.Failure"


@dataclass(frozen=True, slots=True)
class Failure:
    """What is answered to a request whose handler failed.

    Attributes:
        exception: the class name of what it raised.
        reason: the text of it; empty where the service does not tell it.
    """

    exception: str = ""
    reason: str = ""


class MessageFactory:
    """Makes messages for one bus.

    Parameters:
        source: who sends: the bus's client_id or its queue.
        queue: where replies that no request awaits are to go; None for a bus that only sends.
        sender: what carries them.
        replies: decides where replies may go; the sender's rule when None.
        content_type: what payloads are encoded as; None for JSON, text and bytes by what they are.
    """

    def __init__(
        self,
        source: str | None,
        queue: str | None,
        sender: Producer,
        content_type: str | None = None,
        *,
        replies: ReplyRule | None = None,
    ) -> None:
        self.source = source
        self.queue = queue
        self._protocol = sender.protocol
        self._features = sender.features
        self._replies = replies or ReplyRule(sender.validate_reply)
        codec.check_content_type(content_type)
        self._content_type = content_type
        self.new_id: Callable[[], str] = id_generator()
        #: Where commands and replies go by their queue's name; None to the queue itself.
        self.direct: Exchange | None = None
        #: Where events go by their topic.
        self.topic: Exchange = TOPIC
        #: By the contract's name: a class that is imported from two packages is one contract.
        self._routes: dict[str, tuple[str, Exchange | None]] = {}

    def route(self, contract: type[Command], to: str, exchange: Exchange | None) -> None:
        """Where commands of this contract go from now on.

        Raises:
            ConfigurationError: that is no name of a queue, or no routing key.
            FeatureError: an exchange, where there are none.
        """
        self._check_destination(to, exchange)
        self._routes[contract.__terms__.name] = (to, exchange)

    # --- verbs ----------------------------------------------------------------------------------

    def command(
        self, payload: object, to: str | None, exchange: Exchange | None, *, intent: Intent = "command", **fields: Any
    ) -> Message:
        """A message for the one queue that handles it."""
        if isinstance(payload, Event):
            raise ConfigurationError(
                f"{type(payload).__name__} is an event, and an event is not sent: await bus.publish(...) it."
            )
        if to is None:
            to, routed = self._destination(payload, exchange)
            exchange = exchange or routed
        self._check_destination(to, exchange)
        if fields.get("delay") is not None and not self._features.delay:
            raise FeatureError(f"{self._protocol!r} cannot delay messages: send it when its time has come.")
        if exchange is None and not fields.get("delay"):  # which an exchange cannot have
            exchange = self.direct
        return self._message(payload, queue=to, exchange=exchange, intent=intent, **fields)

    def event(
        self, payload: object, topic: str | None, exchange: Exchange | None, *, mandatory: bool, **fields: Any
    ) -> Message:
        """A message for whoever subscribed to its topic."""
        if isinstance(payload, Command):
            raise ConfigurationError(
                f"{type(payload).__name__} is a command, and a command is not published: await bus.send(...) it."
            )
        self.need_topics()
        topic = check_topic(topic if topic is not None else self._topic(payload, exchange))
        exchange = exchange or self.topic
        return self._message(payload, queue=topic, exchange=exchange, intent="event", mandatory=mandatory, **fields)

    def reply(self, to: Message, payload: object, *, exchange: Exchange | None = None, **fields: Any) -> Message:
        """The answer to a message.

        Raises:
            ConfigurationError: it does not say where a reply is to go.
        """
        on_call = self._features.reply  # then the reply goes in the answer, whatever address is named
        if to.reply_to is None and not on_call:
            raise ConfigurationError(
                f"Message {to.id} has no reply-to, so it cannot be replied to; send to a queue by name: to=... "
                "Where the sender waits on the line, as over HTTP, return the answer."
            )
        # Nobody may be waiting any more: a reply that reaches no queue is no failure of who replies.
        target = to.queue if on_call or to.reply_to is None else to.reply_to
        answer = self._message(
            payload, queue=target, exchange=exchange or self.direct, intent="reply", mandatory=False, **fields
        )
        return answer.replace(causation_id=to.id, correlation_id=to.correlation_id or to.id)

    def may_reply(self, to: Message) -> bool:
        """Whether a reply may go where this message says, which its sender chose; logs why not.

        Where it goes in the answer to the call, no address is asked.
        """
        return self._features.reply or self._replies.allows(to)

    # --- the parts ------------------------------------------------------------------------------

    def need_topics(self) -> None:
        """Say so where the protocol has no exchanges.

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
        kind = type(payload)
        if isinstance(payload, Command):
            terms = payload.__terms__
            if terms.name in self._routes:
                return self._routes[terms.name]
            if terms.to is not None:
                return terms.to, None
        raise ConfigurationError(
            f"Where is {kind.__name__} to go? Give to='queue', or once bus.route({kind.__name__}, 'queue')"
            + (f", or class {kind.__name__}(Command, to='queue')." if isinstance(payload, Command) else ".")
        )

    def _topic(self, payload: object, exchange: Exchange | None) -> str:
        if isinstance(payload, Event):
            return payload.__terms__.topic
        if exchange is not None and exchange.type == "fanout":
            return ""
        raise ConfigurationError(
            f"Under which topic is a {type(payload).__name__} to be published? Give topic='...'."
        )

    def _message(
        self,
        payload: object,
        *,
        queue: str,
        exchange: Exchange | None,
        intent: Intent,
        mandatory: bool = True,
        headers: Mapping[str, str] | None = None,
        type: str | None = None,  # noqa: A002 - the field's name everywhere
        key: str | bytes | None = None,
        delay: float | None = None,
        ttl: Seconds | None = None,
        reply_to: str | None = None,
    ) -> Message:
        body, content_type = codec.encode(payload, self._content_type)
        check_texts({"type": type})
        type, version = _named(payload, type)  # noqa: A001
        incoming, box = _incoming(), current_outbox()
        wait = 0.0 if delay is None else check_seconds("delay", delay)
        now = time.time()
        asks = intent == "request"
        question = f"{queue}\n{type}\n".encode() + body if asks else b""
        # Whoever knows a request's id can answer it: nobody is to guess it from another's.
        id = (box.id(queue, question) if box is not None else None) or (  # noqa: A001
            token_hex(16) if asks else self.new_id()
        )
        return Message(
            body=body,
            queue=queue,
            id=id,
            exchange=exchange,
            mandatory=mandatory,
            type=type,
            version=version,
            source=self.source,
            time=now,
            content_type=content_type,
            correlation_id=(incoming.correlation_id or incoming.id) if incoming is not None else id,
            causation_id=incoming.id if incoming is not None else None,
            reply_to=reply_to or self.queue,
            intent=intent,
            topic=queue if intent == "event" else None,
            key=None if key is None else checked_key(key),
            headers=check_headers(headers) if headers else NO_HEADERS,
            deliver_at=now + wait if wait else None,
            expires_at=None if ttl is None else now + check_seconds("ttl", ttl),
        )


def _named(payload: object, type: str | None) -> tuple[str | None, int | None]:  # noqa: A002
    """The name on the wire and its version: as given, else the contract's."""
    if type or not isinstance(payload, Contract):
        return type or None, None
    return payload.__terms__.name, payload.__terms__.version


def _incoming() -> Message | None:
    """The message that this code is handling."""
    delivery = current.get()
    return delivery.message if delivery is not None else None


def seconds_until(delay: timedelta | float | None, at: datetime | None) -> float:
    """The delay of a deferred message, from how it was given.

    Raises:
        ConfigurationError: neither or both are given, or a time without its zone.
    """
    if (delay is None) == (at is None):
        raise ConfigurationError("defer() wants one of delay= (seconds or a timedelta) and at= (a datetime).")
    if isinstance(delay, timedelta):
        return max(0.0, delay.total_seconds())
    if at is None:
        return check_seconds("delay", delay or 0.0)
    if at.tzinfo is None:
        raise ConfigurationError(f"at={at!r} has no time zone: datetime.now(UTC) + timedelta(...).")
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


#: The parameters of each verb, for the error about an unknown one.
TAKES: Final[dict[str, tuple[str, ...]]] = {
    "send": ("to", "exchange", "headers", "type", "key", "ttl", "immediately"),
    "publish": ("topic", "exchange", "mandatory", "headers", "type", "key", "ttl", "immediately"),
}


def refuse(verb: str, unknown: Mapping[str, object]) -> None:
    """Raise the error for a parameter that a verb does not have, and name what to use.

    Raises:
        OptionError: there is such a parameter.
    """
    for name in unknown:
        if name in ("delay", "at"):
            raise OptionError(f"{verb}() takes no {name}=, since it sends at once: await defer(command, {name}=...).")
        if name in ("correlation_id", "id", "reply_to"):
            raise OptionError(f"{verb}() takes no {name}=: the bus sets it. A Producer's send() takes what you give.")
        raise OptionError(f"{verb}() takes no {name!r}. {suggest(name, TAKES[verb])}")
