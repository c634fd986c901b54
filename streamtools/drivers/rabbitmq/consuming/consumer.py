"""RabbitMQConsumer: receives one queue over the connection that receives, sends on over the one that sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.amqp.connection import CLOSE_TIMEOUT
from streamtools.drivers.rabbitmq.connections import Place, Receiving, Sending, receiving, sending
from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel, Raw
from streamtools.drivers.rabbitmq.features import FEATURES
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name, check_rabbitmq_reply
from streamtools.drivers.rabbitmq.publishing.batch import Limits
from streamtools.drivers.rabbitmq.publishing.copies import send_before_settling, unsent
from streamtools.drivers.rabbitmq.publishing.publisher import Publisher
from streamtools.drivers.rabbitmq.topology.declarations import (
    STREAM,
    Declarations,
    MissingQueue,
    Queue,
    QueueOptions,
    error_queue,
    missing,
    sees_to_order,
    work_queue,
)
from streamtools.drivers.rabbitmq.topology.order_lock import OrderLock
from streamtools.engine.loop import SUSPECT
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.engine.tasks.wake_throttle import WakeThrottle
from streamtools.errors import Closed, ConnectError, ConnectionLost, QueueError, SendError, StreamToolsError
from streamtools.message import id_generator
from streamtools.settings import RabbitMQSettings
from streamtools.verdicts import Copy

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds that deferred messages gather for, at most; the chain that held them makes them late by as much again.
GATHER_TIMEOUT: Final = 0.05
#: Seconds for which nothing comes beside a suspect that is not settled, though more is asked for.
ALONE_TIMEOUT: Final = 5.0
#: Seconds between two looks at a queue from which nothing comes.
SILENCE_POLL_INTERVAL: Final = 30.0
#: Looks at a queue that may end in the end of the connection.
FAILED_LOOKS: Final = 2
#: A header that deliveries of a stream have, and no others.
STREAM_OFFSET: Final = b"\x0fx-stream-offset"
#: What settles a delivery: the channel that it came on, and its tag there.
Token = tuple[ConsumerChannel, int]


class RabbitMQConsumer(Consumer, protocol="rabbitmq"):
    """Receives from RabbitMQ. Options: `QueueOptions`.

    A message's count is a suspicion only: it rises for all that a consumer held when it died. So a
    consumer begins with one message at a time, and takes its whole prefetch once it meets one that
    is above suspicion; then the innocents around a message that ends the process do not share its count.
    A classic queue counts nothing, so there it takes its whole prefetch at once.
    """

    features = FEATURES
    settings_class: ClassVar[type[RabbitMQSettings]] = RabbitMQSettings
    options_class: ClassVar[type[QueueOptions]] = QueueOptions
    settings: RabbitMQSettings
    options: QueueOptions
    _place: Place[Receiving] | None = None
    _channel: ConsumerChannel | None = None
    _out_place: Place[Sending] | None = None
    _publisher: Publisher | None = None
    #: As it is; None where we may not look.
    _queue: Queue | None = None
    _lock: OrderLock | None = None
    _turning: asyncio.Task[None] | None = None
    _widening: asyncio.Task[None] | None = None
    _watching: asyncio.Task[None] | None = None
    #: A channel was given up because nothing came from it, and nothing has come since.
    _in_vain = False
    #: The first delivery of the channel was looked at.
    _looked = False
    #: It was open since the user opened it, so its queue was there.
    _was_open = False
    #: The log says that the queue is gone, and that it is waited for.
    _says_gone = False
    #: Connections that ended while the queue was looked at.
    _vain_looks = 0
    #: The log says that retries wait here.
    _says_early = False
    #: Nothing is taken in any more, by a stop or a cancellation; the channel is about to be closed.
    _ending = False
    #: The queue counts deliveries, as far as is known; else a count in a header was copied along by somebody.
    _is_counted = True
    #: Until then what was handed over last has nothing beside it, on the loop's clock.
    _alone_until = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = Limits()
        self._new_id = id_generator()
        self._pace = WakeThrottle(GATHER_TIMEOUT)
        self._publisher_lock = asyncio.Lock()
        #: While we are ending: nothing is under way to us any more.
        self._calm = asyncio.Event()

    # --- opening ------------------------------------------------------------------------------------

    async def _open(self) -> None:
        try:
            await self._open_anew()
        except MissingQueue as error:
            makes_it = self.declare is True and error.queue == self.queue  # it was deleted while we opened
            if not self._was_open and not makes_it:
                raise
            raise self._gone(error) from error
        self._was_open, self._says_gone = True, False

    def _gone(self, error: MissingQueue) -> ConnectError:
        """What passes once somebody makes the queue again."""
        if not self._says_gone:
            self._says_gone = True
            log.warning("%r: %s It was there before, so it is waited for.", self, error)
        return ConnectError(str(error))

    async def _open_anew(self) -> None:
        await self._close()
        self._place = place = await receiving(self.settings, self.client_id)
        try:
            alone = await self._declare(Declarations(place.connection))
            self._channel = await ConsumerChannel.open(place.connection, self.queue, self.client_id or "streamtools")
            self._narrow = self._is_counted and self.prefetch > 1
            self._widen_after = self._ending = self._looked = False
            self._calm.clear()
            if self.ordered_by is None or alone:
                await self._channel.consume(1 if self._narrow else self.prefetch)
                self._watching = self._beside(self._watch_silence, self._channel)
            else:
                self._lock = OrderLock(place.connection, self.queue)
                self._turning = self._beside(self._take_turn, self._channel, self._lock)
        except BaseException:
            await self._close()
            raise

    async def _declare(self, declarations: Declarations) -> bool:
        """Declare what is to be; True when one consumer at a time receives without our doing."""
        name = self.error_queue.replace("{queue}", self.queue)
        declare = self.declare if self.options.error_declare is None else self.options.error_declare
        is_new = self.declare is not False and not await declarations.exists(self.queue)
        if is_new and self.declare == "passive":
            raise missing(self.queue, declarations.where)
        await declarations.declare_error_queue(error_queue(name, self.options), declare)
        ordered = self.ordered_by is not None
        wanted = work_queue(self.queue, self.options, name, single_active=ordered)
        queue = await declarations.declare(wanted, self.declare)
        is_known = bool(queue.arguments) and self.declare is not False
        self._queue = queue if is_known else await self._look_at(declarations, wanted)
        self._is_counted = self._queue is None or not self._queue.is_classic
        for binding in self.bindings:
            await declarations.bind(self.queue, binding, self.declare)
        return ordered and sees_to_order(self.queue, self._queue, self.declare)

    async def _look_at(self, declarations: Declarations, wanted: Queue) -> Queue | None:
        """The queue as it is; None where we may not look, or where it has ended the connection each time.

        RabbitMQ 4 fails to word what differs where that is longer than 255 bytes and not of ASCII alone.
        """
        if self._vain_looks >= FAILED_LOOKS:
            return None
        try:
            return await declarations.as_it_is(wanted, self.declare)
        except ConnectionLost:
            self._vain_looks += 1
            raise

    async def _redeclare(self) -> None:
        if self._place is not None:
            await self._declare(Declarations(self._place.connection))

    # --- receiving ----------------------------------------------------------------------------------

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        while True:
            if self._widening is not None:
                await asyncio.wait({self._widening})
                self._widening = None
            channel = self._channel
            if channel is None:
                raise Closed(f"{self!r} was closed while it waited for messages.")
            if not await self._arrival(channel) or (self._narrow and self._begins_to_widen(channel)):
                continue
            if not self._looked:
                self._looked = True
                self._check_no_stream(channel.buffer[0])
            self._alone_until = asyncio.get_running_loop().time() + ALONE_TIMEOUT
            buffer = channel.buffer
            taken = [self._delivery(channel, buffer.popleft()) for _ in range(min(limit, len(buffer)))]
            self._keep_pace(channel, taken)
            return taken

    async def _arrival(self, channel: ConsumerChannel) -> bool:
        """Wait for a delivery; False: more is taken from now on, for one who holds what came alone and asks on.

        So do a handler that gathers several before it settles them, and a loop that holds a message back whose
        copy the broker refuses: with one message at a time they would wait for ever.
        """
        is_narrow = self._narrow or self._widen_after
        if not is_narrow or self.ordered_by is not None or channel.buffer or not channel.in_hand:
            await channel.arrival()
            return True
        try:
            async with asyncio.timeout_at(self._alone_until):
                await channel.arrival()
        except TimeoutError:
            if self._is_handled_alone:
                self._alone_until += ALONE_TIMEOUT
                return False
            self._narrow = self._widen_after = False
            self._widening = self._beside(self._widen, channel)
            return False
        return True

    @property
    def _is_handled_alone(self) -> bool:
        """The handler at work needs no other message beside its own, and no other process may begin one."""
        alone = self.concurrency == 1 and self.ack == "after" and self.in_flight > 0
        return alone and self._may_be_single_active

    @property
    def _may_be_single_active(self) -> bool:
        return self._queue is None or self._queue.is_single_active

    def _keep_pace(self, channel: ConsumerChannel, taken: Sequence[Delivery]) -> None:
        """Let deferred messages gather where they come one by one, and nothing else with them."""
        singly = 2 * len(taken) < self.prefetch
        if singly and all(delivery.message.deliver_at is not None for delivery in taken):
            self._pace.woke(len(taken))
            if wait := self._pace.wait():
                channel.rest(wait)
        else:
            self._pace.forget()

    def _begins_to_widen(self, channel: ConsumerChannel) -> bool:
        """Take the whole prefetch from now on, if a message above suspicion has come.

        It is handed over only then: were it settled before, the broker would deliver the next to the
        consumer that is about to be cancelled, and may take it back behind later ones (seen on 3.10).
        """
        if self._delivery(channel, channel.buffer[0]).redeliveries >= SUSPECT:
            return False
        self._narrow = False
        if self.ordered_by is not None or self._may_be_single_active:
            # Another process may become the active one while nobody consumes here: this message is
            # handled first, alone, and the rest is taken once it is done.
            self._widen_after = True
            return False
        self._widening = self._beside(self._widen, channel)
        return True

    def _check_no_stream(self, raw: Raw) -> None:
        if STREAM_OFFSET in raw[2]:
            raise QueueError(f"The queue {self.queue!r} cannot be consumed: {STREAM}.")

    def _delivery(self, channel: ConsumerChannel, raw: Raw) -> Delivery:
        tag, redelivered, data, body, topic = raw
        is_counted = redelivered and self._is_counted
        message, count = properties.decode(data, body, self.queue, self._new_id, topic=topic, redelivered=is_counted)
        if redelivered and count < 1:
            self._is_counted = False  # a quorum queue writes a count on whatever it delivers again
            count = 1
        return Delivery(message, (channel, tag), count)

    async def _widen(self, channel: ConsumerChannel, acks: Sequence[int] = ()) -> None:
        await channel.widen(self.prefetch)
        channel.settle(acks)

    async def _take_turn(self, channel: ConsumerChannel, lock: OrderLock) -> None:
        await lock.acquire()
        await channel.consume(1 if self._narrow else self.prefetch)
        await self._watch_silence(channel)

    async def _watch_silence(self, channel: ConsumerChannel) -> None:
        """Give the channel up when messages wait in the queue, nothing is in hand, and none comes.

        RabbitMQ can forget a consumer, or acknowledgements that would make room for more, when a queue changes its
        leader (github.com/rabbitmq/rabbitmq-server/pull/13095). Not again before something has come: another
        consumer may be the only one that the queue delivers to.
        """
        waited_at = -1
        while True:
            await asyncio.sleep(SILENCE_POLL_INTERVAL)
            if self._in_vain and not channel.arrived:
                continue
            try:
                waits = self._is_idle(channel) and (await Declarations(channel.connection).count(self.queue))[0] > 0
            except MissingQueue:  # the broker does not tell each consumer that waits for its turn
                channel.fail("its queue was deleted")
                return
            except QueueError:
                return
            if waits and self._is_idle(channel) and waited_at == channel.arrived:
                self._in_vain = True
                channel.fail("messages wait in the queue, and it delivers none")
                return
            waited_at = channel.arrived if waits else -1

    def _is_idle(self, channel: ConsumerChannel) -> bool:
        return not (channel.in_hand or channel.receiving or self._ending or self._stopping.is_set())

    def _beside(
        self, work: Callable[..., Awaitable[None]], channel: ConsumerChannel, *arguments: Any
    ) -> asyncio.Task[None]:
        """Run this beside `_receive`, which may be cancelled at any time; a failure shows there."""
        return asyncio.create_task(self._guarded(work, channel, *arguments))

    async def _guarded(self, work: Callable[..., Awaitable[None]], channel: ConsumerChannel, *arguments: Any) -> None:
        try:
            await work(channel, *arguments)
        except StreamToolsError as error:
            channel.end(error)

    # --- settling -----------------------------------------------------------------------------------

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        mine, stale = self._sort(settlements)
        refused: SendError | None = None
        if any(s.outgoing for s in mine):
            mine, refused = await self._publish(mine)
        if mine:
            await self._acknowledge(mine)
        if stale:
            raise ConnectionLost(
                f"{stale} deliver{'y' if stale == 1 else 'ies'} of {self.queue!r} came over a connection that has "
                "ended; the broker delivers them again."
            )
        if refused is not None:
            if refused.early:
                self._note_early(refused, settlements)
            raise refused

    def _note_early(self, refused: SendError, settlements: Sequence[Settlement]) -> None:
        """Say once that retries wait here, where no queue of the broker's can hold them until they are due."""
        copies = [m for s in settlements if s.verdict.kind.copy is Copy.RETRY for m in s.outgoing]
        if not self._says_early and refused.among(copies, refused.early):
            self._says_early = True
            log.warning(
                "%r: a message that is to be retried after a delay waits for that in this process, beside others: %s",
                self, refused,
            )  # fmt: skip

    async def _publish(self, settlements: Sequence[Settlement]) -> tuple[list[Settlement], SendError | None]:
        """Those of which the broker holds all that was to be sent, and what is said of the others.

        Trouble of the connection that sends is no trouble of this one: what could not be sent is tried again.
        """
        try:
            publisher = await self._get_publisher()
        except ConnectError as error:
            outgoing = [m for s in settlements for m in s.outgoing]
            return unsent(settlements, outgoing, error)
        return await send_before_settling(publisher, settlements)

    def _sort(self, settlements: Sequence[Settlement]) -> tuple[list[Settlement], int]:
        """Those that are to be settled here and now, and how many of another connection are left."""
        mine: list[Settlement] = []
        stale = 0
        channel = self._channel
        for settlement in settlements:
            came_on, tag = settlement.delivery.token
            if came_on.is_settled(tag):
                continue
            if channel is not None and came_on is channel and channel.error is None:
                mine.append(settlement)
            elif not settlement.verdict.kind.gives_back:  # given back with its connection
                stale += 1
        return mine, stale

    async def _acknowledge(self, settlements: Sequence[Settlement]) -> None:
        channel = settlements[0].delivery.token[0]
        if self._ending:
            await self._calm.wait()
        channel.check()  # it may have ended while the copies were confirmed
        acks = [s.delivery.token[1] for s in settlements if not s.verdict.kind.gives_back]
        # While stopping, what goes back stays with us until the channel is closed; see `_stop`.
        held = self._ending or self._stopping.is_set()
        releases = [s.delivery.token[1] for s in settlements if s.verdict.kind.gives_back and not held]
        if self._widen_after and acks and not releases and not held:
            self._widen_after = False
            self._widening = self._beside(self._widen, channel, acks)
            await asyncio.wait({self._widening})
            channel.check()
        else:
            channel.settle(acks, releases)
        await channel.connection.drain()

    async def _get_publisher(self) -> Publisher:
        """What publishes, on the connection that sends: a broker that blocks it still takes acknowledgements."""
        async with self._publisher_lock:
            if self._publisher is not None and self._publisher.error is None:
                return self._publisher
            place, self._out_place, self._publisher = self._out_place, None, None
            if place is not None:
                await place.release()
            home = self._place
            place = await sending(self.settings, self.client_id)
            if home is None or self._place is not home:
                await place.release()
                raise ConnectionLost(f"{self!r} was closed meanwhile.")
            self._out_place = place
            self._publisher = Publisher(place.shared, self._limits, declares=self.declare is True)
            return self._publisher

    # --- the end ------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        channel = self._channel
        if channel is None or channel.error is not None:
            return
        self._ending = True
        stopping = self._take_no_more(channel)
        try:
            if asked_to_stop():  # the program ends: it does not wait long for a broker that has fallen silent
                await _by(asyncio.get_running_loop().time() + CLOSE_TIMEOUT, stopping)
            else:
                await stopping
        finally:
            self._calm.set()

    async def _take_no_more(self, channel: ConsumerChannel) -> None:
        wide = 1 if self._narrow or self._widen_after else self.prefetch
        self._narrow = False
        if self._turning is not None:
            await _ended(self._turning, 0)
        if self._widening is not None:
            await _ended(self._widening, STOP_TIMEOUT)
        # What has arrived and what the loop gives back stays with us until the channel is closed: then
        # it goes to the front of the queue, in order. Given back now it would go to its end.
        if self.ordered_by is None and not (self._queue is not None and self._queue.is_single_active):
            await self._settle_down(channel, wide)
            await channel.cancel()
        # Else another process would become the active one, and overtake what we still hold. The broker
        # delivers on, up to the prefetch, and nobody takes it.

    async def _settle_down(self, channel: ConsumerChannel, wide: int) -> None:
        """Wait until nothing is under way to us: what meets a cancel goes to the queue's end (seen on 3.10).

        Nothing is once we have as much in hand as we asked for, and acknowledge nothing, or once the queue is empty.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_TIMEOUT
        with suppress(QueueError):  # it was deleted
            while channel.in_hand < wide and channel.error is None and loop.time() < deadline:
                ready, _ = await Declarations(channel.connection).count(self.queue)
                if not ready:
                    break
                await asyncio.sleep(DRAIN_POLL_INTERVAL)

    async def _close(self) -> None:
        self._calm.set()
        self._was_open = self._was_open and not self._closed
        beside = [task for task in (self._turning, self._widening, self._watching) if task is not None]
        self._turning = self._widening = self._watching = None
        place, self._place = self._place, None
        out_place, self._out_place = self._out_place, None
        channel, self._channel = self._channel, None
        publisher, self._publisher = self._publisher, None
        lock, self._lock = self._lock, None
        if publisher is not None:
            publisher.close()
        deadline = asyncio.get_running_loop().time() + CLOSE_TIMEOUT
        try:
            await _by(deadline, self._let_go(channel, beside))
            if lock is not None:
                await _by(deadline, lock.release())  # now: the next must find what we held
            if place is not None and self._closed and self.options.exclusive:
                await _by(deadline, Declarations(place.connection).delete_unused(self.queue))
        finally:
            await asyncio.gather(*(one.release() for one in (place, out_place) if one is not None))

    async def _let_go(self, channel: ConsumerChannel | None, beside: Sequence[asyncio.Task[None]]) -> None:
        """Close the channel, whoever cancels us meanwhile; others go on using its connection."""
        closing: set[asyncio.Task[None]] = set()
        try:
            if channel is not None:
                await self._last_acknowledgements(channel)
        finally:
            for task in beside:
                task.cancel()
            if channel is not None:
                closing = {channel.discard()}
        if beside:
            await asyncio.wait(beside)
        if closing and channel is not None and channel.connection.lost is None:
            await asyncio.wait(closing)

    async def _last_acknowledgements(self, channel: ConsumerChannel) -> None:
        # The channel of a quorum queue has 32 acknowledgements under way at a time, and forgets the
        # others when it is closed right behind them (seen on 3.10); a cancel waits for the queue.
        # A classic queue with a single active consumer crashes at the next message once that one is cancelled
        # while it has its whole prefetch in hand and another waits (seen on 3.10); it forgets nothing.
        if self.ordered_by is None and not (self._queue is not None and self._queue.is_classic):
            with suppress(StreamToolsError):  # what is lost with the connection comes again
                await channel.cancel()

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_rabbitmq_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        check_rabbitmq_reply(queue)


#: Seconds for what is under way to a consumer that stops; other consumers may take what it waits for.
DRAIN_TIMEOUT: Final = 1.0
#: Seconds between two looks at it.
DRAIN_POLL_INTERVAL: Final = 0.005
#: Seconds for a change of prefetch that is under way when the consumer stops.
STOP_TIMEOUT: Final = 5.0


async def _by(deadline: float, work: Coroutine[Any, Any, None]) -> None:
    """Await this until then, on the loop's clock: what a silent broker does not answer ends with the connection."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await work


async def _ended(task: asyncio.Task[None], timeout: float) -> None:
    """Wait for a task, then cancel it."""
    if timeout:
        await asyncio.wait({task}, timeout=timeout)
    task.cancel()
    await asyncio.wait({task})
