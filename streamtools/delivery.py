"""Delivery: a message in hand, awaiting its verdict; Settlement: the verdict, ready to be performed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from streamtools.errors import Closed, DecodeError, SendError, safe_str
from streamtools.message import Message
from streamtools.validation.checks import Seconds, check_seconds
from streamtools.verdicts import ACK, DROP, RELEASE, Verdict

#: What settles a delivery by hand: (delivery, verdict) -> None, given by the consumer.
SettleManually = Callable[["Delivery", Verdict], Awaitable[None]]
#: What sends the messages of settlements: (messages, the settlement of each) -> None, once the broker holds them all.
Publish = Callable[[Sequence[Message], Sequence["Settlement"]], Awaitable[None]]


class Delivery:
    """A message in hand. Settle it once; a second verdict is ignored.

    Attributes:
        message: the message.
        token: whatever the driver needs to settle it; no one else reads it.
        redeliveries: how often the broker has delivered it before without a verdict; 0 at first, and if it is not
            known.
        settled: a verdict was given.
        decode_error: why the driver could not read it; it is then rejected without being handled. None if it could.
        abandoned: its handler was cancelled because the broker took it back.
        withdrawn: the broker gives it to another consumer: no handler begins it any more, and its verdict does
            nothing.
        outgoing: what its handler sends; it is sent before the acknowledgement.
        task: the task that runs its handler.
        wake: ends its wait for a retry in place.
    """

    __slots__ = (
        "__weakref__", "abandoned", "decode_error", "message", "outgoing", "redeliveries", "settle_manually",
        "settled", "task", "token", "wake", "withdrawn",
    )  # fmt: skip

    def __init__(
        self, message: Message, token: Any = None, redeliveries: int = 0, decode_error: DecodeError | None = None
    ) -> None:
        self.message: Message = message
        self.token: Any = token
        self.redeliveries: int = redeliveries
        self.decode_error: DecodeError | None = decode_error
        self.settled: bool = False
        self.withdrawn: bool = False
        self.abandoned: bool = False
        self.outgoing: tuple[Message, ...] = ()
        self.settle_manually: SettleManually | None = None
        self.task: asyncio.Task[Any] | None = None
        self.wake: asyncio.Event | None = None

    async def ack(self) -> None:
        """Say that the message is done. Returns when the broker has the verdict."""
        await self._settle(ACK)

    async def retry(self, delay: Seconds = 0.0) -> None:
        """Handle it again after `delay` (seconds, or a timedelta); this counts as one more attempt.

        Raises:
            ConfigurationError: the delay is negative, or ten years or more.
        """
        await self._settle(Verdict.retry(check_seconds("delay", delay)))

    async def reject(self, reason: str = "") -> None:
        """Move it to the error queue with this reason."""
        await self._settle(Verdict.reject(reason))

    async def drop(self) -> None:
        """Acknowledge and delete it."""
        await self._settle(DROP)

    async def release(self) -> None:
        """Give it back to the broker as it came, without counting an attempt."""
        await self._settle(RELEASE)

    # --- for drivers and the loop -------------------------------------------------------------------

    def withdraw(self) -> None:
        """Note that the broker takes it back: no handler begins it any more; a running one continues."""
        self.withdrawn = True
        if self.wake is not None:
            self.wake.set()

    def abandon(self) -> None:
        """Withdraw it, and cancel its handler if one is running."""
        self.withdraw()
        task, self.task = self.task, None
        if task is not None:
            self.abandoned = True
            task.cancel()

    async def _settle(self, verdict: Verdict) -> None:
        if self.settled:
            return
        if self.settle_manually is None:
            raise RuntimeError("This delivery did not come from an open consumer, so it cannot be settled.")
        self.settled = True
        try:
            await self.settle_manually(self, verdict)
        except BaseException:
            self.settled = False  # it is still in hand: another verdict may fare better
            raise

    def __repr__(self) -> str:
        return f"<Delivery {self.message.id} of {self.message.queue!r}, attempt {self.message.attempt}>"


@dataclass(slots=True)
class Settlement:
    """A verdict ready to be performed: first `outgoing` is confirmed by the broker, then the delivery is settled.

    A driver performs it as "send all `outgoing`, then acknowledge" for every kind of verdict but
    `release`, which gives the delivery back. Retries and moves to the error queue are copies in
    `outgoing`, made by the policy. A driver with `Features.atomic` does both as one.

    Attributes:
        delivery: the delivery that is settled.
        verdict: ack, retry, reject, drop or release.
        outgoing: messages to send first: the handler's own, a retry copy, an error copy.
        result: the handler's value, for protocols that answer (`Features.reply`).
        error: what the handler raised, for protocols that answer.
    """

    delivery: Delivery
    verdict: Verdict
    outgoing: tuple[Message, ...] = ()
    result: Any = None
    error: BaseException | None = None


def read_message(
    decode: Callable[..., Message],
    *parts: Any,
    body: bytes | None,
    queue: str,
    id: str,
    place: str,  # noqa: A002
) -> tuple[Message, DecodeError | None]:
    """The decoded message and None, or the bare body and what is wrong with it; it never raises.

    `Delivery(message, ..., decode_error=error)` is then rejected unread, with its body; no other message is affected.

    Parameters:
        decode: makes the message of `parts`.
        body: as it came, for a message that cannot be decoded.
        queue: where it came from.
        id: the id for a message that cannot be decoded; name its place, so that a repeat has the same id.
        place: where it is, in words: a partition and an offset, a delivery's number.
    """
    try:
        return decode(*parts), None
    except Exception as error:  # it affects this message only
        return unreadable(error, body=body, queue=queue, id=id, place=place)


def unreadable(
    error: BaseException,
    *,
    body: bytes | None,
    queue: str,
    id: str,
    place: str,  # noqa: A002
) -> tuple[Message, DecodeError]:
    """What `read_message` gives for a message whose decoding raised `error`; parameters as there."""
    trouble = DecodeError(f"The message at {place} cannot be read: {type(error).__name__}: {safe_str(error)}")
    trouble.__cause__ = error
    return Message(body=body, queue=queue, id=id), trouble


async def publish_first(
    publish: Publish, settlements: Sequence[Settlement]
) -> tuple[list[Settlement], SendError | None]:
    """Publish what settlements send; replies last, and only of those whose other messages the broker holds.

    A reply must not be out already when something else that its handler has sent is refused.

    Parameters:
        publish: raises a SendError whose `messages` are those that the broker does not hold, or may not hold. If it
            has none, its ids say which; without ids as well, it is about all messages of the call.

    Returns:
        the settlements of which the broker holds all messages, and the error that names the messages of the others.

    Raises:
        ConnectError: as `publish` does; nothing is known.
    """
    first: list[tuple[Message, Settlement]] = []
    last: list[tuple[Message, Settlement]] = []
    for settlement in settlements:
        for message in settlement.outgoing:
            is_last = message.intent == "reply" and len(settlement.outgoing) > 1
            (last if is_last else first).append((message, settlement))
    held, refused = await _published(publish, first, settlements)
    if last:
        kept = set(map(id, held))
        held, more = await _published(publish, [each for each in last if id(each[1]) in kept], held)
        refused = refused or more  # an error of the others comes up when they are tried again
    if refused is not None:
        kept = set(map(id, held))
        waiting = [message for message, settlement in last if id(settlement) not in kept]
        refused.unknown = (*refused.unknown, *(message.id for message in waiting))
        refused.messages = (*refused.messages, *waiting)
    return held, refused


async def _published(
    publish: Publish, outgoing: Sequence[tuple[Message, Settlement]], settlements: Sequence[Settlement]
) -> tuple[list[Settlement], SendError | None]:
    """Publish these; return the settlements of which nothing was refused, and the refusal."""
    if not outgoing:
        return list(settlements), None
    messages, owners = zip(*outgoing, strict=True)
    try:
        await publish(messages, owners)
    except SendError as error:
        if not error.messages:
            named = {*error.refused, *error.unknown}
            error.messages = [message for message in messages if message.id in named] or messages
        refused = set(map(id, error.messages))
        left = {id(settlement) for message, settlement in outgoing if id(message) in refused}
        return [settlement for settlement in settlements if id(settlement) not in left], error
    return list(settlements), None


#: How often a read that ignores its cancellation is cancelled, and the seconds between.
END_TRIES: Final = 10
END_WAIT: Final = 0.1


class Reads:
    """Reads from the broker, one after the other; what a read returns is kept until somebody takes it.

    A client library can lose what it has read when it is cancelled, and it can ignore a cancellation. So whoever
    waits here can be cancelled at any time, but a read is cancelled by `end` only.

    Parameters:
        read: waits for deliveries, and returns at most so many.
    """

    def __init__(self, read: Callable[[int], Coroutine[Any, Any, Sequence[Delivery]]]) -> None:
        self._read = read
        self._reading: asyncio.Task[Sequence[Delivery]] | None = None
        self._kept: deque[Delivery] = deque()

    async def take(self, limit: int) -> list[Delivery]:
        """Wait for at least one delivery, and take at most `limit`.

        Raises:
            Closed: the read was ended.
        """
        while not self._kept:
            reading = self._reading or self._begin(limit)
            if not reading.done():
                await asyncio.wait([reading])
            if self._reading is not reading:
                raise Closed("The consumer was closed while it waited.")
            self._reading = None
            self._kept.extend(reading.result())
        return [self._kept.popleft() for _ in range(min(limit, len(self._kept)))]

    def _begin(self, limit: int) -> asyncio.Task[Sequence[Delivery]]:
        reading = self._reading = asyncio.create_task(self._read(limit), name="streamtools-read")
        asyncio.tasks._unregister_task(reading)  # asyncio.run would cancel it only once, and wait for it for ever
        return reading

    async def end(self) -> list[Delivery]:
        """End the read under way; returns the deliveries that nobody has taken.

        A read that ignores several cancellations is left behind: it ends when its connection is closed.
        """
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.add_done_callback(_ignore_error)
            for _ in range(END_TRIES):
                if reading.done():
                    break
                reading.cancel()
                await asyncio.wait([reading], timeout=END_WAIT)
            if reading.done() and not reading.cancelled() and reading.exception() is None:
                self._kept.extend(reading.result())
        kept = [*self._kept]
        self._kept.clear()
        return kept


def _ignore_error(task: asyncio.Task[Any]) -> None:
    """Tell asyncio that somebody has looked at the error of a task."""
    if not task.cancelled():
        task.exception()


#: The delivery being handled in this task, for code that runs inside a handler.
current: ContextVar[Delivery | None] = ContextVar("streamtools_delivery", default=None)
