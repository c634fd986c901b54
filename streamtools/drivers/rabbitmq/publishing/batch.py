"""What one call publishes, and what became of it."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from streamtools.message import Message

#: Bytes that RabbitMQ 3.8 to 3.13 takes in one body (max_message_size); 4.0 takes 16 MiB by default.
BODY_MAX: Final = 128 * 1024 * 1024
#: "message size 20000000 is larger than configured max size 16777216"
_TOO_LARGE: Final = re.compile(r"message size \d+ .*max size (\d+)")

#: "access to topic 'a.b' in exchange 'shop' in vhost '/' refused", "no exchange 'shop' in vhost '/'"
EXCHANGE: Final = re.compile(r"(?:topic '(?P<topic>[^']*)' in )?exchange '(?P<name>[^']*)'")
#: What the broker calls the default exchange.
DEFAULT: Final = "amq.default"


class NeverSent(str):
    """Why a message can never be sent as it is."""

    __slots__ = ()


class TooEarly(str):
    """Why nothing can hold a message until it is due; then it can be sent."""

    __slots__ = ()


class Limits:
    """What the broker is known to take; kept over reconnects.

    Attributes:
        body: bytes in one body, at most.
    """

    def __init__(self) -> None:
        self.body: int = BODY_MAX

    def learn(self, why: str) -> None:
        """Learn from the text with which the broker closed a channel: a body over the limit is not sent again."""
        if found := _TOO_LARGE.search(why):
            self.body = min(self.body, int(found[1]))


class Batch:
    """What one call publishes, until all of it is confirmed.

    Its keys are `id(message)`. The messages' own ids may occur twice: other programs do so, and copies keep theirs.
    """

    __slots__ = (
        "delay_routes", "delay_targets", "doubtful", "future", "left", "nacked", "passes", "refused", "spans",
        "suspects", "unrouted",
    )  # fmt: skip

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future: asyncio.Future[None] = future
        self.left: int = 0
        #: Message -> why AMQP cannot carry it, or the broker does not route or allow it.
        self.refused: dict[int, str] = {}
        #: Those refused that reached no queue.
        self.unrouted: set[int] = set()
        #: Message -> why its queue did not take it.
        self.nacked: dict[int, str] = {}
        #: Message -> why the channel ended that it was sent over; one of these messages may be the cause.
        self.suspects: dict[int, str] = {}
        #: Trying again can help after what ended the channel.
        self.passes: bool = False
        #: Those that the broker may hold.
        self.doubtful: set[int] = set()
        #: What was written: (first tag, messages).
        self.spans: list[tuple[int, list[Message]]] = []
        #: Message -> the last word of its route through the delay chain, if it is due later.
        self.delay_targets: dict[int, str] = {}
        #: Message -> the level of the delay chain that it was sent to, and its routing key.
        self.delay_routes: dict[int, tuple[str, str]] = {}

    @property
    def again(self) -> dict[int, str]:
        """Message -> why it is to be sent again."""
        return self.nacked | self.suspects if self.suspects else self.nacked

    def is_held_back(self, message: Message) -> bool:
        """It is not written, because something that it needs is missing."""
        return id(message) in self.refused or id(message) in self.nacked

    def message(self, tag: int) -> Message:
        """The message that was written under this tag."""
        return next(m[tag - first] for first, m in self.spans if first <= tag < first + len(m))

    def doubt(self, message: Message, why: str, *, alone: bool) -> None:
        """A channel has ended, and with it the confirmation of this message.

        Parameters:
            alone: it may be the one that ended the channel.
        """
        self.doubtful.add(id(message))
        if alone:
            self.suspects[id(message)] = why
        else:
            self.nacked[id(message)] = why

    def is_meant(self, text: str, message: Message, limits: Limits) -> bool:
        """The broker's words say that it ended the channel because of this message.

        Parameters:
            limits: what has been learned from them already.
        """
        if (named := EXCHANGE.search(text)) is None:
            return len(message.body or b"") > limits.body
        if self.delay_routes and id(message) in self.delay_routes:
            return named["name"] == self.delay_routes[id(message)][0]
        exchange = DEFAULT if message.exchange is None else message.exchange.name
        return named["name"] == exchange and named["topic"] in (None, message.queue)

    def judge(self, message: Message) -> None:
        """Note that this message has ended a channel on which it was alone."""
        why = self.suspects.pop(id(message))
        if self.passes:
            self.nacked[id(message)] = why
        else:
            self.refused[id(message)] = why
            self.doubtful.discard(id(message))

    def take_over(self, other: Batch) -> None:
        """Add what became of another part of the same call."""
        self.refused |= other.refused
        self.nacked |= other.nacked
        self.suspects |= other.suspects
        self.doubtful |= other.doubtful

    def settle_if_done(self) -> None:
        """Wake the caller when nothing is outstanding."""
        if self.left == 0 and not self.future.done():
            self.future.set_result(None)
