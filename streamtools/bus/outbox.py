"""Outbox: messages that wait for the block or the handler around them to succeed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import ContextVar
from hashlib import blake2b
from itertools import count
from typing import Final

from streamtools.message import Message
from streamtools.producer import Receipt

#: How a bus sends messages at once.
Send = Callable[[Sequence[Message]], Awaitable[list[Receipt]]]


class Outbox:
    """What was sent so far, in order; nothing has left yet.

    Parameters:
        send: the way out of the bus that it belongs to; what another bus sends meanwhile leaves by that one's.
        new_id: ids for what is sent outside any handler.
        incoming: the message being handled, None in a transaction outside any handler.
        handler: the name of the handler at work.
    """

    def __init__(
        self, send: Send, new_id: Callable[[], str], *, incoming: Message | None = None, handler: str = ""
    ) -> None:
        self.incoming = incoming
        self.messages: list[Message] = []
        #: What goes out by other buses.
        self.others: dict[Send, list[Message]] = {}
        #: Once the block is over nothing gathers here any more.
        self.open: bool = True
        #: The handler has given its reply itself.
        self.replied: bool = False
        self._send = send
        self._new_id = new_id
        self._handler = handler
        self._numbers = count()

    def nested(self) -> Outbox:
        """One for a transaction inside this one; numbers go on here."""
        inner = Outbox(self._send, self._new_id, incoming=self.incoming, handler=self._handler)
        inner._numbers = self._numbers
        return inner

    def take(self, inner: Outbox) -> None:
        """Have what a transaction inside this one has gathered."""
        self.messages += inner.messages
        self.replied = self.replied or inner.replied
        for send, messages in inner.others.items():
            self.others.setdefault(send, []).extend(messages)

    def id(self, question: bytes = b"") -> str:
        """The id for the next message.

        Inside a handler it derives from the incoming message's, so that what a handler sends has the same
        ids when the handler is run again: whoever receives it twice can tell.

        Parameters:
            question: what a request asks: a late reply to it is not for another question, which the next run
                may ask in its place.
        """
        if self.incoming is None:
            return self._new_id()
        seed = f"{self.incoming.id}\n{self._handler}\n{next(self._numbers)}\n"
        return blake2b(seed.encode() + question, digest_size=16).hexdigest()

    def add(self, message: Message, send: Send | None = None) -> Sent:
        """Keep a message until the block succeeds.

        Parameters:
            send: the way out of the bus that it was given to; None for the one that this belongs to.
        """
        if send is None or send == self._send:
            self.messages.append(message)
        else:
            self.others.setdefault(send, []).append(message)
        return Sent(message)

    async def send_others(self) -> None:
        """Let go what goes out by other buses.

        Raises:
            SendError: some were not taken.
        """
        for send, messages in self.others.items():
            await send(messages)


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


#: The outbox of the handler or the transaction that this task is in.
outbox: Final[ContextVar[Outbox | None]] = ContextVar("streamtools_outbox", default=None)


def current_outbox() -> Outbox | None:
    """The open outbox around this code; None where messages leave at once."""
    found = outbox.get()
    return found if found is not None and found.open else None
