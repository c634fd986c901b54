"""KafkaProducer: sends to topics, each message confirmed by all replicas that are in sync."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, repeat
from secrets import token_hex
from typing import TYPE_CHECKING, ClassVar, Final, Unpack

from streamtools.delivery import Delivery, current
from streamtools.drivers.kafka.brokers.topics import Topic
from streamtools.drivers.kafka.consuming.partition import KafkaDelivery
from streamtools.drivers.kafka.features import FEATURES
from streamtools.drivers.kafka.names import check_kafka_name, check_kafka_reply
from streamtools.drivers.kafka.options import (
    KafkaProducerParameters,
    KafkaSendManyParameters,
    KafkaSendParameters,
    ProducerOptions,
    SendOptions,
    is_async,
)
from streamtools.drivers.kafka.producing.own_topic import make_and_send_again
from streamtools.drivers.kafka.producing.record import ProducerRecord, Records, not_held, records_to_send
from streamtools.drivers.kafka.producing.sender import Sender
from streamtools.drivers.kafka.producing.transaction import Transaction, current_transaction
from streamtools.drivers.kafka.producing.transactions import TransactionalProducer, opened, same_kafka
from streamtools.drivers.kafka.records import Placed
from streamtools.engine.backoff import backoff_within
from streamtools.errors import Closed, ConnectError, ConnectionLost, SendError, StreamToolsError
from streamtools.message import Message, sets_slots
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Sends with wait=False under way at most; beyond, `send` waits.
UNDER_WAY: Final = 10_000


@sets_slots
@dataclass(frozen=True, slots=True)
class KafkaReceipt(Receipt):
    """Where a message stands in its topic.

    Attributes:
        partition: the partition's number.
        offset: in the partition; None if Kafka held the message already, from an attempt before.
    """

    partition: int | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class PendingReceipt(Receipt):
    """Awaiting it returns the KafkaReceipt, or raises what `send` would have raised."""

    task: asyncio.Task[list[Receipt]] = field(repr=False, compare=False)
    position: int = field(repr=False, compare=False)

    async def _confirmed(self) -> Receipt:
        # Shielded: the task goes on if whoever waits for it is cancelled.
        return (await asyncio.shield(self.task))[self.position]


class KafkaProducer(Producer, protocol="kafka"):
    """Sends to Kafka: idempotent, confirmed by all in-sync replicas. Options: `ProducerOptions`, `SendOptions`."""

    features = FEATURES
    settings_class: ClassVar[type[KafkaSettings]] = KafkaSettings
    options_class: ClassVar[type[ProducerOptions]] = ProducerOptions
    send_options_class: ClassVar[type[SendOptions]] = SendOptions
    settings: KafkaSettings
    options: ProducerOptions
    _sender: Sender | None = None

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        async def send(  # type: ignore[override]
            self, payload: object, **options: Unpack[KafkaSendParameters]
        ) -> Receipt: ...
        async def send_many(  # type: ignore[override]
            self, payloads: Iterable[object], **options: Unpack[KafkaSendManyParameters]
        ) -> list[Receipt]: ...

    def __init__(self, queue: str, **options: Unpack[KafkaProducerParameters]) -> None:
        super().__init__(queue, **options)
        self._under_way: set[asyncio.Task[list[Receipt]]] = set()
        self._failed: list[SendError] = []
        self._idle: list[TransactionalProducer] = []

    async def flush(self) -> None:
        """Return when everything sent with `wait=False` is confirmed.

        Raises:
            SendError: naming those that failed since the last `flush()`.
        """
        here = self._here()
        while here._under_way:
            await asyncio.wait(set(here._under_way))
        failed, here._failed = here._failed, []
        if failed:
            refused = [id for error in failed for id in error.refused]
            unknown = [id for error in failed for id in error.unknown]
            messages = [message for error in failed for message in error.messages]
            raise SendError(str(failed[0]), refused=refused, unknown=unknown, messages=messages) from failed[0]

    async def close(self) -> None:
        """Wait for what was sent with `wait=False`, then end. Safe to repeat."""
        try:
            await self.flush()
        except SendError as error:
            log.error("%r: sent with wait=False and not held by Kafka: %s", self, error)  # noqa: TRY400
        await super().close()

    # --- hooks ------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._close()
        self._sender = sender = Sender(self.settings, self.client_id)
        topics = await sender.open()
        if self.declare is not False:
            await topics.declare([self._topic], self.declare)

    async def _send(self, batch: Sequence[Message], options: SendOptions) -> Sequence[Receipt] | None:
        given, batch = batch, _placed(batch, options)
        if (delivery := self._collecting()) is not None:
            delivery.outgoing += tuple(batch)  # sent with the acknowledgement, or not at all
            return None
        if (transaction := self._transaction()) is not None:
            return _receipts(await transaction.send(batch, given))
        if not self._waits(options):
            return await self._send_later(batch, options)
        if self._sender is None:
            if self._closed:
                raise Closed(f"{self!r} was closed; call open() to use it again.")
            raise ConnectionLost(f"{self!r} is not connected.")
        items = records_to_send(batch)
        try:
            await self._publish(self._sender, items)
        except SendError as error:
            error.messages = not_held(given, items)
            raise
        return _receipts(items)

    async def _publish(self, sender: Sender, items: Sequence[Records]) -> None:
        try:
            await sender.publish(items)
        except SendError:
            if self.declare is not True or not await make_and_send_again(sender, items, self._topic, repr(self)):
                raise

    @property
    def _topic(self) -> Topic:
        options = self.options
        return Topic(name=self.queue, partitions=options.partitions, replication=options.replication)

    def _why_unconfirmed(self) -> str:
        return self._sender.what_it_waits_for() if self._sender is not None else super()._why_unconfirmed()

    async def _close(self) -> None:
        sender, self._sender = self._sender, None
        idle, self._idle = self._idle, []
        ends = [one.close() for one in idle]
        if sender is not None:
            ends.append(sender.close())
        await asyncio.gather(*ends)

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_kafka_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        check_kafka_reply(queue)

    # --- transactions -----------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """What any producer of this Kafka sends inside becomes visible together, or not at all.

        Our consumers, and all others that read only committed messages, see it after the end; an exception inside
        aborts it. In a handler of a consumer with `exactly_once=True` it adds nothing: all that the handler sends
        belongs to the transaction of its message.

        Raises:
            SendError: a message is refused, and nothing was sent; or, with `.unknown`, it is not known
                whether all of it was sent.
            ConnectError: the broker cannot be reached.
        """
        if self._collecting() is not None:
            yield
            return
        here = self._here()
        transaction = Transaction(await here._get_transactional(), here.settings)
        await transaction.begin()
        token = current_transaction.set(transaction)
        try:
            yield
            await transaction.commit()
        except BaseException:
            await transaction.abort()
            raise
        finally:
            current_transaction.reset(token)
            await here._put_back(transaction.producer)

    async def _get_transactional(self) -> TransactionalProducer:
        if not self._connected:
            await self.open()
        return self._idle.pop() if self._idle else await self._open_transactional(self.client_id or self.queue)

    async def _open_transactional(self, name: str) -> TransactionalProducer:
        """A producer with a new transactional id; tried again until `send_timeout` while that can help."""
        deadline, failures = time.monotonic() + self.send_timeout, 0
        while True:
            made = TransactionalProducer(
                self.settings, f"streamtools-{name}-{token_hex(8)}", self.client_id or f"streamtools-{name}"
            )
            try:
                return await opened(made, self.settings)
            except ConnectError as error:
                failures += 1
                delay = backoff_within(failures, deadline - time.monotonic())
                if error.permanent or delay is None:
                    raise
                log.debug("%r: a transaction could not begin: %s Trying again in %.1f s.", self, error, delay)
            await asyncio.sleep(delay)

    async def _put_back(self, transactional: TransactionalProducer) -> None:
        if transactional.broken or self._closed:
            await transactional.close()
        else:
            self._idle.append(transactional)

    def _transaction(self) -> Transaction | None:
        transaction = current_transaction.get()
        return transaction if transaction is not None and same_kafka(transaction.settings, self.settings) else None

    def _collecting(self) -> Delivery | None:
        """The message being handled, if what is sent now leaves with its acknowledgement (`exactly_once=True`)."""
        delivery = current.get()
        if not isinstance(delivery, KafkaDelivery):
            return None
        transactions = delivery.partition.transactions
        if transactions is None or not same_kafka(transactions.settings, self.settings):
            return None
        return delivery

    # --- without waiting --------------------------------------------------------------------------

    def _waits(self, options: SendOptions) -> bool:
        if options.wait is not None:
            return options.wait
        said = is_async(options.method)
        return not (is_async(self.options.method) if said is None else said)

    async def _send_later(self, batch: Sequence[Message], options: SendOptions) -> list[Receipt]:
        while len(self._under_way) >= UNDER_WAY:
            await asyncio.wait(set(self._under_way), return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._deliver(batch, options.model_copy(update={"wait": True})))
        self._under_way.add(task)
        task.add_done_callback(self._sent_later)
        return [PendingReceipt(m.id, m.queue, task, position) for position, m in enumerate(batch)]

    def _sent_later(self, task: asyncio.Task[list[Receipt]]) -> None:
        self._under_way.discard(task)
        if task.cancelled():
            return
        error = task.exception()  # looked at: flush() raises it, whether the receipt is awaited or not
        if isinstance(error, SendError):
            self._failed.append(error)
        elif isinstance(error, StreamToolsError):
            self._failed.append(SendError(str(error)))


def _placed(batch: Sequence[Message], options: SendOptions) -> Sequence[Message]:
    if options.partition is None and options.timestamp is None:
        return batch
    return [Placed.of(message, options.partition, options.timestamp) for message in batch]


def _receipts(items: Iterable[Records]) -> list[Receipt]:
    found: list[Receipt] = []
    for item in items:
        if isinstance(item, ProducerRecord):
            found.append(KafkaReceipt(item.id, item.topic, item.partition, item.offset))
        elif item.parts:
            found += _receipts(item.parts)
        else:
            offsets = repeat(None) if item.offset is None else count(item.offset)
            found += map(KafkaReceipt, item.ids, repeat(item.topic), repeat(item.partition), offsets)
    return found
