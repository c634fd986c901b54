"""The records that a consumer sends: copies of what it has read, and what its handlers have sent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from streamtools.delivery import Settlement
from streamtools.drivers.kafka.consuming.delays import DelayedRecord, level_of
from streamtools.drivers.kafka.consuming.partition import delivery_of
from streamtools.drivers.kafka.producing.record import ProducerRecord, records_of
from streamtools.drivers.kafka.records import GROUP, QUEUE, RETRIES, Header, decode_origin, header_texts, now_ms
from streamtools.message import Message
from streamtools.verdicts import Copy


class Copies:
    """Makes records for one consumer.

    Parameters:
        queue: the consumer's own.
        group: the consumer's.
        retry_topic: where retries of the group wait.
        levels: the number of partitions of that topic; 0 when it does not exist.
    """

    def __init__(self, *, queue: str, group: str, retry_topic: str, levels: int) -> None:
        self._queue = queue
        self._retry_topic = retry_topic
        self._levels = levels
        self._rejected_here: list[Header] = [(GROUP, group.encode())]
        if levels:  # the way back to this group alone
            self._rejected_here.append((RETRIES, retry_topic.encode()))

    def of(self, settlement: Settlement) -> list[ProducerRecord]:
        """The records for all messages that a settlement sends."""
        return [self.one(settlement, message) for message in settlement.outgoing]

    def one(self, settlement: Settlement, message: Message) -> ProducerRecord:
        """The record for one message that a settlement sends."""
        copy = settlement.verdict.kind.copy
        record = settlement.delivery.token if message.id == settlement.delivery.message.id else None
        if copy is Copy.RETRY and message.queue == settlement.delivery.message.queue:
            return self._retry(message, self._history(settlement, message), record)
        headers = self._history(settlement, message) if copy is Copy.ERROR else []
        [item] = records_of([message], headers=headers, read=_headers(record))
        item.is_copy = copy is not None
        return item

    def delayed(self, delayed: DelayedRecord) -> ProducerRecord:
        """The copy of a record that is not due, for the retry topic."""
        partition, record, message = delayed
        if partition.is_retry:
            queue = header_texts(record.headers, (QUEUE,)).get(QUEUE, self._queue)
            message = message.replace(queue=queue)
        headers = [*decode_origin(record, partition.place).headers, *_rejected_before(record)]
        return self._retry(message, headers, record)

    def _history(self, settlement: Settlement, message: Message) -> list[Header]:
        """Headers that say where the message was read first, and which group has rejected it."""
        delivery = delivery_of(settlement)
        if message.error is not None and message.error is delivery.message.error:
            # The consumer of an error queue has failed: the message keeps the group that had rejected it before.
            return [*delivery.origin.headers, *_rejected_before(delivery.token)]
        group = self._rejected_here if settlement.verdict.kind.copy is Copy.ERROR else ()
        return [*delivery.origin.headers, *group]

    def _retry(self, message: Message, headers: list[Header], record: Any) -> ProducerRecord:
        """A record for the group's retry topic, on the level for the message's delay."""
        delay = 0.0 if message.deliver_at is None else message.deliver_at - time.time()
        [item] = records_of([message], headers=[*headers, (QUEUE, message.queue.encode())], read=_headers(record))
        item.topic, item.partition, item.timestamp = self._retry_topic, level_of(delay, self._levels), now_ms()
        item.is_copy = True
        return item


def _headers(record: Any) -> Sequence[Header]:
    """The headers of the record that was read; none where it was not kept, as it then had none that matter."""
    return () if record is None else record.headers


def _rejected_before(record: Any) -> list[Header]:
    return [(name, value) for name, value in _headers(record) if name in (GROUP, RETRIES)]
