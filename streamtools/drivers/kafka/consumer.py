"""KafkaConsumer: a member of a group, that handles messages of one partition at once and commits what is finished."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from typing import Any, ClassVar, Final, cast

from aiokafka import TopicPartition

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.brokers.bindings import bind
from streamtools.drivers.kafka.brokers.topics import MAX_MESSAGE, Topic, topics_at
from streamtools.drivers.kafka.consuming.delays import DELAY_LEVELS, leaves_at
from streamtools.drivers.kafka.consuming.member import ABANDONED, GroupMember
from streamtools.drivers.kafka.consuming.on_receive import commit_first
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, KafkaDelivery, delivery_of
from streamtools.drivers.kafka.consuming.prefetch import Prefetcher
from streamtools.drivers.kafka.consuming.retries import RetryPublisher
from streamtools.drivers.kafka.consuming.starts import Start
from streamtools.drivers.kafka.consuming.subscription import SubscriptionConfig
from streamtools.drivers.kafka.consuming.topic_changes import TopicChanges
from streamtools.drivers.kafka.errors import client_error
from streamtools.drivers.kafka.features import FEATURES
from streamtools.drivers.kafka.names import check_kafka_name, check_kafka_reply, retry_topic
from streamtools.drivers.kafka.options import ConsumerOptions, subscription
from streamtools.drivers.kafka.records import COPY_ROOM, QUEUE, decode_plain, header_texts, read_record
from streamtools.engine.loop import Ack
from streamtools.engine.messages.failures import error_queue_of
from streamtools.errors import Closed, ConfigurationError, SendError, StreamToolsError
from streamtools.message import Message
from streamtools.settings import KafkaSettings
from streamtools.validation.checks import check_name
from streamtools.verdicts import Verdict, VerdictKind

log: logging.Logger = logging.getLogger("streamtools")

#: Messages that are being moved to wait for their time, at most; no more is taken in until some have.
MOVING: Final = 1000
#: Seconds before a move that Kafka refused is tried again.
MOVE_AGAIN: Final = 1.0
#: Topics of rejected messages keep them until an operator has seen them.
KEEP: Final = {"retention.ms": "-1"}


class KafkaConsumer(Consumer, protocol="kafka"):
    """Receives from Kafka as a member of a group (named as the queue, unless `group=`). Options: `ConsumerOptions`.

    Messages of one partition are handled at once, up to `concurrency`, in the order that `ordered_by` asks for:
    "partition", "key", or none. Only the offset before which all is finished is committed, and what is finished
    behind it travels with the commit, so that a restart repeats only what was not finished.

    A message that waits for its time, or for a retry, waits in the group's own topic `<queue>.retry`.
    """

    features = FEATURES
    settings_class: ClassVar[type[KafkaSettings]] = KafkaSettings
    options_class: ClassVar[type[ConsumerOptions]] = ConsumerOptions
    settings: KafkaSettings
    options: ConsumerOptions
    poll_timeout: ClassVar[float] = 0.5
    _membership: GroupMember | None = None
    _outbox: RetryPublisher | None = None
    _intake: Prefetcher | None = None
    _mover: asyncio.Task[None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_group: str | None = self.group
        self._apply_options()
        self._wake: asyncio.Future[None] | None = None
        self._subscribed = TopicChanges(self.settings)

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
        self._returned: list[KafkaDelivery] = []  # given back, to be handed over again
        self._moves: deque[tuple[AssignedPartition, Any, Message]] = deque()  # not due: to go to the retry topic
        self._moving = 0
        self._move_wake = asyncio.Event()
        self._settled = asyncio.Event()
        retries = await self._declare()
        membership = GroupMember(
            self.settings, self._terms(retries), self._name, changed=self._wake_up, drained=self._drained,
            passed_over=self._pass_over, subscribed=self._subscribed,
        )  # fmt: skip
        self._membership = membership
        self._outbox = RetryPublisher(
            self.settings, self._name, membership, queue=self.queue, retry_topic=self.retry_topic, tiers=self._tiers,
            sender_id=self.client_id,
        )  # fmt: skip
        try:
            await membership.join()
        except BaseException:
            await self._close()
            raise
        self._intake = Prefetcher(membership, self.settings, changed=self._wake_up, failed=self._fail)
        self._mover = asyncio.create_task(self._move_routine(), name="streamtools-moves")

    @property
    def _name(self) -> str:
        return self.client_id or f"streamtools-{self.queue}"

    @property
    def _error_topic(self) -> str:
        return error_queue_of(self.error_queue, self.queue)

    async def _redeclare(self) -> None:
        await self._declare()

    async def _declare(self) -> bool:
        """Declare what is to be; True when there is a topic for retries."""
        options = self.options
        known = self._subscribed.count  # one that was deleted in use comes back as it was
        queues = [
            Topic(name=name, partitions=options.partitions or known(name), replication=options.replication)
            for name in dict.fromkeys((self.queue, *options.topics))
        ]
        named = len(queues)
        copies = {MAX_MESSAGE: str(self.settings.max_message + COPY_ROOM)}
        common: dict[str, Any] = {
            "replication": options.replication, "copies_of": tuple(topic.name for topic in queues),
        }  # fmt: skip
        error = Topic(name=self._error_topic, config=copies | KEEP, **common)
        retry = Topic(name=self.retry_topic, partitions=len(DELAY_LEVELS), config=copies, **common)
        if error.name not in {topic.name for topic in queues}:
            queues.append(error)
        async with topics_at(self.settings, self._name) as topics:
            if self.declare is True:
                self._tiers = (await topics.declare([*queues, retry], True))[retry.name]
            else:
                # Not ours to make; with a retry topic that is missing, a retry is an error that says so.
                await topics.declare(queues if self.declare == "passive" else queues[:named], "passive")
                self._tiers = (await topics.find([retry.name])).get(retry.name, 0)
            if self.bindings:
                await bind(topics.client, self.settings, self.queue, self.bindings, replication=options.replication)
            return self._tiers > 0

    def _terms(self, retries: bool) -> SubscriptionConfig:
        options = self.options
        topics = dict.fromkeys((self.queue, *options.topics, *([self.retry_topic] if retries else [])))
        return SubscriptionConfig(
            group=self.group_id,
            topics=tuple(topics),
            retry_topic=self.retry_topic,
            pattern=subscription(options.pattern, tuple(topics), self._error_topic),
            start=Start(latest=self.offset == "latest", offset=options.start_offset, time=options.start),
            static_id=options.static_id,
            deadline=options.revoke_timeout,
            exactly_once=options.exactly_once,
        )

    @property
    def connected(self) -> bool:
        """A broker is connected, as far as is known; the library goes on by itself when none is."""
        reach = self._membership.reach if self._membership is not None else None
        return self._connected and (reach is None or reach.up)

    # --- receiving --------------------------------------------------------------------------------

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        await asyncio.sleep(0)  # the library's turn: what comes next is fetched while this is handled
        while True:
            membership = self._membership
            if membership is None:
                raise Closed(f"{self!r} was closed while it waited for messages.")
            if membership.failure is not None:
                raise membership.failure
            if self._wake is None or self._wake.done():  # what changes while we take is seen, too
                self._wake = asyncio.get_running_loop().create_future()
            batch = self._take(membership, limit)
            if batch:
                return batch
            await self._arrival(membership, self._wake)

    async def _arrival(self, membership: GroupMember, wake: asyncio.Future[None]) -> None:
        """Wait until something may have changed."""
        due = min((track.shelf[0][0] for track in membership.tracks.values() if track.shelf), default=None)
        timeout = None if due is None else max(0.0, due - time.time())
        await asyncio.wait({wake}, timeout=timeout)

    def _take(self, membership: GroupMember, limit: int) -> list[Delivery]:
        batch: list[Delivery] = []
        if membership.is_doubtful:
            return batch
        now = time.time()
        if self._returned:
            self._take_returned(batch, limit)
        for track in membership.tracks.values():
            if track.shelf and not track.going:
                self._take_due(track, batch, limit, now)
        if self._intake is not None and len(self._moves) < MOVING:
            tracks = self._intake.tracks()
            share = -(-limit // max(1, len(tracks)))
            try:
                for track in tracks:
                    self._take_arrived(membership, track, batch, min(limit, len(batch) + share), now)
            except Exception as error:  # bytes that the library cannot read
                (failure := client_error(error, self.settings)).__cause__ = error
                self._fail(failure)
            self._intake.taken()
        return batch

    def _take_arrived(
        self, membership: GroupMember, track: AssignedPartition, batch: list[Delivery], limit: int, now: float
    ) -> None:
        arrived, offsets, pending, place = track.arrived, track.offsets, track.offsets.pending, track.partition
        decode = _none if track.is_retry else decode_plain
        while arrived and len(batch) < limit:
            for record in arrived[0].records:
                offset = record.offset
                if offset < offsets.next:
                    # The log was cut (an unclean election, a topic made anew): our bookkeeping means other messages.
                    return membership.restart(track, record)
                if not offsets.take(offset):
                    membership.finished()  # by whoever had the partition before
                elif (message := decode(record, place)) is not None:
                    pending[offset] = delivery = KafkaDelivery(message)
                    delivery.track, delivery.offset = track, offset
                    batch.append(delivery)
                else:
                    self._deliver(track, record, batch, now)
                if len(batch) >= limit:
                    return
            arrived.popleft()

    def _take_returned(self, batch: list[Delivery], limit: int) -> None:
        self._returned.sort(key=lambda delivery: (delivery.track.partition, delivery.offset))
        while self._returned and len(batch) < limit:
            old = self._returned.pop(0)
            if not (old.track.gone or old.track.going):
                batch.append(old.track.deliver(old.offset, old.message, old.token, old.decode_error))

    def _take_due(self, track: AssignedPartition, batch: list[Delivery], limit: int, now: float) -> None:
        for record in track.due(now, limit - len(batch)):
            self._deliver(track, record, batch, now)

    def _deliver(self, track: AssignedPartition, record: Any, batch: list[Delivery], now: float) -> None:
        """Hand it over; what is not due goes on the shelf, or is moved to where it waits."""
        queue = None
        if track.is_retry:  # messages of several queues wait there
            queue = header_texts(record.headers, (QUEUE,)).get(QUEUE, self.queue)
        message, trouble = read_record(record, track.partition, queue)
        if message.deliver_at is not None and message.deliver_at > now:
            self._hold_back(track, record, message, now)
            return
        batch.append(track.deliver(record.offset, message, record, trouble))

    def _hold_back(self, track: AssignedPartition, record: Any, message: Message, now: float) -> None:
        due = message.deliver_at or now
        leaves = leaves_at(track.partition.partition, record.timestamp / 1000, due) if track.is_retry else due
        if (track.is_retry and leaves > now) or due - now <= DELAY_LEVELS[1]:
            track.hold(leaves, record)
        else:
            self._moves.append((track, record, message))
            self._move_wake.set()

    def _ordering_key(self, delivery: Delivery) -> Hashable:
        if self.ordered_by == "partition":
            return cast(Hashable, cast(KafkaDelivery, delivery).track.partition)
        return super()._ordering_key(delivery)

    # --- settling ---------------------------------------------------------------------------------

    async def _ack(self, deliveries: Sequence[Delivery]) -> None:
        if self.wrapper is not None or self.options.exactly_once or self.ack == "on_receive":
            return await super()._ack(deliveries)
        number = 0
        for delivery in cast(Sequence[KafkaDelivery], deliveries):
            track = delivery.track
            if not track.gone and track.offsets.finish(delivery.offset, delivery):
                number += 1
        if number and self._membership is not None:
            self._membership.finished(number)
        self._settled.set()

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        if self.options.exactly_once or any(s.outgoing for s in settlements):
            await self._settle_and_send(settlements)
        else:
            self._finish(settlements)
        if self.ack == "on_receive" and self._membership is not None:
            await commit_first(self._membership, {delivery_of(s).track for s in settlements})

    def _finish(self, settlements: Sequence[Settlement]) -> None:
        """Those that send nothing need no one's answer."""
        number, release = 0, VerdictKind.RELEASE
        for settlement in settlements:
            delivery = delivery_of(settlement)
            track = delivery.track
            if settlement.verdict.kind is not release:
                if not track.gone and track.offsets.finish(delivery.offset, delivery):
                    number += 1
            elif track.is_mine(delivery):
                track.offsets.pending[delivery.offset] = None
                self._give_back(delivery)
        if number and self._membership is not None:
            self._membership.finished(number)
        self._settled.set()

    def _give_back(self, delivery: KafkaDelivery) -> None:
        self._returned.append(delivery)
        self._wake_up()

    async def _settle_and_send(self, settlements: Sequence[Settlement]) -> None:
        mine = [s for s in settlements if delivery_of(s).track.is_mine(delivery_of(s))]
        for settlement in mine:
            delivery = delivery_of(settlement)
            delivery.track.offsets.pending[delivery.offset] = None
            delivery.track.settling += 1
        done: list[Settlement] = []
        try:
            if mine:
                await self._perform(mine, done)
        finally:
            self._conclude(mine, done)

    async def _perform(self, mine: list[Settlement], done: list[Settlement]) -> None:
        """Send what is to be sent; `done` has those of which Kafka then holds all."""
        outbox = self._outbox
        if outbox is None:
            raise Closed(f"{self!r} was closed.")
        if self.options.exactly_once:
            await outbox.settle_exactly(mine, done, self._reject)
        else:
            await outbox.settle(mine, done)

    def _reject(self, settlement: Settlement, error: SendError) -> Settlement:
        """What its handler has sent is refused: that is the handler's failure, and no retry helps."""
        delivery = settlement.delivery
        dispatch = self._manual if self._loop is None else self._loop.decider
        return dispatch.settlement(delivery, delivery.message, Verdict.reject(str(error)), error)

    def _conclude(self, mine: list[Settlement], done: list[Settlement]) -> None:
        """What is done is finished; the others are in hand again."""
        finished = {id(s) for s in done}
        number = 0
        for settlement in mine:
            delivery = delivery_of(settlement)
            delivery.track.settling -= 1
            if id(settlement) not in finished:
                delivery.track.offsets.pending[delivery.offset] = delivery
            elif settlement.verdict.kind is VerdictKind.RELEASE:
                self._give_back(delivery)
            else:
                delivery.track.offsets.finish(delivery.offset)
                number += 1
        if number and self._membership is not None:
            self._membership.finished(number, at_once=True)
        self._settled.set()

    # --- moving what is not due -------------------------------------------------------------------

    async def _move_routine(self) -> None:
        """Move what is not due to the retry topic, and finish it where it was."""
        while True:
            await self._move_wake.wait()
            self._move_wake.clear()
            batch = list(self._moves)
            self._moves.clear()
            self._moving = len(batch)
            try:
                await self._move(batch)
            except SendError as error:
                self._keep_unmoved(batch, error)
            except StreamToolsError as error:
                self._fail(error)
            self._moving = 0
            self._settled.set()
            self._wake_up()

    def _keep_unmoved(self, batch: list[tuple[AssignedPartition, Any, Message]], error: SendError) -> None:
        """What Kafka refuses stays where it is, uncommitted, and waits in memory here."""
        log.error("%r: what waits for its time stays in its topic: %s", self, error)
        for track, record, message in batch:
            if message.id in error.refused:
                track.hold(min(message.deliver_at or 0.0, time.time() + MOVE_AGAIN), record)
            elif not self.options.exactly_once:
                track.offsets.finish(record.offset)
                if self._membership is not None:
                    self._membership.finished(at_once=True)
            elif record.offset in track.offsets.pending:  # its transaction was undone: again, without those
                self._moves.append((track, record, message))
                self._move_wake.set()

    async def _move(self, batch: list[tuple[AssignedPartition, Any, Message]]) -> None:
        batch = [(track, record, message) for track, record, message in batch if not track.gone]
        if batch and self._outbox is not None:
            await self._outbox.move(batch)
            if self._membership is not None:
                self._membership.finished(len(batch), at_once=True)

    async def _pass_over(self, tracks: Collection[AssignedPartition]) -> None:
        if self._outbox is not None:
            await self._outbox.pass_over(tracks)

    # --- partitions that go -----------------------------------------------------------------------

    async def _drained(self, tracks: Collection[AssignedPartition]) -> None:
        """Begin nothing more of these partitions; wait for what is at work, until the deadline."""
        for track in tracks:
            track.going = True
            track.arrived.clear()
            track.shelf.clear()
            for delivery in track.in_hand:
                if delivery.task is None or delivery.wake is not None:
                    delivery.withdraw()
        await self._until_idle(tracks, self.options.revoke_timeout)
        late = [d for track in tracks for d in track.in_hand if d.task is not None]
        for delivery in late:
            delivery.abandon()
        if late:
            await self._until_idle(tracks, ABANDONED)
        if self._outbox is not None:
            await self._outbox.release(tracks)

    async def _until_idle(self, tracks: Collection[AssignedPartition], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self._membership is not None and self._at_work(tracks):
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            pass

    def _at_work(self, tracks: Collection[AssignedPartition]) -> bool:
        by_hand = self._loop is None or self.ack == "manual"
        for track in tracks:
            if track.settling:
                return True
            for delivery in track.in_hand:
                if by_hand or delivery.task is not None or delivery.settled:
                    return True
        return self._moving > 0 or bool(self._moves)

    # --- the end ----------------------------------------------------------------------------------

    async def _stop(self) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            await intake.stop()

    async def _close(self) -> None:
        membership, self._membership = self._membership, None
        outbox, self._outbox = self._outbox, None
        mover, self._mover = self._mover, None
        self._wake_up()
        if membership is None:
            return
        self._settled.set()
        if mover is not None:
            mover.cancel()
            await asyncio.wait({mover})
        await self._stop()
        try:
            await membership.leave()
        finally:
            if outbox is not None:
                await outbox.close()

    def _fail(self, error: StreamToolsError) -> None:
        if self._membership is not None:
            self._membership.fail(error)

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


def _none(record: Any, place: TopicPartition) -> None:
    """In the retry topic nothing is plain."""
