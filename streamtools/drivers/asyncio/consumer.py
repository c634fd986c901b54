"""AsyncIOConsumer: takes messages from the queues of this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Unpack

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.asyncio.broker import Broker, Topic
from streamtools.drivers.asyncio.producer import FEATURES
from streamtools.drivers.asyncio.queues import Item, Queue
from streamtools.errors import Closed, ConnectionLost, QueueError, SendError
from streamtools.message import Message
from streamtools.parameters import ConsumerParameters
from streamtools.settings import AsyncIOSettings
from streamtools.verdicts import Copy


class Hold:
    """One delivery of an item. Each delivery gets a new Hold, so that a late verdict on an earlier one is ignored."""

    __slots__ = ("item", "queue")

    def __init__(self, queue: Queue, item: Item) -> None:
        self.queue: Queue = queue
        self.item: Item = item


class AsyncIOConsumer(Consumer, protocol="asyncio"):
    """Receives within this process. When it closes, messages that are not settled go back to their places."""

    features = FEATURES
    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings
    poll_timeout: ClassVar[float] = 0.0
    _broker: Broker
    #: The queues that it reads: the one of its group; none while it is closed.
    _queues: Sequence[Queue] = ()

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        def __init__(self, queue: str, **options: Unpack[ConsumerParameters]) -> None: ...

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
        self._broker.declare(self.error_queue, self.declare)

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
                        continue  # it was settled before, or went back when the consumer closed
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
        """Send all outgoing messages or none: find all their routes before the first is put into a queue."""
        routes = [self._route(message, settlement.verdict.kind.copy, hold) for message in settlement.outgoing]
        for copy, queue, origin in (place for route in routes for place in route):
            queue.put(copy, origin)

    def _route(self, message: Message, kind: Copy | None, hold: Hold) -> list[tuple[Message, Queue, Queue | None]]:
        """Return the queues that an outgoing message goes to, each with its copy and the queue that it failed in."""
        stays, origin = message.queue == self.queue, hold.item.origin
        if kind is Copy.RETRY and stays:
            return [(message, hold.queue, origin)]  # only this group retries: the others have their own copies
        if kind is not Copy.ERROR:
            origin = None  # the handler sent this message itself
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
    """Reads the waiting messages of all groups of a queue, for an admin, without becoming a group itself."""

    drops_expired: ClassVar[bool] = False

    def _join(self, topic: Topic) -> Sequence[Queue]:
        return [*topic.groups.values()]

    def _route(self, message: Message, kind: Copy | None, hold: Hold) -> list[tuple[Message, Queue, Queue | None]]:
        # A redriven message goes only to the group that it failed in: the others have handled it.
        found = self._find(message)
        origin = hold.item.origin
        own = hold.queue if message.queue == self.queue else origin
        if message.error is not None:  # it moves to another error queue, and keeps its origin for a later redrive
            return [(*place, origin) for place in found]
        return [(copy, queue, None) for copy, queue in found if queue is own] or [(*place, None) for place in found]
