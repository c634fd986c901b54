"""PikaBus: messages with the headers of PikaBus services, so that both may share a broker.

PikaBus (https://pypi.org/project/PikaBus/) has its metadata in thirteen headers, `PikaBus.MessageId` and so on.
Here they are written beside ours on all that leaves (copies for a retry and for the error queue too), and read
from all that arrives; everything else of the bus knows only `Message`.

Times are written as PikaBus 1.x writes them, `07/22/2019 11:40:19` in UTC, which is all that it reads; version 2
reads that and ISO 8601. Here both are read.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.engine.messages.failures import NAME_LIMIT, REASON_LIMIT, TRACEBACK_LIMIT
from streamtools.errors import ConfigurationError, QueueError, SendError
from streamtools.exchange import Exchange
from streamtools.message import ErrorDetails, Message
from streamtools.producer import Producer
from streamtools.protocols import RABBITMQ
from streamtools.receipt import Receipt
from streamtools.wire import from_rfc3339

log: logging.Logger = logging.getLogger("streamtools")

HeaderStyle = Literal["pikabus"]

DIRECT: Final = Exchange("PikaBusDirect", type="direct")
TOPIC: Final = Exchange("PikaBusTopic", type="topic")

#: The time format of PikaBus 1.x.
TIME_FORMAT: Final = "%m/%d/%Y %H:%M:%S"
#: The header for what ErrorRetries was when we wrote it: what PikaBus has added since are its own failures.
COUNTED: Final = "CountedRetries"
#: Our field -> the header's name, where both are the same text.
TEXT: Final = {
    "correlation_id": "CorrelationId",
    "reply_to": "ReplyToAddress",
    "source": "OriginatingAddress",
    "content_type": "ContentType",
    "content_encoding": "ContentEncoding",
    "type": "MessageType",
    "intent": "Intent",
}
OTHERS: Final = ("MessageId", "TimeSent", "ErrorDetails", "SourceQueue", "ErrorRetries", "DeferredTime", COUNTED)

#: Arguments of ours that an error queue shared with PikaBus does without: it declares its own without any, and
#: RabbitMQ refuses what differs.
NO_ARGUMENTS: Final[Mapping[str, None]] = dict.fromkeys(
    (
        "x-queue-type",
        "x-overflow",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
    )
)
#: Options of a reply queue: PikaBus binds it before it replies, which it could not if it were exclusive to us. One
#: that is left behind ends by itself.
REPLY_QUEUE: Final[Mapping[str, Any]] = {"queue_type": "classic", "arguments": {"x-expires": 300_000}}
#: Destinations that are known to be bound, at most.
KNOWN: Final = 10_000


class PikaBus:
    """Writes and reads the headers of PikaBus.

    Parameters:
        prefix: their first word.
        bind: binds a queue to the direct exchange by its own name, as PikaBus does before it sends.
    """

    def __init__(self, prefix: str, bind: Callable[[str], Awaitable[None]]) -> None:
        if not prefix or not prefix.isascii() or not prefix.isprintable() or prefix.lower().startswith("streamtools"):
            raise ConfigurationError(
                f"header_prefix={prefix!r} cannot begin a header's name: header_prefix='PikaBus'."
            )
        self._prefix = f"{prefix}."
        self._names = frozenset(self._prefix + name for name in (*TEXT.values(), *OTHERS))
        self._bind = bind
        self._bound: set[str] = set()

    def install(self, end: Producer | Consumer) -> None:
        """Stand between this producer or consumer and its driver."""
        if isinstance(end, Producer):
            end.wrapper = Outgoing(self, end)
        else:
            end.wrapper = Incoming(self, end)

    # --- writing --------------------------------------------------------------------------------

    async def write_all(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with these headers; the queues of those on the direct exchange are bound to it first.

        What cannot be bound (it is missing, or exclusive to another connection) is sent to as itself.
        """
        written = []
        for message in messages:
            if message.exchange == DIRECT and not await self._is_bound(message.queue):
                message = message.replace(exchange=None)  # noqa: PLW2901
            written.append(self.write(message))
        return written

    async def _is_bound(self, queue: str) -> bool:
        if queue in self._bound:
            return True
        try:
            await self._bind(queue)
        except QueueError:
            return False
        if len(self._bound) >= KNOWN:
            self._bound.clear()
        self._bound.add(queue)
        return True

    def forget(self, messages: Sequence[Message], refused: Sequence[str]) -> list[Message]:
        """Those of the refused whose queue was bound once: it may have been deleted, and made anew without."""
        found = [m for m in messages if m.id in refused and m.exchange == DIRECT and m.queue in self._bound]
        self._bound.difference_update(message.queue for message in found)
        return found

    def write(self, message: Message) -> Message:
        """The message with these headers; writing twice changes nothing. What the user gave by name stays."""
        fields = {name: getattr(message, field) for field, name in TEXT.items()}
        fields["Intent"] = "event" if message.intent == "event" else "command"
        fields["ContentEncoding"] = message.content_encoding or "utf-8"
        # A reply of PikaBus carries nothing but this id, so it must say which request it is for.
        fields["CorrelationId"] = message.id if message.intent == "request" else message.correlation_id or message.id
        fields["MessageId"] = message.id
        fields["TimeSent"] = _to_text(message.time)
        fields["DeferredTime"] = _to_text(message.deliver_at)
        if message.error is not None:
            fields["ErrorDetails"] = message.error.traceback or message.error.reason
            fields["SourceQueue"] = message.error.queue
            fields["ErrorRetries"] = fields[COUNTED] = str(message.error.attempts)
        ours = {self._prefix + name: value for name, value in fields.items() if value}
        return message.replace(headers={**ours, **message.headers})

    # --- reading --------------------------------------------------------------------------------

    def read(self, message: Message) -> Message:
        """The message with its fields set by these headers, which are taken out; as it is without them.

        Nothing that a foreign sender writes makes it fail: what cannot be read is left out.
        """
        found = {n.removeprefix(self._prefix): v for n, v in message.headers.items() if n in self._names}
        if not found:
            return message
        headers = {n: v for n, v in message.headers.items() if n not in self._names}
        fields: dict[str, Any] = {
            field: found[name] for field, name in TEXT.items() if getattr(message, field) is None and name in found
        }
        fields["time"] = _time_sent(message, found)
        fields["deliver_at"] = _due(message, found)
        retries = _count(found.get("ErrorRetries")) - _count(found.get(COUNTED))
        if retries > 0:
            fields["attempt"] = message.attempt + retries
            fields["error"] = _error(found, fields["time"] or 0.0) or message.error
        return message.replace(id=found.get("MessageId") or message.id, headers=headers, **fields)


