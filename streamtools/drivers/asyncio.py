"""`asyncio://`: queues within this process. The first file for a driver author to read.

A message sent is appended to its queue's `ready`, or to the heap of `later` until it is due; a
consumer takes it from there, holds it until it is settled, and puts it back in its place if it is
released. That is all a protocol needs to do: retries, the error queue and the worker pool stand
above it.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from threading import RLock
from typing import Any, ClassVar, NamedTuple

from streamtools.admin import QueueAdmin
from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.driver import Options, Reader
from streamtools.engine.tasks.wake_throttle import WakeThrottle
from streamtools.errors import Closed, ConnectionLost, QueueError, SendError
from streamtools.exchange import Binding, Exchange, another_type, no_subscriber
from streamtools.features import Features
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.queues import QueueInfo
from streamtools.settings import AsyncIOSettings
from streamtools.validation.checks import Declare
from streamtools.verdicts import Copy

FEATURES = Features(groups=True, redelivery=True, atomic=True, topics=True, cancel=True, tombstones=True)


class Item(NamedTuple):
    """A message in a queue.

    Attributes:
        place: where it stands among the others; kept while it is in hand.
        origin: the queue that it failed in, for its way back from an error queue.
    """

    place: int
    message: Message
    origin: Queue | None


class Queue:
    """One group's queue: messages that are ready, messages that are due later, and those in hand.

    Parameters:
        lock: the broker's: several threads may run event loops that use it.
    """

    def __init__(self, name: str, maxsize: int, lock: RLock) -> None:
        self.name = name
        self.maxsize = maxsize
        self.lock = lock
        self.ready: deque[Item] = deque()
        self.later: list[tuple[float, Item]] = []
        self.in_hand: int = 0
        self.deleted: bool = False
        self._places = count()
        #: What wakes who waits when the first of `later` is due, in each event loop in which someone waits.
        self._timers: dict[asyncio.AbstractEventLoop, asyncio.TimerHandle] = {}
        self._pace = WakeThrottle()
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """Messages that wait, due or not."""
        return len(self.ready) + len(self.later)

    async def room(self) -> None:
        """Wait until there may be room."""
        with self.lock:
            if self.size < self.maxsize:
                return
            waiter = _stand_in(self._putters)
        await _wait(waiter, self._putters)

    def pass_on(self) -> None:
        """Room that someone has waited for and does not need is another's."""
        if self.size < self.maxsize:
            _wake(self._putters)

    def put(self, message: Message, origin: Queue | None = None) -> None:
        """Add a message, full or not: copies must not wait for the consumer that makes them.

        Whoever calls it has the lock.
        """
        item = Item(next(self._places), message, origin)
        if message.deliver_at is not None and message.deliver_at > time.time():
            heapq.heappush(self.later, (message.deliver_at, item))
            if self.later[0][1] is item:
                self._schedule_where_someone_waits()
        else:
            self.ready.append(item)
            _wake(self._getters)

    def put_back(self, items: Iterable[Item]) -> None:
        """Return items that were taken to their places."""
        with self.lock:
            items = sorted(items)
            self.in_hand -= len(items)
            if items and self.ready and self.ready[0] < items[-1]:
                self.ready = deque(sorted([*items, *self.ready]))
            else:
                self.ready.extendleft(reversed(items))
            if self.ready:
                _wake(self._getters)

    async def arrival(self) -> None:
        """Wait until a message may be ready, or until `interrupt()`."""
        with self.lock:
            if self.ready or self.deleted:
                return
            waiter = _stand_in(self._getters)
            if self.later:
                self._schedule()
        await _wait(waiter, self._getters)

    def interrupt(self) -> None:
        """Wake everyone who waits for an arrival."""
        with self.lock:
            _wake_all(self._getters)

    def take(self, limit: int) -> list[Item]:
        """Take up to `limit` messages that are ready."""
        with self.lock:
            taken = [self.ready.popleft() for _ in range(min(limit, len(self.ready)))]
            self.in_hand += len(taken)
            if self.ready:
                _wake(self._getters)
            for _ in range(min(len(taken), len(self._putters))):
                _wake(self._putters)
            return taken

    def cancel(self, id: str) -> bool:  # noqa: A002 - the field's name
        """Forget a message that is not due yet; False when there is none of this id."""
        with self.lock:
            kept = [entry for entry in self.later if entry[1].message.id != id]
            found = len(kept) < len(self.later)
            self.later[:] = kept
            heapq.heapify(self.later)
            return found

    def purge(self) -> int:
        """Forget all messages that wait; the number of them."""
        with self.lock:
            number = self.size
            self.ready.clear()
            self.later.clear()
            _wake_all(self._putters)
            return number

    def ripen(self) -> int:
        """Make ready what is due; the number."""
        with self.lock:
            now, before = time.time(), len(self.ready)
            while self.later and self.later[0][0] <= now:
                _, item = heapq.heappop(self.later)
                self.ready.append(item._replace(place=next(self._places)))
                _wake(self._getters)
            return len(self.ready) - before

    # --- what comes due -------------------------------------------------------------------------

    def _schedule_where_someone_waits(self) -> None:
        loops = {waiter.get_loop() for waiter in self._getters}
        for loop in loops:
            _call_in(loop, self._schedule)
        if not loops:  # as a rule who waits next asks; a loop that is busy handling is told of it here
            self._schedule()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        with self.lock:
            if (timer := self._timers.pop(loop, None)) is not None:
                timer.cancel()
            if self.later:
                for other in [other for other in self._timers if other.is_closed()]:
                    del self._timers[other]
                delay = max(self.later[0][0] - time.time(), self._pace.wait())
                self._timers[loop] = loop.call_later(delay, self._due, loop)

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:
            self._timers.pop(loop, None)
            if number := self.ripen():
                self._pace.woke(number)
            self._schedule()


