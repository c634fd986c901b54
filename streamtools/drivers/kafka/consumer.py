"""KafkaConsumer: a member of a group, which handles several messages of one partition concurrently."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Hashable, Sequence
from typing import Any, ClassVar, Final, Unpack, cast

from aiokafka import TopicPartition

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.brokers.bindings import bind
from streamtools.drivers.kafka.brokers.topics import MAX_MESSAGE, Topic, topics_at
from streamtools.drivers.kafka.consuming.copies import Copies
from streamtools.drivers.kafka.consuming.delays import DELAY_LEVELS, Delays
from streamtools.drivers.kafka.consuming.exactly_once import TransactionalPublisher
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, KafkaDelivery
from streamtools.drivers.kafka.consuming.prefetch import Prefetcher
from streamtools.drivers.kafka.consuming.retries import RetryPublisher
from streamtools.drivers.kafka.consuming.settling import Settler
from streamtools.drivers.kafka.consuming.starts import Start
from streamtools.drivers.kafka.consuming.subscription import SubscriptionConfig, subscription
from streamtools.drivers.kafka.consuming.topic_changes import TopicChanges
from streamtools.drivers.kafka.errors import client_error
from streamtools.drivers.kafka.features import FEATURES
from streamtools.drivers.kafka.names import check_kafka_name, check_kafka_reply, retry_topic
from streamtools.drivers.kafka.options import ConsumerOptions, KafkaConsumerParameters
from streamtools.drivers.kafka.records import COPY_ROOM, QUEUE, decode_plain, header_texts, read_record
from streamtools.engine.loop import Ack
from streamtools.errors import Closed, ConfigurationError, SendError, StreamToolsError
from streamtools.settings import KafkaSettings
from streamtools.validation.checks import check_name
from streamtools.verdicts import Verdict

log: logging.Logger = logging.getLogger("streamtools")

#: An error topic keeps rejected messages until an operator has seen them.
KEEP: Final = {"retention.ms": "-1"}


class KafkaConsumer(Consumer, protocol="kafka"):
    """Receives from Kafka as a member of a group (named as the queue, unless `group=`). Options: `ConsumerOptions`.

    Up to `concurrency` messages of a partition are handled at a time, in the order that `ordered_by` asks for:
    "partition", "key", or none. Only the offset before which all messages are finished is committed. What is finished
    behind it is told with the commit, so that a restart repeats only what was not finished.

    A delayed message and a retry wait in the group's own topic `<queue>.retry` (see consuming/delays.py).
    """

    features = FEATURES
    settings_class: ClassVar[type[KafkaSettings]] = KafkaSettings
    options_class: ClassVar[type[ConsumerOptions]] = ConsumerOptions
    settings: KafkaSettings
    options: ConsumerOptions
    poll_timeout: ClassVar[float] = 0.5
    _member: GroupMember | None = None
    _publisher: RetryPublisher | None = None
    _delays: Delays | None = None
    _settler: Settler | None = None
    _prefetcher: Prefetcher | None = None

    def __init__(self, queue: str, **options: Unpack[KafkaConsumerParameters]) -> None:
        super().__init__(queue, **options)
        self._given_group: str | None = self.group
        self._apply_options()
        self._wake: asyncio.Future[None] | None = None
        self._topic_changes = TopicChanges(self.settings)

    def _apply_options(self) -> None:
        options = self.options
        if options.consumer_group is not None:
            if self._given_group not in (None, options.consumer_group):
                raise ConfigurationError("group= and consumer_group= are the same; give one of them.")
            check_name(options.consumer_group, "group")
            self.group: str | None = options.consumer_group
        if options.auto_ack:
            self.ack: Ack = "on_receive"
        told = {"start_time": options.start_time, "start_offset": options.start_offset}
        begins = [name for name, value in told.items() if value is not None]
        if len(begins) > 1 or (begins and self.offset == "latest"):
            raise ConfigurationError(
                f"A new group begins in one place: give {begins[0]}= alone, without offset= and another start."
            )
        if options.exactly_once and self.ack == "on_receive":
            raise ConfigurationError(
                "exactly_once=True acknowledges after the handler: leave ack= and auto_ack= away."
            )
        self.group_id: str = self.group or self.queue
        self.retry_topic: str = retry_topic(self.queue, self.group_id)

    # --- opening ----------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._close()
        self._apply_options()  # the decorator may have brought more
        levels = await self._declare()
        member = self._begin(self._new_member(has_retry_topic=levels > 0), levels)
        await member.join(self._name)
        assert member.client is not None
        self._prefetcher = Prefetcher(member, member.client, changed=self._wake_up, failed=self._fail)

    def _new_member(self, *, has_retry_topic: bool) -> GroupMember:
        return GroupMember(
            self.settings, self._subscription(has_retry_topic), changed=self._wake_up, drained=self._drained,
            passed_over=self._pass_over, doubted=self._doubted, topic_changes=self._topic_changes,
        )  # fmt: skip

    def _new_publisher(self, copies: Copies, member: GroupMember) -> RetryPublisher:
        if self.options.exactly_once:
            return TransactionalPublisher(self.settings, copies, member, self._name)
        return RetryPublisher(self.settings, copies, sender_id=self.client_id)

    def _begin(self, member: GroupMember, levels: int) -> GroupMember:
        """Make the objects that live as long as this membership."""
        copies = Copies(queue=self.queue, group=self.group_id, retry_topic=self.retry_topic, levels=levels)
        self._member = member
        self._publisher = publisher = self._new_publisher(copies, member)
        self._delays = delays = Delays(
            publisher.forward,
            exactly_once=self.options.exactly_once,
            finished=lambda number: member.commits.finished(number, at_once=True),
            failed=self._fail,
            changed=self._progressed,
            name=repr(self),
        )
        self._settler = Settler(
            member,
            publisher,
            delays,
            changed=self._wake_up,
            by_hand=lambda: self._loop is None or self.ack == "manual",
        )
        delays.start()
        return member

    @property
    def _name(self) -> str:
        return self.client_id or f"streamtools-{self.queue}"

    async def _redeclare(self) -> None:
        await self._declare()

    async def _declare(self) -> int:
        """Make the topics that are ours to make; the partitions (delay levels) of the retry topic, 0 without one."""
        options = self.options
        known = self._topic_changes.count  # a topic that was deleted in use comes back as it was
        queues = [
            Topic(name=name, partitions=options.partitions or known(name), replication=options.replication)
            for name in dict.fromkeys((self.queue, *options.topics))
        ]
        named = len(queues)
        copies = {MAX_MESSAGE: str(self.settings.max_message + COPY_ROOM)}
        common: dict[str, Any] = {
            "replication": options.replication, "copies_of": tuple(topic.name for topic in queues),
        }  # fmt: skip
        error = Topic(name=self.error_queue, config=copies | KEEP, **common)
        retry = Topic(name=self.retry_topic, partitions=len(DELAY_LEVELS), config=copies, **common)
        if error.name not in {topic.name for topic in queues}:
            queues.append(error)
        async with topics_at(self.settings, self._name) as topics:
            if self.declare is True:
                levels = (await topics.declare([*queues, retry], True))[retry.name]
            else:
                # Not ours to make; without a retry topic, a retry is an error that says so.
                await topics.declare(queues if self.declare == "passive" else queues[:named], "passive")
                levels = (await topics.find([retry.name])).get(retry.name, 0)
            if self.bindings:
                await bind(topics.client, self.settings, self.queue, self.bindings, replication=options.replication)
            return levels

    def _subscription(self, has_retry_topic: bool) -> SubscriptionConfig:
        options = self.options
        topics = dict.fromkeys((self.queue, *options.topics, *([self.retry_topic] if has_retry_topic else [])))
        return SubscriptionConfig(
            group=self.group_id,
            topics=tuple(topics),
            retry_topic=self.retry_topic,
            pattern=subscription(options.pattern, tuple(topics), self.error_queue),
            start=Start(latest=self.offset == "latest", offset=options.start_offset, time=options.start),
            static_id=options.static_id,
            revoke_timeout=options.revoke_timeout,
            exactly_once=options.exactly_once,
        )

    @property
    def connected(self) -> bool:
        """A broker is connected, as far as is known; if none is, the library connects again by itself."""
        member = self._member
        return self._connected and (member is None or member.client is None or member.is_connected)

    # --- receiving --------------------------------------------------------------------------------

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        await asyncio.sleep(0)  # the library's turn: what comes next is fetched while this is handled
        while True:
            member = self._member
            if member is None:
                raise Closed(f"{self!r} was closed while it waited for messages.")
            if member.failure is not None:
                raise member.failure
            if self._wake is None or self._wake.done():  # before records are taken, so that no change is missed
                self._wake = asyncio.get_running_loop().create_future()
            batch = self._take(member, limit)
            if batch:
                return batch
            await self._wait_for_change(member, self._wake)

    async def _wait_for_change(self, member: GroupMember, wake: asyncio.Future[None]) -> None:
        """Return when something may have come, or a record in memory is due."""
        due = Delays.next_due(member.partitions.values())
        timeout = None if due is None else max(0.0, due - time.time())
        await asyncio.wait({wake}, timeout=timeout)

    def _take(self, member: GroupMember, limit: int) -> list[Delivery]:
        """The next deliveries: those given back first, then records that waited in memory, then new ones."""
        batch: list[Delivery] = []
        if member.is_doubtful:
            return batch
        now = time.time()
        if self._settler is not None and self._settler.returned:
            self._settler.redeliver(batch, limit)
        for partition in member.partitions.values():
            if partition.not_due and not partition.revoking:
                for record in partition.not_due.take_due(now, limit - len(batch)):
                    self._deliver(partition, record, batch, now)
        if self._prefetcher is not None and self._delays is not None and not self._delays.is_full:
            ready = self._prefetcher.ready()
            share = -(-limit // max(1, len(ready)))
            try:
                for partition in ready:
                    self._take_arrived(member, partition, batch, min(limit, len(batch) + share), now)
            except Exception as error:  # bytes that the library cannot read
                (failure := client_error(error, self.settings)).__cause__ = error
                self._fail(failure)
            self._prefetcher.taken()
        return batch

    def _take_arrived(
        self, member: GroupMember, partition: AssignedPartition, batch: list[Delivery], limit: int, now: float
    ) -> None:
        arrived, offsets = partition.arrived, partition.offsets
        pending, place = partition.offsets.pending, partition.place
        decode = _not_plain if partition.is_retry else decode_plain
        while arrived and len(batch) < limit:
            for record in arrived[0].records:
                offset = record.offset
                if offset < offsets.next:
                    # The log was cut (an unclean election, a topic made anew): our offsets mean other messages.
                    return member.restart(partition, record)
                if not offsets.take(offset):
                    member.commits.finished()  # by the partition's former owner
                elif (message := decode(record, place)) is not None:
                    pending[offset] = delivery = KafkaDelivery(message)
                    delivery.partition, delivery.offset = partition, offset
                    batch.append(delivery)
                else:
                    self._deliver(partition, record, batch, now)
                if len(batch) >= limit:
                    return
            arrived.popleft()

    def _deliver(self, partition: AssignedPartition, record: Any, batch: list[Delivery], now: float) -> None:
        """Add the delivery of a record to `batch` if it is due; else hand it to Delays."""
        queue = None
        if partition.is_retry:  # messages of several queues wait there
            queue = header_texts(record.headers, (QUEUE,)).get(QUEUE, self.queue)
        message, trouble = read_record(record, partition.place, queue)
        if message.deliver_at is not None and message.deliver_at > now:
            assert self._delays is not None
            self._delays.keep_or_forward(partition, record, message, now)
            return
        batch.append(partition.deliver(record.offset, message, record, trouble))

    def _ordering_key(self, delivery: Delivery) -> Hashable:
        if self.ordered_by == "partition":
            return cast(Hashable, cast(KafkaDelivery, delivery).partition.place)
        return super()._ordering_key(delivery)

    # --- settling ---------------------------------------------------------------------------------

    async def _ack(self, deliveries: Sequence[Delivery]) -> None:
        if self.wrapper is not None or self.options.exactly_once or self.ack == "on_receive":
            return await super()._ack(deliveries)
        if self._settler is not None:
            self._settler.acknowledge(deliveries)

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        if (settler := self._settler) is None:
            raise Closed(f"{self!r} was closed.")
        if self.options.exactly_once or any(s.outgoing for s in settlements):
            await settler.send_and_finish(settlements, self._reject)
        else:
            settler.finish(settlements)
        if self.ack == "on_receive":
            await settler.commit_first(settlements)

    def _reject(self, settlement: Settlement, error: SendError) -> Settlement:
        """Kafka refuses what a handler has sent: that is the handler's failure, and no retry helps."""
        delivery = settlement.delivery
        dispatch = self._puller.decider if self._loop is None else self._loop.decider
        return dispatch.settlement(delivery, delivery.message, Verdict.reject(str(error)), error)

    async def _pass_over(self, partitions: Collection[AssignedPartition]) -> None:
        if self._publisher is not None:
            await self._publisher.pass_over(partitions)

    def _doubted(self, doubtful: bool) -> None:
        loop = self._loop
        if loop is not None and self.ack != "on_receive":  # else what is in hand is committed, and ours in any case
            if doubtful:
                loop.hold()
            else:
                loop.resume()
        self._wake_up()

    async def _drained(self, partitions: Collection[AssignedPartition]) -> None:
        if self._settler is not None:
            await self._settler.drain(partitions, self.options.revoke_timeout)

    # --- the end ----------------------------------------------------------------------------------

    async def _stop(self) -> None:
        prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            await prefetcher.stop()

    async def _close(self) -> None:
        member, self._member = self._member, None
        publisher, self._publisher = self._publisher, None
        delays, self._delays = self._delays, None
        self._wake_up()
        if member is None:
            return
        if self._settler is not None:
            self._settler.close()
        if delays is not None:
            await delays.stop()
        await self._stop()
        try:
            await member.leave()
        finally:
            if publisher is not None:
                await publisher.close()

    def _fail(self, error: StreamToolsError) -> None:
        if self._member is not None:
            self._member.fail(error)

    def _progressed(self) -> None:
        if self._settler is not None:
            self._settler.progressed()
        self._wake_up()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_kafka_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        check_kafka_reply(queue)


def _not_plain(record: Any, place: TopicPartition) -> None:
    """Always None: a record of the retry topic needs the full decoder."""