def consumer_options(protocol: str) -> dict[str, Any]:
    """Options that a consumer needs to share its queues with PikaBus services."""
    return {"error_arguments": NO_ARGUMENTS} if protocol == RABBITMQ else {}


class Outgoing:
    """Between a producer and its driver."""

    def __init__(self, style: PikaBus, producer: Producer) -> None:
        self.style = style
        self._producer = producer

    def for_producer(self, producer: Producer) -> Outgoing:
        """The same before another producer."""
        return Outgoing(self.style, producer)

    async def _send(self, batch: Sequence[Message], options: Any) -> Sequence[Receipt] | None:
        try:
            return await self._producer._send(await self.style.write_all(batch), options)
        except SendError as error:
            again = self.style.forget(batch, error.refused)
            if not again or len(again) < len(error.refused) + len(error.unknown):
                raise
        await self._producer._send(await self.style.write_all(again), options)
        return None


class Incoming:
    """Between a consumer's loop and its driver."""

    def __init__(self, style: PikaBus, consumer: Consumer) -> None:
        self.style = style
        self._consumer = consumer

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        return self._read(await self._consumer._receive(limit))

    async def _poll(self, limit: int) -> Sequence[Delivery]:
        return self._read(await self._consumer._poll(limit))

    def _read(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        for delivery in deliveries:
            delivery.message = self.style.read(delivery.message)
        return deliveries

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        written = [
            replace(s, outgoing=tuple(await self.style.write_all(s.outgoing))) if s.outgoing else s
            for s in settlements
        ]
        try:
            await self._consumer._settle(written)
        except SendError as error:
            given = [message for s in settlements for message in s.outgoing]
            self.style.forget(given, error.refused)
            if error.messages:
                refused = frozenset(map(id, error.messages))
                sent = (message for s in written for message in s.outgoing)
                error.messages = [m for m, other in zip(given, sent, strict=True) if id(other) in refused]
            raise

    async def _redeclare(self) -> None:
        await self._consumer._redeclare()

    async def _stop(self) -> None:
        await self._consumer._stop()


def _to_text(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime(TIME_FORMAT)


def _from_text(text: str) -> tuple[float | None, bool]:
    """Seconds since the epoch, None for no time at all; and whether fractions of a second were cut off."""
    if (seconds := from_rfc3339(text)) is not None:
        return seconds, False
    try:
        return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC).timestamp(), True
    except ValueError:
        log.warning(
            "%r is no time of PikaBus, neither as %s nor in ISO 8601; it is read over.", text[:80], TIME_FORMAT
        )
        return None, False


def _time_sent(message: Message, found: Mapping[str, str]) -> float | None:
    sent, _ = _from_text(found["TimeSent"]) if "TimeSent" in found else (None, False)
    # Ours has fractions of a second. The property of PikaBus 1.x is off by its time zone, the header is not.
    if sent is None or (message.time is not None and abs(message.time - sent) < 1):
        return message.time
    return sent


def _due(message: Message, found: Mapping[str, str]) -> float | None:
    due, cut = _from_text(found["DeferredTime"]) if "DeferredTime" in found else (None, False)
    if due is None:
        return message.deliver_at
    if message.deliver_at is not None and 0 <= message.deliver_at - due < 1:
        return message.deliver_at
    return due + 1 if cut else due  # never early, as PikaBus 1.x does it


def _error(found: Mapping[str, str], sent: float) -> ErrorDetails | None:
    """Why a PikaBus service failed on it; when, it does not say."""
    if not (queue := found.get("SourceQueue")):
        return None
    details = found.get("ErrorDetails", "").strip()[-TRACEBACK_LIMIT:]
    last = details.rpartition("\n")[2][:REASON_LIMIT]
    return ErrorDetails(
        queue=queue,
        exception=last.partition(":")[0][:NAME_LIMIT],
        reason=last.partition(": ")[2] or last,
        traceback=details,
        attempts=_count(found.get("ErrorRetries")),
        first_failed=sent,
        last_failed=sent,
    )


def _count(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 9 else 0