def _first_full(routes: Iterable[tuple[Message, Queue]]) -> Queue | None:
    for _, queue in routes:
        if queue.size >= queue.maxsize:
            return queue
    return None


Line = deque["asyncio.Future[None]"]


def _stand_in(line: Line) -> asyncio.Future[None]:
    """Wait in line from now on."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    line.append(waiter)
    return waiter


async def _wait(waiter: asyncio.Future[None], line: Line) -> None:
    try:
        await waiter
    except asyncio.CancelledError:
        if waiter.done() and not waiter.cancelled():
            _wake(line)  # it was meant for us; pass it on
        raise


def _wake(line: Line) -> None:
    """Wake the first who waits, in whichever event loop that is; passes over those whose loop has ended."""
    while line:
        running = asyncio.get_running_loop()
        try:
            waiter = line.popleft()
        except IndexError:  # another thread was faster
            return
        loop = waiter.get_loop()
        if loop is running and not waiter.done():
            waiter.set_result(None)
            return
        if loop is not running and _call_in(loop, _wake_there, waiter, line):
            return


def _wake_there(waiter: asyncio.Future[None], line: Line) -> None:
    if waiter.done():
        _wake(line)
    else:
        waiter.set_result(None)


def _wake_all(line: Line) -> None:
    for _ in range(len(line)):
        _wake(line)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Call a function in an event loop; False when that has ended."""
    if loop is asyncio.get_running_loop():
        function(*arguments)
        return True
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


class Topic:
    """What is sent to one name: a queue for each group that has ever consumed it.

    Until a group has, messages wait in the queue of the group None, and the first group takes
    that queue over; from then on each group has every message.
    """

    def __init__(self, name: str, maxsize: int, lock: RLock) -> None:
        self.name = name
        self.maxsize = maxsize
        self.lock = lock
        self.groups: dict[str | None, Queue] = {None: Queue(name, maxsize, lock)}
        self._claimed = False

    def join(self, group: str | None, *, latest: bool) -> Queue:
        """The queue of a group, which is made if it is new."""
        with self.lock:
            if not self._claimed:
                self._claimed = True
                self.groups[group] = self.groups.pop(None)
                if latest and group is not None:
                    self.groups[group].purge()
            return self.groups.setdefault(group, Queue(self.name, self.maxsize, self.lock))

    def delete(self) -> None:
        """Forget everything; whoever waits finds out."""
        for queue in self.groups.values():
            queue.deleted = True
            queue.purge()
            queue.interrupt()


