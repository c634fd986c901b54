"""ProducerRecord and RecordRun: one record, or many alike, on their way; and the errors for what Kafka refuses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from aiokafka import errors as kafka

from streamtools.drivers.kafka.client.record_batch import RecordBatch
from streamtools.drivers.kafka.errors import Unfit, explained, is_too_large, is_unfit, wants_key
from streamtools.drivers.kafka.records import COPY_ROOM, ID, Header, Placed, encode_headers, encode_key, timestamp
from streamtools.errors import SendError, StreamToolsError
from streamtools.exchange import Exchange
from streamtools.message import Drafts, Message
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

    #: How many records it is.
    number: Final = 1

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

    def singles(self) -> Sequence[ProducerRecord]:
        """Its records one by one."""
        return (self,)

    def cut(self, most: int) -> Sequence[ProducerRecord]:  # noqa: ARG002 - as a RecordRun takes it
        """What goes on its way: itself, whatever its size is."""
        return (self,)

    def append_to(self, batch: RecordBatch) -> bool:
        """Write it into a batch; False if the batch has no room.

        Raises:
            UNWRITABLE: no record can be made of it.
        """
        return batch.append(self.timestamp, self.key, self.value, self.headers)

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


class RecordRun:
    """Records that were sent together, and differ in id and value alone.

    As long as all goes well they travel as one, so that what they have in common is done once. When something happens
    to one of them, they become single records.

    Parameters:
        like: a record like them.
        ids: of their messages, in order.
        values: as many.

    Attributes:
        pending: the batch of one send that they belong to.
        partition: where they are, once they are confirmed.
        offset: of the first, once they are confirmed; None if Kafka held them already, from an attempt before.
        size: bytes of all of them, roughly.
        parts: what travels in place of this run, once it was cut.
    """

    __slots__ = ("_beside", "_like", "ids", "number", "offset", "partition", "parts", "pending", "size", "values")

    error: Final = None
    exchange: Final = None
    is_copy: Final = False
    mandatory: Final = True

    def __init__(self, like: ProducerRecord, ids: Sequence[str], values: Sequence[bytes]) -> None:
        self._like = like
        self._beside = like.size - len(like.value or b"")
        self.ids: Sequence[str] = ids
        self.values: Sequence[bytes] = values
        self.number: int = len(ids)
        self.offset: int | None = None
        self.partition: int | None = None
        self.parts: Sequence[Records] = ()
        self.pending: Any = None
        self.size: int = self._beside * len(ids) + sum(map(len, values))

    @property
    def topic(self) -> str:
        """Of all of them."""
        return self._like.topic

    @property
    def key(self) -> bytes | None:
        """Of all of them."""
        return self._like.key

    def cut(self, most: int) -> Sequence[Records]:
        """What goes on its way: runs of so many bytes at most, or single records.

        Parameters:
            most: bytes.
        """
        if self.size <= most:
            return (self,)
        step = most // (self._beside + max(map(len, self.values)))
        if step < 2:  # noqa: PLR2004 - a run of one is a single record
            return self.singles()
        starts = range(0, self.number, step)
        self.parts = [
            RecordRun(self._like, self.ids[start : start + step], self.values[start : start + step])
            for start in starts
        ]
        return self.parts

    def singles(self) -> Sequence[ProducerRecord]:
        """The records one by one, which travel in place of this run from now on."""
        if not self.parts:
            self.parts = [self._single(place) for place in range(self.number)]
        return singles(self.parts)

    def _single(self, place: int) -> ProducerRecord:
        like, id_ = self._like, self.ids[place]
        headers = [(name, id_.encode() if name == ID else value) for name, value in like.headers]
        item = ProducerRecord(
            id_, like.topic, like.key, self.values[place], headers, like.timestamp, self.partition, self._beside
        )
        item.pending = self.pending
        item.offset = None if self.offset is None else self.offset + place
        return item

    def append_to(self, batch: RecordBatch) -> bool:
        """Write all of them into a batch; False if the batch has no room.

        Raises:
            UNWRITABLE: no records can be made of them.
        """
        like = self._like
        ids = [id_.encode() for id_ in self.ids]
        return batch.append_alike(like.timestamp, like.key, self.values, like.headers, ID, ids)


Records = ProducerRecord | RecordRun


def singles(items: Iterable[Records]) -> list[ProducerRecord]:
    """The records one by one."""
    return [single for item in items for single in item.singles()]


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
    items = []
    for message in batch:
        try:
            items.append(_outgoing(message, headers, now, read))
        except UNWRITABLE as error:
            items.append(_refused(message, error))
    return items


def records_to_send(batch: Sequence[Message]) -> Sequence[Records]:
    """The records of messages that a producer sends; those that are alike as one run."""
    if type(batch) is Drafts and len({*map(len, batch.ids)}) == 1:
        with suppress(*UNWRITABLE):
            like = _outgoing(batch[0], (), time.time(), ())
            return [RecordRun(like, batch.ids, batch.bodies)]
    return records_of(batch)


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


def not_held(messages: Iterable[Message], items: Iterable[Records]) -> list[Message]:
    """The messages whose records were refused; `items` are their records in the same order."""
    return [message for message, item in zip(messages, singles(items), strict=True) if item.error is not None]


def refused(failed: Mapping[str, BaseException], settings: KafkaSettings, batch: Iterable[Records] = ()) -> SendError:
    """The error for messages that Kafka does not take.

    Parameters:
        batch: all records that were sent together; with it, the error names the topic of the first refused one.
    """
    id_, first = next(iter(failed.items()))
    item = next((item for item in singles(batch) if item.id == id_), None)
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
