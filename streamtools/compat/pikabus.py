"""PikaBus: writes and reads the headers of PikaBus, so that its services and ours can share a broker.

PikaBus (https://pypi.org/project/PikaBus/) has its metadata in thirteen headers, `PikaBus.MessageId` and so on. This
module adds them to every message that is sent, also to copies for a retry and for the error queue, and reads them
from every message that is received. All other code of the bus knows only `Message`.

Times are written as PikaBus 1.x writes them, `07/22/2019 11:40:19` in UTC, because it reads nothing else. PikaBus 2
and this module read that and ISO 8601.
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
#: Our header for the value of ErrorRetries when we wrote it; PikaBus has failed as often as ErrorRetries is greater.
COUNTED: Final = "CountedRetries"
#: Our field -> the header that has the same text.
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

#: Arguments that we leave out for an error queue that we share with PikaBus: PikaBus declares it without arguments,
#: and RabbitMQ refuses a declaration that differs.
NO_ARGUMENTS: Final[Mapping[str, None]] = dict.fromkeys(
    (
        "x-queue-type",
        "x-overflow",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
    )
)
#: Options of a reply queue. It cannot be exclusive to us, because PikaBus binds it before it replies. RabbitMQ
#: deletes an unused one after the time in `x-expires` (milliseconds).
REPLY_QUEUE: Final[Mapping[str, Any]] = {"queue_type": "classic", "arguments": {"x-expires": 300_000}}
#: The most queues to remember as bound.
KNOWN: Final = 10_000


class PikaBus:
    """Writes and reads the headers of PikaBus.

    Parameters:
        prefix: the first word of each header's name.
        bind: binds a queue to the direct exchange under its own name; PikaBus does so before it sends.
    """

    def __init__(self, prefix: str, bind: Callable[[str], Awaitable[None]]) -> None:
        if not prefix or not prefix.isascii() or not prefix.isprintable() or prefix.lower().startswith("streamtools"):
            raise ConfigurationError(
                f"header_prefix={prefix!r} cannot begin the name of a header: write header_prefix='PikaBus'."
            )
        self._prefix = f"{prefix}."
        self._names = frozenset(self._prefix + name for name in (*TEXT.values(), *OTHERS))
        self._bind = bind
        self._bound: set[str] = set()

    def install(self, end: Producer | Consumer) -> None:
        """Wrap the driver of a producer or a consumer, so that messages get these headers."""
        if isinstance(end, Producer):
            end.wrapper = Outgoing(self, end)
        else:
            end.wrapper = Incoming(self, end)

    # --- writing --------------------------------------------------------------------------------

    async def write_all(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with these headers; bind the queues of those for the direct exchange first.

        If a queue cannot be bound (it is missing, or exclusive to another connection), its messages are sent to the
        queue directly.
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
        """Return the refused messages whose queue is remembered as bound, and forget that it is.

        Such a queue may have been deleted, and created again without its binding.
        """
        found = [m for m in messages if m.id in refused and m.exchange == DIRECT and m.queue in self._bound]
        self._bound.difference_update(message.queue for message in found)
        return found

    def write(self, message: Message) -> Message:
        """Return the message with these headers. Safe to repeat; headers that the user set are kept."""
        fields = {name: getattr(message, field) for field, name in TEXT.items()}
        fields["Intent"] = "event" if message.intent == "event" else "command"
        fields["ContentEncoding"] = message.content_encoding or "utf-8"
        # A reply of PikaBus carries only this id, so for a request it has to be the id of the request.
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
        """Return the message with its fields set from these headers, and without them; unchanged if it has none.

        No header of another program makes this fail: a value that cannot be read is left out.
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
    """Return the options that a consumer needs to share its queues with PikaBus services."""
    return {"error_arguments": NO_ARGUMENTS} if protocol == RABBITMQ else {}


class Outgoing:
    """Wraps the driver of a producer."""

    def __init__(self, style: PikaBus, producer: Producer) -> None:
        self.style = style
        self._producer = producer

    def for_producer(self, producer: Producer) -> Outgoing:
        """Return a wrapper for another producer."""
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
    """Wraps the driver of a consumer."""

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
    """Return the seconds since the epoch, None if it is not a time; and whether its fractions were cut off."""
    if (seconds := from_rfc3339(text)) is not None:
        return seconds, False
    try:
        return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC).timestamp(), True
    except ValueError:
        log.warning("%r is ignored: a time of PikaBus is written as %s or in ISO 8601.", text[:80], TIME_FORMAT)
        return None, False


def _time_sent(message: Message, found: Mapping[str, str]) -> float | None:
    sent, _ = _from_text(found["TimeSent"]) if "TimeSent" in found else (None, False)
    # Our own time is more exact. But PikaBus 1.x sets AMQP's timestamp wrong by its time zone, and the header right.
    if sent is None or (message.time is not None and abs(message.time - sent) < 1):
        return message.time
    return sent


def _due(message: Message, found: Mapping[str, str]) -> float | None:
    due, cut = _from_text(found["DeferredTime"]) if "DeferredTime" in found else (None, False)
    if due is None:
        return message.deliver_at
    if message.deliver_at is not None and 0 <= message.deliver_at - due < 1:
        return message.deliver_at
    return due + 1 if cut else due  # never early; PikaBus 1.x does the same


def _error(found: Mapping[str, str], sent: float) -> ErrorDetails | None:
    """Return why a PikaBus service failed; its headers do not say when, so both times are the time of sending."""
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
