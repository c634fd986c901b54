"""ProducerRecord: one record on its way, and the errors for records that Kafka does not take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from aiokafka import errors as kafka

from streamtools.drivers.kafka.errors import Unfit, explained, is_too_large, is_unfit, wants_key
from streamtools.drivers.kafka.records import COPY_ROOM, ID, Header, Placed, encode_headers, encode_key, timestamp
from streamtools.errors import SendError, StreamToolsError
from streamtools.exchange import Exchange
from streamtools.message import Draft, Message, common
from streamtools.settings import KafkaSettings

#: Bytes of a record beside key, value and headers at most (KIP-98, message format).
OVERHEAD: Final = 96
#: What is raised for a message of which no record can be made, or which the library cannot write.
UNWRITABLE: Final = (TypeError, ValueError, OverflowError)


class ProducerRecord:
    """One record on its way.

    Attributes:
        id: the message's.
        partition: where it must go; when None by its key, or anywhere.
        offset: its offset once it is confirmed.
        error: why it was refused; None as long as it was not.
        pending: the batch of one send that it belongs to.
        size: bytes of the record, roughly.
        exchange: it goes to each queue that is bound there by its topic; None: to the topic itself.
        mandatory: it is an error if it reaches no queue; else it is then forgotten.
        is_copy: a copy of a message that was read; our own limit of sizes does not count, as a topic has held it.
        of: the event of which this is the record for one queue; None otherwise.
    """

    __slots__ = (
        "error", "exchange", "headers", "id", "is_copy", "key", "mandatory", "of", "offset", "partition", "pending",
        "size", "timestamp", "topic", "value",
    )  # fmt: skip

    def __init__(
        self,
        id: str,  # noqa: A002 - the field's name everywhere
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: list[Header],
        timestamp: int,
        partition: int | None = None,
        beside: int | None = None,
        exchange: Exchange | None = None,
        mandatory: bool = True,
    ) -> None:
        self.id: str = id
        self.topic: str = topic
        self.key: bytes | None = key
        self.value: bytes | None = value
        self.headers: list[Header] = headers
        self.timestamp: int = timestamp
        self.partition: int | None = partition
        self.offset: int | None = None
        self.error: BaseException | None = None
        self.of: ProducerRecord | None = None
        self.pending: Any = None
        self.exchange: Exchange | None = exchange
        self.mandatory: bool = mandatory
        self.is_copy: bool = False
        self.size: int = len(value or b"") + (_beside(key, headers) if beside is None else beside)

    def to(self, topic: str) -> ProducerRecord:
        """The same, for one topic."""
        item = ProducerRecord(
            self.id, topic, self.key, self.value, self.headers, self.timestamp, self.partition,
            beside=self.size - len(self.value or b""), mandatory=self.mandatory,
        )  # fmt: skip
        item.of, item.error = self, self.error
        return item

    def refuse(self, error: BaseException) -> None:
        """Note why it is refused."""
        self.error = error
        if self.of is not None:
            self.of.error = error

    def fail(self, error: BaseException) -> None:
        """Note why it is refused, and tell whoever waits for it."""
        self.refuse(error)
        self.pending.limit.free(self.size)
        self.pending.failed[self.id] = error
        self.pending.done()


def _beside(key: bytes | None, headers: Sequence[Header]) -> int:
    """Bytes of a record beside its value, roughly."""
    size = OVERHEAD + 10 * len(headers)
    for name, value in headers:
        size += len(name) + len(value or b"")
    return size if key is None else size + len(key)


def records_of(
    batch: Sequence[Message], *, headers: Sequence[Header] = (), read: Iterable[Header] = ()
) -> list[ProducerRecord]:
    """The records of messages, each for the topic that is its queue.

    Parameters:
        headers: further headers for each.
        read: the headers of the record that these are copies of.
    """
    now = time.time()
    items: list[ProducerRecord] = []
    source: dict[str, Any] | None = None
    like: Callable[[str, bytes | None], ProducerRecord] | None = None
    for message in batch:
        shared = common(message) if type(message) is Draft else None
        if like is not None and shared is not None and shared is source:
            items.append(like(message.id, message.body))
            continue
        try:
            item = _outgoing(message, headers, now, read)
        except UNWRITABLE as error:
            items.append(_refused(message, error))
            continue
        items.append(item)
        if shared is not None:
            source, like = shared, _pattern(item)
    return items


def _pattern(first: ProducerRecord) -> Callable[[str, bytes | None], ProducerRecord]:
    """A function that makes records which differ from this one in id and value alone; it has no exchange."""
    at = next(number for number, (name, _) in enumerate(first.headers) if name == ID)
    before, behind = first.headers[:at], first.headers[at + 1 :]
    topic, key, timestamp, beside = first.topic, first.key, first.timestamp, first.size - len(first.value or b"")
    name = ID

    def like(id: str, value: bytes | None) -> ProducerRecord:  # noqa: A002
        return ProducerRecord(id, topic, key, value, [*before, (name, id.encode()), *behind], timestamp, None, beside)

    return like


def _outgoing(message: Message, headers: Sequence[Header], now: float, read: Iterable[Header]) -> ProducerRecord:
    partition = None
    stamp, apart = timestamp(message, now)
    if type(message) is Placed:
        partition = message.partition
        if message.timestamp is not None:
            stamp, apart = int(message.timestamp * 1000), False
    found = encode_headers(message, time_apart=apart, read=read)
    if headers:
        found += headers
    key = encode_key(message)
    return ProducerRecord(
        message.id, message.queue, key, message.body, found, stamp, partition,
        exchange=message.exchange, mandatory=message.mandatory,
    )  # fmt: skip


def _refused(message: Message, error: Exception) -> ProducerRecord:
    """In place of a message of which no record can be made, for example with a time that is not a number."""
    item = ProducerRecord(
        message.id, message.queue, None, None, [], 0, exchange=message.exchange, mandatory=message.mandatory
    )
    item.error = unwritable(error)
    return item


def not_held(messages: Iterable[Message], items: Iterable[ProducerRecord]) -> list[Message]:
    """The messages whose records were refused; `items` are their records in the same order."""
    return [message for message, item in zip(messages, items, strict=True) if item.error is not None]


def refused(
    failed: Mapping[str, BaseException], settings: KafkaSettings, batch: Iterable[ProducerRecord] = ()
) -> SendError:
    """The error for messages that Kafka does not take.

    Parameters:
        batch: all records that were sent together; with it, the error names the topic of the first refused one.
    """
    id_, first = next(iter(failed.items()))
    item = next((item for item in batch if item.id == id_), None)
    why = str(first) if isinstance(first, StreamToolsError) else _why(first) + _advice(first, item, settings)
    count = f"{len(failed)} message{'s' if len(failed) > 1 else ''}"
    unfit = [name for name, trouble in failed.items() if is_unfit(trouble)]
    error = SendError(
        f"{count} refused by {settings.safe_url}: {why.rstrip('.')}.", refused=list(failed), unfit=unfit
    )
    error.__cause__ = first
    return error


def _why(error: BaseException) -> str:
    if isinstance(error, kafka.InvalidTimestampError):
        return (
            "the topic does not accept its timestamp (INVALID_TIMESTAMP): see the topic's "
            "message.timestamp.before.max.ms and message.timestamp.after.max.ms, and this machine's clock"
        )
    if is_too_large(error):
        return (
            "too large for the topic (MESSAGE_TOO_LARGE); put less into a message, or raise the topic's "
            "max.message.bytes"
        )
    if wants_key(error):
        return "the topic does not take it (INVALID_RECORD); a compacted one wants a key: send(key=...)"
    return explained(error)


def _advice(error: BaseException, item: ProducerRecord | None, settings: KafkaSettings) -> str:
    """What an operator types to have the topic take it, if that is possible."""
    if item is None:
        return ""
    if is_too_large(error):
        change = f"max.message.bytes={item.size + COPY_ROOM}"
    elif wants_key(error):
        change = "cleanup.policy=delete"
    else:
        return f" (topic {item.topic})"
    host, port = settings.addresses[0]
    return (
        f". To have the topic {item.topic!r} take it: kafka-configs.sh --bootstrap-server {host}:{port} --alter "
        f"--entity-type topics --entity-name {item.topic} --add-config {change}"
    )


def unwritable(error: Exception) -> Unfit:
    """The error for a message of which no record can be made, or which the library cannot write."""
    return Unfit(f"it cannot be written as a record of Kafka: {error}")
