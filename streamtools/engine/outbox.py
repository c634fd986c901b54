"""Outbox: holds messages until the handler, or the transaction block, has succeeded."""

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

#: The key of this process for the ids of requests.
_SECRET: Final = token_bytes(32)


class Sender(Protocol):
    """A bus or a producer whose messages wait in an outbox."""

    @property
    def place(self) -> object:
        """The place that it sends from: a consumer of the same place sends its messages with the acknowledgement."""

    async def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages in the form in which a consumer has to send them."""

    async def send_now(self, messages: Sequence[Message]) -> Any:
        """Send messages, and return when the broker has confirmed them."""


class Outbox:
    """Holds the messages that a handler or a block has sent, in order, until they really leave.

    Parameters:
        incoming: the message that is handled; None in a transaction outside any handler.
        handler: the name of the running handler.
    """

    # These are made only when needed: each message has an outbox, and most handlers send nothing.
    gathered: Sequence[tuple[Sender, Message]] = ()
    _numbers: Counter[str] | None = None
    #: False when the handler, or the block, has ended: then no message can be added.
    open: bool = True
    #: Whether the handler has sent its reply itself.
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
        """Return an outbox for a transaction inside this one; it continues the numbers of the ids."""
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
        """Return the waiting messages, grouped by sender."""
        found: dict[int, tuple[Sender, list[Message]]] = {}
        for sender, message in self.gathered:
            found.setdefault(id(sender), (sender, []))[1].append(message)
        return list(found.values())

    def id(self, queue: str, question: bytes = b"") -> str | None:
        """Return the id for the next message to this queue; None outside any handler.

        The id is computed from the id of the incoming message and from how many messages went to this queue before.
        So a handler that runs again sends the same ids, and a receiver can detect the repeat.

        Parameters:
            question: the body of a request. It is part of the id, so that a late reply is not taken for the answer
                to a different request of the next attempt.
        """
        if self.incoming is None:
            return None
        if self._numbers is None:
            self._numbers = Counter()
        self._numbers[queue] += 1
        incoming = self.incoming
        seed = f"{incoming.id}\n{incoming.queue}\n{self._handler}\n{queue}\n{self._numbers[queue]}\n"
        # Anyone who knows the id of a request can answer it, so other processes must not be able to compute it.
        key = _SECRET if question else b""
        return blake2b(seed.encode("utf-8", "surrogatepass") + question, digest_size=16, key=key).hexdigest()


class Sent:
    """A message that was put into the outbox; `await` returns its receipt at once.

    So an `async def` handler may write `await context.publish(...)`, and a `def` handler `context.publish(...)`.
    """

    __slots__ = ("receipt",)

    def __init__(self, message: Message) -> None:
        self.receipt: Receipt = Receipt(message.id, message.queue)

    def __await__(self) -> Generator[None, None, Receipt]:
        return self.receipt
        yield

    def __repr__(self) -> str:
        return f"<Sent {self.receipt.id} to {self.receipt.queue!r}, when the handler has succeeded>"


#: The outbox of the handler, or of the transaction, that the running task is in.
outbox: Final[ContextVar[Outbox | None]] = ContextVar("streamtools_outbox", default=None)


def current_outbox() -> Outbox | None:
    """Return the open outbox around the calling code; None if messages are sent at once."""
    found = outbox.get()
    return found if found is not None and found.open else None


async def send_all(box: Outbox, place: object = None) -> list[Message]:
    """Send the waiting messages, except those that a consumer of this place sends with its acknowledgement.

    Parameters:
        place: the consumer's place; None to send everything now.

    Returns:
        The messages that the consumer has to send.

    Raises:
        SendError: a broker refused some messages.
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
        except SendError as error:  # the requester chose the address, so the handler has not failed
            log.warning("The reply to message %s is not sent: %s", replies[0].causation_id, error)
