"""RabbitMQConsumer: consumes one queue; it receives over one shared connection, and sends over another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar, Final, Unpack

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.connections import receiving
from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel, Raw
from streamtools.drivers.rabbitmq.consuming.subscription import Subscription
from streamtools.drivers.rabbitmq.features import FEATURES
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name, check_rabbitmq_reply
from streamtools.drivers.rabbitmq.options import QueueOptions, RabbitMQConsumerParameters, error_queue, work_queue
from streamtools.drivers.rabbitmq.publishing.batch import Limits
from streamtools.drivers.rabbitmq.publishing.sender import Sender
from streamtools.drivers.rabbitmq.rare.forgotten_consumer import ForgottenConsumer
from streamtools.drivers.rabbitmq.rare.unworded_difference import CarefulLook
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import STREAM, MissingQueue, Queue, missing
from streamtools.engine.tasks.wake_throttle import WakeThrottle
from streamtools.errors import Closed, ConnectError, ConnectionLost, QueueError, SendError
from streamtools.message import Message, id_generator
from streamtools.settings import RabbitMQSettings
from streamtools.verdicts import Copy

log: logging.Logger = logging.getLogger("streamtools")

#: The most seconds that delayed messages wait for each other; the delay chain may be late by the same time again.
GATHER_TIMEOUT: Final = 0.05
#: A header that only deliveries of a stream have.
STREAM_OFFSET: Final = b"\x0fx-stream-offset"


class RabbitMQConsumer(Consumer, protocol="rabbitmq"):
    """Receives from RabbitMQ. Options: `QueueOptions`.

    A quorum queue counts the deliveries of a message, and a high count shows that the message may have killed its
    process. So the consumer begins with one message at a time; see `Isolation`. A classic queue counts nothing: from
    there it takes its whole prefetch at once.
    """

    features = FEATURES
    settings_class: ClassVar[type[RabbitMQSettings]] = RabbitMQSettings
    options_class: ClassVar[type[QueueOptions]] = QueueOptions
    settings: RabbitMQSettings
    options: QueueOptions
    _subscription: Subscription | None = None
    #: Whether the queue existed at the last opening, and the user has not closed the consumer since.
    _was_open = False
    #: Whether we have logged that the queue is gone and that we wait for it.
    _says_gone = False
    #: Whether we have logged that retries wait in this process.
    _says_early = False

    def __init__(self, queue: str, **options: Unpack[RabbitMQConsumerParameters]) -> None:
        super().__init__(queue, **options)
        self._limits = Limits()
        self._new_id = id_generator()
        self._pace = WakeThrottle(GATHER_TIMEOUT)
        self._forgotten = ForgottenConsumer()
        self._look = CarefulLook()

    # --- opening ------------------------------------------------------------------------------------

    async def _open(self) -> None:
        try:
            await self._subscribe()
        except MissingQueue as error:
            makes_it = self.declare is True and error.queue == self.queue  # the queue was deleted while we opened
            if not self._was_open and not makes_it:
                raise
            raise self._gone(error) from error
        self._was_open, self._says_gone = True, False

    def _gone(self, error: MissingQueue) -> ConnectError:
        """Return a temporary error: somebody may create the queue again."""
        if not self._says_gone:
            self._says_gone = True
            log.warning("%r: %s It existed before, so the consumer waits for it.", self, error)
        return ConnectError(str(error))

    async def _subscribe(self) -> None:
        await self._close()
        lease = await receiving(self.settings, self.client_id)
        try:
            queue = await self._declare(Declarations(lease.connection))
            channel = await ConsumerChannel.open(lease.connection, self.queue, self.client_id or "streamtools")
        except BaseException:
            await lease.release()
            raise
        sender = Sender(self.settings, self.client_id, self._limits, declares=self.declare is True)
        self._subscription = Subscription(lease, channel, sender, queue, self)
        await self._subscription.begin(self._forgotten)

    async def _declare(self, declarations: Declarations) -> Queue | None:
        """Declare queue, error queue and bindings; return the real queue, or None if we may not ask for it."""
        if self.declare == "passive" and not await declarations.exists(self.queue):
            raise missing(self.queue, declarations.where)
        await declarations.declare_error_queue(
            error_queue(self.error_queue, self.options), self.options.error_declare_or(self.declare)
        )
        wanted = work_queue(self.queue, self.options, self.error_queue, single_active=self.ordered_by is not None)
        queue: Queue | None = await declarations.declare(wanted, self.declare)
        if self.declare is False or not (queue and queue.arguments):
            queue = await self._look.as_it_is(declarations, wanted, self.declare)
        for binding in self.bindings:
            await declarations.bind(self.queue, binding, self.declare)
        return queue

    async def _redeclare(self) -> None:
        if self._subscription is not None:
            await self._declare(Declarations(self._subscription.channel.connection))

    # --- receiving ----------------------------------------------------------------------------------

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        while True:
            subscription = self._subscription
            if subscription is None:
                raise Closed(f"{self!r} was closed while it waited for messages.")
            channel, isolation = subscription.channel, subscription.isolation
            if not await isolation.arrival(self._is_handled_alone):
                continue
            buffer = channel.buffer
            if isolation.is_narrow and isolation.raises_prefetch(
                self._delivery(subscription, buffer[0]).redeliveries
            ):
                continue
            if not subscription.is_checked:
                subscription.is_checked = True
                self._check_no_stream(buffer[0])
            if isolation.is_narrow or isolation.widens_after:
                isolation.handed_over()
            taken = [self._delivery(subscription, buffer.popleft()) for _ in range(min(limit, len(buffer)))]
            self._keep_pace(channel, taken)
            return taken

    def _is_handled_alone(self) -> bool:
        """Whether a handler is running that needs no other message."""
        return self.concurrency == 1 and self.ack == "after" and self.in_flight > 0

    def _keep_pace(self, channel: ConsumerChannel, taken: Sequence[Delivery]) -> None:
        """If only delayed messages come, and they come one by one, let the next ones gather for a moment."""
        singly = 2 * len(taken) < self.prefetch
        if singly and all(delivery.message.deliver_at is not None for delivery in taken):
            self._pace.woke(len(taken))
            if wait := self._pace.wait():
                channel.rest(wait)
        else:
            self._pace.forget()

    def _check_no_stream(self, raw: Raw) -> None:
        if STREAM_OFFSET in raw[2]:
            raise QueueError(f"The queue {self.queue!r} cannot be consumed: {STREAM}.")

    def _delivery(self, subscription: Subscription, raw: Raw) -> Delivery:
        """Return the delivery of a message; its token is its channel and its tag on that channel."""
        tag, redelivered, data, body, topic = raw
        is_counted = redelivered and subscription.is_counted
        message, count = properties.decode(data, body, self.queue, self._new_id, topic=topic, redelivered=is_counted)
        if redelivered and count < 1:
            subscription.is_counted = False  # a quorum queue would have added a count to a redelivery
            count = 1
        return Delivery(message, (subscription.channel, tag), count)

    # --- settling -----------------------------------------------------------------------------------

    def _holds(self, delivery: Delivery) -> bool:
        (channel, tag), live = delivery.token, self._live_channel()
        return live is not None and channel is live and not live.is_settled(tag)

    async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
        subscription, (channel, _) = self._subscription, settlements[0].delivery.token
        if subscription is None or channel is not self._live_channel():  # the channel ended before we could send
            raise self._lost(len(settlements))
        try:
            await subscription.sender.publish(messages)
        except SendError as error:
            if error.early:
                self._note_early(error, settlements)
            raise
        except ConnectError as error:
            # The connection that receives still works, so the engine sends these messages again.
            raise SendError(str(error), unknown=[message.id for message in messages], messages=messages) from error

    async def _acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        tags, stale = self._tags(deliveries)
        if self._subscription is not None and tags:
            await self._subscription.settle(tags, ())
        if stale:
            raise self._lost(stale)

    async def _release(self, deliveries: Sequence[Delivery]) -> None:
        tags, _ = self._tags(deliveries)  # deliveries of an ended connection have gone back already
        if self._subscription is not None and tags:
            await self._subscription.settle((), tags)

    def _tags(self, deliveries: Sequence[Delivery]) -> tuple[list[int], int]:
        """Return the tags of the deliveries that can be settled, and the number of those of an ended connection."""
        live, tags, stale = self._live_channel(), list[int](), 0
        for delivery in deliveries:
            channel, tag = delivery.token
            if channel.is_settled(tag):
                continue
            if channel is live:
                tags.append(tag)
            else:
                stale += 1
        return tags, stale

    def _live_channel(self) -> ConsumerChannel | None:
        """Return the channel that receives; None if it has ended."""
        channel = self._subscription.channel if self._subscription is not None else None
        return channel if channel is not None and channel.error is None else None

    def _lost(self, number: int) -> ConnectionLost:
        return ConnectionLost(
            f"{number} deliver{'y' if number == 1 else 'ies'} of {self.queue!r} came over a connection that has "
            "ended; the broker delivers them again."
        )

    def _note_early(self, refused: SendError, settlements: Sequence[Settlement]) -> None:
        """Log once that retries wait in this process, because no queue of the broker can hold them until then."""
        copies = [m for s in settlements if s.verdict.kind.copy is Copy.RETRY for m in s.outgoing]
        if not self._says_early and refused.among(copies, refused.early):
            self._says_early = True
            log.warning(
                "%r: a message waits in this process for its retry, and others may have to wait with it: %s",
                self, refused,
            )  # fmt: skip

    # --- the end ------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        if self._subscription is not None:
            await self._subscription.stop()

    async def _close(self) -> None:
        self._was_open = self._was_open and not self._closed
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close(deletes=self._closed and self.options.exclusive)

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_rabbitmq_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        check_rabbitmq_reply(queue)