class Broker:
    """The topics of one name within one process; its event loops share them, one after the other or in threads."""

    #: By process, for a forked child has none of its parent's messages, and by name.
    _all: ClassVar[dict[tuple[int, str], Broker]] = {}

    def __init__(self, maxsize: int) -> None:
        self.lock: RLock = RLock()
        self.topics: dict[str, Topic] = {}
        #: Exchange name -> its bindings with their queues, in the order made.
        self.bindings: dict[str, dict[tuple[Binding, str], None]] = {}
        self._maxsize = maxsize

    @classmethod
    def of(cls, settings: AsyncIOSettings) -> Broker:
        """The broker of this name in this process."""
        return cls._all.setdefault((os.getpid(), settings.name), cls(settings.maxsize))

    def declare(self, name: str, declare: Declare) -> None:
        """Make a topic, or check that it is there.

        Raises:
            QueueError: it is missing, and is not to be made.
        """
        if declare is True:
            self.topics.setdefault(name, Topic(name, self._maxsize, self.lock))
        elif declare == "passive":
            self.topic(name)

    def delete(self, name: str) -> None:
        """Forget a topic and its bindings.

        Raises:
            QueueError: there is none.
        """
        with self.lock:
            self.topic(name).delete()
            del self.topics[name]
            for bindings in self.bindings.values():
                for found in [key for key in bindings if key[1] == name]:
                    del bindings[found]

    def bind(self, queue: str, binding: Binding) -> None:
        """Give a queue the messages of a topic; safe to repeat.

        Raises:
            QueueError: the queue is missing, or the exchange is of another type.
        """
        with self.lock:
            self.topic(queue)
            self._check_type(binding.exchange)
            self.bindings.setdefault(binding.exchange.name, {})[binding, queue] = None

    def unbind(self, queue: str, binding: Binding) -> None:
        """Take it away again; safe to repeat."""
        with self.lock:
            self.bindings.get(binding.exchange.name, {}).pop((binding, queue), None)

    async def put(self, message: Message) -> None:
        """Give a message to all queues that it goes to at once; waits while one of them is full.

        Raises:
            QueueError: as for `route`.
        """
        full: Queue | None = None
        while True:
            with self.lock:
                routes = self.route(message)
                waited, full = full, _first_full(routes)
                if full is None:
                    for copy, queue in routes:
                        queue.put(copy)
                    return
                if waited is not None and waited is not full:
                    waited.pass_on()
            await full.room()

    def route(self, message: Message) -> list[tuple[Message, Queue]]:
        """Where a message goes, as each queue is to have it.

        Raises:
            QueueError: there is no such queue, none bound to its topic, or the exchange is of another type.
        """
        if message.exchange is None:
            if message.queue not in self.topics and not message.mandatory:
                return []
            return [(message, queue) for queue in self.topic(message.queue).groups.values()]
        self._check_type(message.exchange)
        names = {
            queue: None
            for binding, queue in self.bindings.get(message.exchange.name, {})
            if binding.exchange.matches(binding.topic, message.queue)
        }
        if not names and message.mandatory:
            raise no_subscriber(message.queue, message.exchange)
        return [
            (message.replace(queue=name, exchange=None), queue)
            for name in names
            for queue in self.topics[name].groups.values()
        ]

    def _check_type(self, exchange: Exchange) -> None:
        for other, _ in self.bindings.get(exchange.name, ()):
            if other.exchange.type != exchange.type:
                raise another_type(exchange, other.exchange.type)
            return

    def topic(self, name: str) -> Topic:
        """The topic of this name.

        Raises:
            QueueError: there is none.
        """
        try:
            return self.topics[name]
        except KeyError:
            raise QueueError(
                f"There is no queue {name!r} in this process. Open a consumer of it first, or a producer with "
                "declare=True."
            ) from None


class AsyncIOProducer(Producer, protocol="asyncio"):
    """Sends within this process; waits while the queue is full."""

    features = FEATURES
    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings
    _broker: Broker

    async def _open(self) -> None:
        self._broker = Broker.of(self.settings)
        self._broker.declare(self.queue, self.declare)

    async def _send(self, batch: Sequence[Message], options: Options) -> None:
        for position, message in enumerate(batch):
            try:
                await self._broker.put(message)
            except QueueError as error:
                left = batch[position:]
                raise SendError(str(error), refused=[m.id for m in left], messages=left) from error


class Hold:
    """A message in someone's hand. A new one each time: a verdict of before means nothing to it."""

    __slots__ = ("item", "queue")

    def __init__(self, queue: Queue, item: Item) -> None:
        self.queue: Queue = queue
        self.item: Item = item


