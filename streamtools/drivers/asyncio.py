"""`asyncio://`: queues within this process. The first file for a driver author to read.

A message sent is appended to its queue's `ready`, or to the heap of `later` until it is due; a
consumer takes it from there, holds it until it is settled, and puts it back if it is released. That
is all a protocol needs to do: retries, the error queue and the worker pool stand above it.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from streamtools.admin import QueueAdmin, QueueInfo, Reader
from streamtools.checks import Declare
from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.errors import Closed, QueueError, SendError
from streamtools.exchange import Binding, another_type, no_subscriber
from streamtools.features import Features
from streamtools.message import Message
from streamtools.options import Options
from streamtools.producer import Producer
from streamtools.settings import AsyncIOSettings
from streamtools.verdicts import Kind

FEATURES = Features(groups=True, redelivery=True, topics=True, cancel=True)


class Queue:
    """One queue: messages that are ready, messages that are due later, and those in hand."""

    def __init__(self, name: str, maxsize: int) -> None:
        self.name = name
        self.maxsize = maxsize
        self.ready: deque[Message] = deque()
        self.later: list[tuple[float, int, Message]] = []
        self.in_hand: int = 0
        self._order = count()
        self._timer: asyncio.TimerHandle | None = None
        self._getters: deque[asyncio.Future[None]] = deque()
        self._putters: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """Messages that wait, due or not."""
        return len(self.ready) + len(self.later)

    async def put(self, message: Message) -> None:
        """Add a message; waits while the queue is full."""
        while self.size >= self.maxsize:
            await self._wait(self._putters)
        self.put_now(message)

    def put_now(self, message: Message) -> None:
        """Add a message, full or not: for copies, which must not wait for the consumer that makes them."""
        if message.deliver_at is not None and message.deliver_at > time.time():
            heapq.heappush(self.later, (message.deliver_at, next(self._order), message))
            self._schedule()
        else:
            self.ready.append(message)
            _wake(self._getters)

    def put_back(self, messages: Sequence[Message]) -> None:
        """Return messages that were taken, to the front, in their order."""
        self.in_hand -= len(messages)
        self.ready.extendleft(reversed(messages))
        _wake(self._getters)

    async def arrival(self) -> None:
        """Wait until a message may be ready, or until `interrupt()`."""
        await self._wait(self._getters)

    def interrupt(self) -> None:
        """Wake everyone who waits for an arrival."""
        for _ in range(len(self._getters)):
            _wake(self._getters)

    def take(self, limit: int) -> list[Message]:
        """Take up to `limit` messages that are ready."""
        taken = [self.ready.popleft() for _ in range(min(limit, len(self.ready)))]
        self.in_hand += len(taken)
        if self.ready:
            _wake(self._getters)
        for _ in taken:
            _wake(self._putters)
        return taken

    def cancel(self, id: str) -> bool:  # noqa: A002 - the field's name
        """Forget a message that is not due yet; False when there is none of this id."""
        kept = [entry for entry in self.later if entry[2].id != id]
        found = len(kept) < len(self.later)
        self.later[:] = kept
        heapq.heapify(self.later)
        return found

    def purge(self) -> int:
        """Forget all messages that wait; the number of them."""
        number = self.size
        self.ready.clear()
        self.later.clear()
        while self._putters:
            _wake(self._putters)
        return number

    async def _wait(self, line: deque[asyncio.Future[None]]) -> None:
        waiter = asyncio.get_running_loop().create_future()
        line.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                _wake(line)  # it was meant for us; pass it on
            raise

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = self.later[0][0] - time.time()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay), self._ripen)

    def _ripen(self) -> None:
        self._timer = None
        now = time.time()
        while self.later and self.later[0][0] <= now:
            self.ready.append(heapq.heappop(self.later)[2])
            _wake(self._getters)
        if self.later:
            self._schedule()


def _wake(line: deque[asyncio.Future[None]]) -> None:
    while line:
        waiter = line.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return


class Topic:
    """What is sent to one name: a queue for each group that has ever consumed it.

    Until a group has, messages wait in the queue of the group None, and the first group takes
    that queue over; from then on each group has every message.
    """

    def __init__(self, name: str, maxsize: int) -> None:
        self.name = name
        self.maxsize = maxsize
        self.groups: dict[str | None, Queue] = {None: Queue(name, maxsize)}
        self._claimed = False

    def join(self, group: str | None, *, latest: bool) -> Queue:
        """The queue of a group, which is made if it is new."""
        if not self._claimed:
            self._claimed = True
            self.groups[group] = self.groups.pop(None)
            if latest and group is not None:
                self.groups[group].purge()
        return self.groups.setdefault(group, Queue(self.name, self.maxsize))


class Broker:
    """The topics of one name within one event loop."""

    #: By event loop, so that it ends with the loop; nothing outlives it.
    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Broker]]] = WeakKeyDictionary()

    def __init__(self, maxsize: int) -> None:
        self.topics: dict[str, Topic] = {}
        #: Exchange name -> its bindings with their queues, in the order made.
        self.bindings: dict[str, dict[tuple[Binding, str], None]] = {}
        self._maxsize = maxsize

    @classmethod
    def of(cls, settings: AsyncIOSettings) -> Broker:
        """The broker of this name in the running loop."""
        brokers = cls._all.setdefault(asyncio.get_running_loop(), {})
        return brokers.setdefault(settings.name, cls(settings.maxsize))

    def declare(self, name: str, declare: Declare) -> None:
        """Make a topic, or check that it is there.

        Raises:
            QueueError: it is missing, and is not to be made.
        """
        if declare is True:
            self.topics.setdefault(name, Topic(name, self._maxsize))
        elif declare == "passive":
            self.topic(name)

    def delete(self, name: str) -> None:
        """Forget a topic and its bindings.

        Raises:
            QueueError: there is none.
        """
        self.topic(name)
        del self.topics[name]
        for bindings in self.bindings.values():
            for found in [key for key in bindings if key[1] == name]:
                del bindings[found]

    def bind(self, queue: str, binding: Binding) -> None:
        """Give a queue the messages of a topic; safe to repeat.

        Raises:
            QueueError: the queue is missing, or the exchange is of another type.
        """
        self.topic(queue)
        found = self.bindings.setdefault(binding.exchange.name, {})
        for other, _ in found:
            if other.exchange.type != binding.exchange.type:
                raise another_type(binding.exchange, other.exchange.type)
        found[binding, queue] = None

    def unbind(self, queue: str, binding: Binding) -> None:
        """Take it away again; safe to repeat."""
        self.bindings.get(binding.exchange.name, {}).pop((binding, queue), None)

    def route(self, message: Message) -> list[tuple[Message, Queue]]:
        """Where a message goes, as each queue is to have it.

        Raises:
            QueueError: there is no such queue, or none bound to its topic.
        """
        if message.exchange is None:
            if not message.mandatory and message.queue not in self.topics:
                return []
            return [(message, queue) for queue in self.topic(message.queue).groups.values()]
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
                for copy, queue in self._broker.route(message):
                    await queue.put(copy)
            except QueueError as error:
                raise SendError(str(error), refused=[m.id for m in batch[position:]]) from error


class AsyncIOConsumer(Consumer, protocol="asyncio"):
    """Receives within this process; what it holds unsettled when it closes goes back to the front."""

    features = FEATURES
    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings
    look: ClassVar[float] = 0.0
    _broker: Broker
    _queue: Queue | None = None

    async def _open(self) -> None:
        self._broker = Broker.of(self.settings)
        self._broker.declare(self.queue, self.declare)
        self._broker.declare(self.error_queue.replace("{queue}", self.queue), self.declare)
        for binding in self.bindings:
            self._broker.bind(self.queue, binding)
        self._queue = self._join()
        self._numbers = count()
        self._held: dict[int, Message] = {}  # in the order taken

    def _join(self) -> Queue | None:
        return self._broker.topic(self.queue).join(self.group, latest=self.offset == "latest")

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        while (queue := self._queue) is not None:
            if queue.ready:
                return [self._hold(message) for message in queue.take(limit)]
            await queue.arrival()
        raise Closed(f"{self!r} was closed while it waited for messages.")

    def _hold(self, message: Message) -> Delivery:
        number = next(self._numbers)
        self._held[number] = message
        return Delivery(message, number)

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        if self._queue is None:
            return  # closed: all that was in hand has gone back
        released = []
        for settlement in settlements:
            if settlement.delivery.token not in self._held:
                continue  # settled before
            # All of them or none: so look first where they go.
            routes = [self._route(message, settlement.verdict.kind) for message in settlement.outgoing]
            for copy, queue in (pair for route in routes for pair in route):
                queue.put_now(copy)
            taken = self._held.pop(settlement.delivery.token)
            if settlement.verdict.kind is Kind.RELEASE:
                released.append(taken)
            else:
                self._queue.in_hand -= 1
        self._queue.put_back(released)

    def _route(self, message: Message, kind: Kind) -> list[tuple[Message, Queue]]:
        if kind is Kind.RETRY and message.queue == self.queue and self._queue is not None:
            return [(message, self._queue)]  # for this group alone: the others have theirs
        try:
            return self._broker.route(message)
        except QueueError as error:
            raise SendError(str(error), refused=[message.id]) from error

    async def _close(self) -> None:
        if self._queue is not None:
            queue, self._queue = self._queue, None
            queue.put_back([*self._held.values()])
            queue.interrupt()


class AsyncIOReader(AsyncIOConsumer):
    """Reads a queue for an admin, without becoming a group of its own."""

    async def _open(self) -> None:
        await super()._open()
        groups = self._broker.topic(self.queue).groups.values()
        self._queue = max(groups, key=lambda group: len(group.ready))

    def _join(self) -> Queue | None:
        return None


class AsyncIOAdmin(QueueAdmin, protocol="asyncio"):
    """Looks at the queues of this process."""

    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings

    async def _open(self) -> None:
        self._broker = Broker.of(self.settings)

    async def _list(self) -> Sequence[QueueInfo]:
        return [await self._stats(name) for name in self._broker.topics]

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        self._broker.declare(queue, True)

    async def _delete(self, queue: str) -> None:
        self._broker.delete(queue)

    async def _purge(self, queue: str) -> int:
        return sum(group.purge() for group in self._broker.topic(queue).groups.values())

    async def _stats(self, queue: str) -> QueueInfo:
        groups = self._broker.topic(queue).groups.values()
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
