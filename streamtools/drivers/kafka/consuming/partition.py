"""State of one assigned partition, from its assignment until it is revoked."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, cast

from aiokafka import TopicPartition

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.client.fetched import Fetched
from streamtools.drivers.kafka.consuming.not_due import NotDueRecords
from streamtools.drivers.kafka.offsets import Offsets
from streamtools.drivers.kafka.producing.transactions import Identity, TransactionalProducer
from streamtools.drivers.kafka.records import Origin, told_origin
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")


class KafkaDelivery(Delivery):
    """A message of one partition. Its token is the parsed record, or None where the message itself keeps the record.

    Attributes:
        partition: the assigned partition that it was read from.
        offset: its offset in that partition.
    """

    __slots__ = ("offset", "partition")

    partition: AssignedPartition
    offset: int

    @property
    def origin(self) -> Origin:
        """Where the message was read first."""
        topic, number = self.partition.place
        told = None if self.token is None else told_origin(self.token)
        return told or Origin(topic, number, self.offset)


def delivery_of(settlement: Settlement) -> KafkaDelivery:
    """The delivery that a settlement is about; a Kafka consumer gets no others."""
    return cast(KafkaDelivery, settlement.delivery)


@dataclass(slots=True, eq=False)
class PartitionTransactions:
    """What one partition needs for transactions (`exactly_once=True`).

    Attributes:
        settings: of the Kafka where the transactions are made.
        identity: the producer id and epoch that fence off the former owner; used up by the first producer.
        lock: held during a transaction, so that there is one at a time.
        producer: makes the transactions; None before the first one, and after a failure.
    """

    settings: KafkaSettings
    identity: Identity | None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    producer: TransactionalProducer | None = None


class AssignedPartition:
    """The records of one assigned partition that are here, and which of its offsets are finished.

    Attributes:
        place: topic and number of the partition.
        is_retry: it belongs to the group's retry topic.
        offsets: what is finished; `offsets.pending[offset]` is the delivery while it is in hand, and None otherwise.
        committed_offset: the offset of the last commit.
        settling: how many settlements are under way.
        arrived: fetched records that were not taken yet, one item for each fetch.
        not_due: records that wait in memory until they are due.
        metadata_full: a commit's metadata cannot hold more gaps; nothing is taken until the first gap closes.
        paused: the client library does not fetch it for now.
        revoking: it is about to be revoked; no further message of it is handled.
        revoked: it was revoked; nothing that is left of it counts.
        transactions: how its offsets are committed with `exactly_once=True`; None otherwise.
    """

    def __init__(
        self,
        place: TopicPartition,
        offsets: Offsets,
        *,
        is_retry: bool = False,
        transactions: PartitionTransactions | None = None,
    ) -> None:
        self.place: TopicPartition = place
        self.is_retry: bool = is_retry
        self.offsets: Offsets = offsets
        self.committed_offset: int = offsets.next
        self.settling: int = 0
        self.arrived: deque[Fetched] = deque()
        self.not_due: NotDueRecords = NotDueRecords()
        self._end = offsets.next  # of what was fetched
        self.metadata_full: bool = False
        self.paused: bool = False
        self.revoking: bool = False
        self.revoked: bool = False
        self.transactions: PartitionTransactions | None = transactions

    def arrive(self, fetched: Fetched) -> None:
        """Keep what was fetched."""
        self.reach(fetched.start)
        self.arrived.append(fetched)
        self._end = fetched.end

    def reach(self, offset: int) -> None:
        """The next fetch begins at `offset`. If that skips messages nobody has read, Kafka has deleted them: warn."""
        first, self._end = self._end, max(offset, self._end)
        if offset > first and self.offsets.unfinished(first, offset):
            topic, partition = self.place
            log.warning(
                "Kafka has deleted messages that were not read yet: topic %r, partition %d, from offset %d to %d. "
                "Going on at %d. They exceeded the retention of the topic, or somebody has deleted them: keep "
                "more (`streamtools queues alter %s --retention 30d`), or read faster.",
                topic,
                partition,
                first,
                offset - 1,
                offset,
                topic,
            )

    def take_over(self, record: Any, other: AssignedPartition) -> None:
        """Go on with this record and with what had arrived behind it in `other`, the same partition before."""
        if other.transactions is not None:
            self.transactions = replace(other.transactions, lock=asyncio.Lock())
            other.transactions.identity = other.transactions.producer = None
        self.arrived.append(Fetched(iter((record,)), record.offset + 1, 0))
        self.arrived.extend(other.arrived)
        self._end = other._end

    @property
    def waiting(self) -> int:
        """How many records have arrived and were not taken, at most: offsets without a record count as well."""
        return max(0, self._end - self.offsets.next) if self.arrived else 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes of memory of the records that have arrived and were not taken."""
        return sum(fetched.held for fetched in self.arrived)

    @property
    def unpacked(self) -> int:
        """Bytes of the batch that is being read, if it was compressed."""
        return self.arrived[0].unpacked if self.arrived else 0

    def deliver(self, offset: int, message: Message, record: Any, trouble: DecodeError | None) -> KafkaDelivery:
        """The delivery of the message at `offset`, which is in hand from now on."""
        self.offsets.pending[offset] = delivery = KafkaDelivery(message, record, 0, trouble)
        delivery.partition, delivery.offset = self, offset
        return delivery

    @property
    def in_hand(self) -> list[KafkaDelivery]:
        """The deliveries in hand that are not being settled."""
        return [delivery for delivery in self.offsets.pending.values() if delivery is not None]

    def holds(self, delivery: KafkaDelivery) -> bool:
        """This very delivery is in hand and not being settled."""
        return not self.revoked and self.offsets.pending.get(delivery.offset) is delivery

    def __repr__(self) -> str:
        return f"<AssignedPartition {self.place.topic}-{self.place.partition} at {self.offsets.position}>"