class AsyncIOConsumer(Consumer, protocol="asyncio"):
    """Receives within this process; what it holds unsettled when it closes goes back to its place."""

    features = FEATURES
    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings
    poll_timeout: ClassVar[float] = 0.0
    _broker: Broker
    #: What it reads: its group's queue; none when it is closed.
    _queues: Sequence[Queue] = ()

    async def _open(self) -> None:
        await self._close()
        self._broker = Broker.of(self.settings)
        await self._redeclare()
        for binding in self.bindings:
            self._broker.bind(self.queue, binding)
        self._held: set[Hold] = set()
        self._queues = self._join(self._broker.topic(self.queue))

    async def _redeclare(self) -> None:
        self._broker.declare(self.queue, self.declare)
        self._broker.declare(self.error_queue.replace("{queue}", self.queue), self.declare)

    def _join(self, topic: Topic) -> Sequence[Queue]:
        return [topic.join(self.group, latest=self.offset == "latest")]

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        while self._queues:
            for queue in self._queues:
                if queue.deleted:
                    raise ConnectionLost(f"The queue {queue.name!r} was deleted.")
                if queue.ready:
                    return [self._hold(queue, item) for item in queue.take(limit)]
            await self._queues[0].arrival()
        raise Closed(f"{self!r} was closed while it waited for messages.")

    async def _poll(self, limit: int) -> Sequence[Delivery]:
        for queue in self._queues:
            queue.ripen()
        return await super()._poll(limit)

    def _hold(self, queue: Queue, item: Item) -> Delivery:
        hold = Hold(queue, item)
        self._held.add(hold)
        return Delivery(item.message, hold)

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        released: dict[Queue, list[Item]] = {}
        with self._broker.lock:
            try:
                for settlement in settlements:
                    hold: Hold = settlement.delivery.token
                    if hold not in self._held:
                        continue  # settled before, or gone back when we closed
                    if settlement.outgoing:
                        self._send_all(settlement, hold)
                    self._held.discard(hold)
                    if settlement.verdict.kind.gives_back:
                        released.setdefault(hold.queue, []).append(hold.item)
                    else:
                        hold.queue.in_hand -= 1
            finally:
                for queue, items in released.items():
                    queue.put_back(items)

    def _send_all(self, settlement: Settlement, hold: Hold) -> None:
        """Send all that is outgoing or nothing: so look first where each message goes."""
        routes = [self._route(message, settlement.verdict.kind.copy, hold) for message in settlement.outgoing]
        for copy, queue, origin in (place for route in routes for place in route):
            queue.put(copy, origin)

    def _route(self, message: Message, kind: Copy | None, hold: Hold) -> list[tuple[Message, Queue, Queue | None]]:
        """Where an outgoing message goes, and the queue that it failed in, if it did."""
        stays, origin = message.queue == self.queue, hold.item.origin
        if kind is Copy.RETRY and stays:
            return [(message, hold.queue, origin)]  # for this group alone: the others have theirs
        if kind is not Copy.ERROR:
            origin = None  # the handler's own
        elif not stays:
            origin = hold.queue
        return [(copy, queue, origin) for copy, queue in self._find(message)]

    def _find(self, message: Message) -> list[tuple[Message, Queue]]:
        try:
            return self._broker.route(message)
        except QueueError as error:
            raise SendError(str(error), refused=[message.id], messages=[message]) from error

    async def _close(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        queues, self._queues = self._queues, ()
        for queue in queues:
            queue.put_back(hold.item for hold in self._held if hold.queue is queue)
            queue.interrupt()
        self._held = set()


class AsyncIOReader(AsyncIOConsumer):
    """Reads what waits for all groups of a queue, for an admin, without becoming a group of its own."""

    drops_expired: ClassVar[bool] = False

    def _join(self, topic: Topic) -> Sequence[Queue]:
        return [*topic.groups.values()]

    def _route(self, message: Message, kind: Copy | None, hold: Hold) -> list[tuple[Message, Queue, Queue | None]]:
        # Back to the group that it failed in; the others had it.
        found = self._find(message)
        origin = hold.item.origin
        own = hold.queue if message.queue == self.queue else origin
        if message.error is not None:  # it is put aside, and goes home from there
            return [(*place, origin) for place in found]
        return [(copy, queue, None) for copy, queue in found if queue is own] or [(*place, None) for place in found]


class AsyncIOAdmin(QueueAdmin, protocol="asyncio"):
    """Looks at the queues of this process."""

    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings

    async def _open(self) -> None:
        self._broker = Broker.of(self.settings)

    async def _list(self) -> Sequence[QueueInfo]:
        return [await self._stats(name) for name in list(self._broker.topics)]

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        self._broker.declare(queue, True)

    async def _delete(self, queue: str) -> None:
        self._broker.delete(queue)

    async def _purge(self, queue: str) -> int:
        return sum(group.purge() for group in self._broker.topic(queue).groups.values())

    async def _stats(self, queue: str) -> QueueInfo:
        groups = list(self._broker.topic(queue).groups.values())
        for group in groups:
            group.ripen()
        return QueueInfo(
            name=queue,
            ready=sum(len(group.ready) for group in groups),
            delayed=sum(len(group.later) for group in groups),
            in_hand=sum(group.in_hand for group in groups),
        )

    async def _bind(self, queue: str, binding: Binding) -> None:
        self._broker.bind(queue, binding)

    async def _unbind(self, queue: str, binding: Binding) -> None:
        self._broker.unbind(queue, binding)

    async def _cancel(self, queue: str, id: str) -> bool:  # noqa: A002
        found = [group.cancel(id) for group in self._broker.topic(queue).groups.values()]
        return any(found)

    def _reader(self, queue: str, prefetch: int) -> Reader:
        return AsyncIOReader(queue, url=self.settings, prefetch=max(1, prefetch), declare=False)
