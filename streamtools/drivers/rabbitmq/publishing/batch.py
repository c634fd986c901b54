"""Batch: the messages of one call of `publish`, and their results."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from streamtools.message import Message

#: The most bytes of a body in RabbitMQ 3.8 to 3.13 (max_message_size); 4.0 allows 16 MiB by default.
BODY_MAX: Final = 128 * 1024 * 1024
#: "message size 20000000 is larger than configured max size 16777216"
_TOO_LARGE: Final = re.compile(r"message size \d+ .*max size (\d+)")

#: "access to topic 'a.b' in exchange 'shop' in vhost '/' refused", "no exchange 'shop' in vhost '/'"
EXCHANGE: Final = re.compile(r"(?:topic '(?P<topic>[^']*)' in )?exchange '(?P<name>[^']*)'")
#: The broker's name for the default exchange.
DEFAULT: Final = "amq.default"


class NeverSent(str):
    """The reason why a message can never be sent unchanged."""

    __slots__ = ()


class TooEarly(str):
    """The reason why no queue can hold a message until it is due; when it is due it can be sent."""

    __slots__ = ()


class Limits:
    """The limits of the broker, as far as we know them; they are kept over reconnects.

    Attributes:
        body: the most bytes of one body.
    """

    def __init__(self) -> None:
        self.body: int = BODY_MAX

    def learn(self, why: str) -> None:
        """Learn a limit from the text with which the broker closed a channel, so that we keep to it next time."""
        if found := _TOO_LARGE.search(why):
            self.body = min(self.body, int(found[1]))


class Batch:
    """The messages of one call, until all of them are confirmed.

    Its keys are `id(message)`. The ids of the messages cannot be keys: other programs may use one twice, and copies
    have the id of their original.
    """

    __slots__ = (
        "delay_routes", "delay_targets", "doubtful", "future", "left", "nacked", "passes", "refused", "spans",
        "suspects", "unrouted",
    )  # fmt: skip

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future: asyncio.Future[None] = future
        self.left: int = 0
        #: Message -> why AMQP cannot carry it, or why the broker does not route or allow it.
        self.refused: dict[int, str] = {}
        #: The refused messages that reached no queue.
        self.unrouted: set[int] = set()
        #: Message -> why its queue did not accept it for now.
        self.nacked: dict[int, str] = {}
        #: Message -> why its channel ended; one of these messages may be the cause.
        self.suspects: dict[int, str] = {}
        #: Whether the cause of the channel's end is temporary.
        self.passes: bool = False
        #: The messages that the broker may hold.
        self.doubtful: set[int] = set()
        #: The messages that were written, each list with the tag of its first message.
        self.spans: list[tuple[int, list[Message]]] = []
        #: Delayed message -> the last word of its routing key in the delay chain.
        self.delay_targets: dict[int, str] = {}
        #: Delayed message -> the level of the delay chain that it was sent to, and its routing key.
        self.delay_routes: dict[int, tuple[str, str]] = {}

    @property
    def again(self) -> dict[int, str]:
        """Message -> why it must be sent again."""
        return self.nacked | self.suspects if self.suspects else self.nacked

    def is_held_back(self, message: Message) -> bool:
        """Whether a message must not be written, because something that it needs is missing."""
        return id(message) in self.refused or id(message) in self.nacked

    def message(self, tag: int) -> Message:
        """Return the message that was written under this tag."""
        return next(m[tag - first] for first, m in self.spans if first <= tag < first + len(m))

    def doubt(self, message: Message, why: str, *, alone: bool) -> None:
        """Note that a channel has ended before it confirmed a message.

        Parameters:
            alone: whether this message may be the cause, so that it must be sent alone.
        """
        self.doubtful.add(id(message))
        if alone:
            self.suspects[id(message)] = why
        else:
            self.nacked[id(message)] = why

    def is_meant(self, text: str, message: Message, limits: Limits) -> bool:
        """Whether the broker's text says that it closed the channel because of this message.

        Parameters:
            limits: the limits, which have been learned from this text already.
        """
        if (named := EXCHANGE.search(text)) is None:
            return len(message.body or b"") > limits.body
        if self.delay_routes and id(message) in self.delay_routes:
            return named["name"] == self.delay_routes[id(message)][0]
        exchange = DEFAULT if message.exchange is None else message.exchange.name
        return named["name"] == exchange and named["topic"] in (None, message.queue)

    def judge(self, message: Message) -> None:
        """Note that the broker has closed a channel on which this message was alone."""
        why = self.suspects.pop(id(message))
        if self.passes:
            self.nacked[id(message)] = why
        else:
            self.refused[id(message)] = why
            self.doubtful.discard(id(message))

    def take_over(self, other: Batch) -> None:
        """Add the results of another part of the same call."""
        self.refused |= other.refused
        self.nacked |= other.nacked
        self.suspects |= other.suspects
        self.doubtful |= other.doubtful

    def settle_if_done(self) -> None:
        """Wake the caller if no message is outstanding."""
        if self.left == 0 and not self.future.done():
            self.future.set_result(None)
