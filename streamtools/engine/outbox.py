"""Outbox: messages that wait for the handler, or the block, around them to succeed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from hashlib import blake2b
from secrets import token_bytes
from typing import Any, Final, Protocol

from streamtools.errors import SendError
from streamtools.message import Message
from streamtools.receipt import Receipt

log: logging.Logger = logging.getLogger("streamtools")

#: This process makes the ids of requests with it.
_SECRET: Final = token_bytes(32)


class Sender(Protocol):
    """A bus or a producer whose messages wait in an outbox."""

    @property
    def place(self) -> object:
        """Where its messages leave: a consumer of the same place sends them with its acknowledgement."""

    async def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages as a consumer is to send them."""

    async def send_now(self, messages: Sequence[Message]) -> Any:
        """Send them, and return once they are confirmed."""


class Outbox:
    """The messages that were sent so far, in order; none has left yet.

    Parameters:
        incoming: the message being handled; None in a transaction outside any handler.
        handler: the name of the handler at work.
    """

    # Made when they are needed: there is an outbox for each message, and most handlers send nothing.
    gathered: Sequence[tuple[Sender, Message]] = ()
    _numbers: Counter[str] | None = None
    #: The handler, or the block, has ended: no further message is added.
    open: bool = True
    #: The handler has given its reply itself.
    replied: bool = False

    def __init__(self, incoming: Message | None = None, handler: str = "") -> None:
        self.incoming = incoming
        self._handler = handler

    def add(self, sender: Sender, message: Message) -> Sent:
        """Keep a message until the handler succeeds."""
        if not isinstance(self.gathered, list):
            self.gathered = []
        self.gathered.append((sender, message))
        return Sent(message)

    def nested(self) -> Outbox:
        """An outbox for a transaction inside this one; the numbers of ids go on."""
        inner = Outbox(self.incoming, self._handler)
        if self._numbers is None:
            self._numbers = Counter()
        inner._numbers = self._numbers
        return inner

    def take(self, inner: Outbox) -> None:
        """Add the messages of a transaction inside this one."""
        for sender, message in inner.gathered:
            self.add(sender, message)
        self.replied = self.replied or inner.replied

    def by_sender(self) -> list[tuple[Sender, list[Message]]]:
        """The waiting messages, by sender."""
        found: dict[int, tuple[Sender, list[Message]]] = {}
        for sender, message in self.gathered:
            found.setdefault(id(sender), (sender, []))[1].append(message)
        return list(found.values())

    def id(self, queue: str, question: bytes = b"") -> str | None:
        """The id for the next message to this queue; None outside any handler.

        It derives from the incoming message's id and from the number of the message to this queue. So a handler that
        is run again sends the same ids, and a receiver can detect the repeat.

        Parameters:
            question: the body of a request: it is part of the id, so that a late reply is not taken for the answer
                to a different request of the next run.
        """
        if self.incoming is None:
            return None
        if self._numbers is None:
            self._numbers = Counter()
        self._numbers[queue] += 1
        incoming = self.incoming
        seed = f"{incoming.id}\n{incoming.queue}\n{self._handler}\n{queue}\n{self._numbers[queue]}\n"
        # Whoever knows the id of a request can answer it: another process must not work it out.
        key = _SECRET if question else b""
        return blake2b(seed.encode("utf-8", "surrogatepass") + question, digest_size=16, key=key).hexdigest()


class Sent:
    """A message that is in the outbox; awaiting it gives its receipt at once.

    So a handler may write `await context.publish(...)`, and a plain `def` handler `context.publish(...)`.
    """

    __slots__ = ("receipt",)

    def __init__(self, message: Message) -> None:
        self.receipt: Receipt = Receipt(message.id, message.queue)

    def __await__(self) -> Generator[None, None, Receipt]:
        return self.receipt
        yield

    def __repr__(self) -> str:
        return f"<Sent {self.receipt.id} to {self.receipt.queue!r}, when the handler has succeeded>"


#: The outbox of the handler, or the transaction, that this task is in.
outbox: Final[ContextVar[Outbox | None]] = ContextVar("streamtools_outbox", default=None)


def current_outbox() -> Outbox | None:
    """The open outbox around this code; None where messages leave at once."""
    found = outbox.get()
    return found if found is not None and found.open else None


async def send_all(box: Outbox, place: object = None) -> list[Message]:
    """Send the waiting messages, except those that a consumer of this place sends with its acknowledgement.

    Parameters:
        place: None if everything leaves now.

    Returns:
        The messages for the consumer.

    Raises:
        SendError: some were refused.
    """
    carried: list[Message] = []
    others: list[tuple[Sender, list[Message]]] = []
    for sender, messages in box.by_sender():
        if place is not None and sender.place == place:
            carried += await sender.prepare(messages)
        else:
            others.append((sender, messages))
    for sender, messages in others:
        await _send_now(sender, messages)
    return carried


async def _send_now(sender: Sender, messages: list[Message]) -> None:
    replies = [message for message in messages if message.intent == "reply"]
    if rest := [message for message in messages if message.intent != "reply"] if replies else messages:
        await sender.send_now(rest)
    if replies:
        try:
            await sender.send_now(replies)
        except SendError as error:  # whoever asked gave the address: no failure of the handler
            log.warning("The reply to message %s is not sent: %s", replies[0].causation_id, error)
