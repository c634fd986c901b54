"""Broker: the queues and bindings of one broker name in this process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from threading import RLock
from typing import ClassVar

from streamtools.drivers.asyncio.queues import Queue
from streamtools.errors import QueueError
from streamtools.exchange import Binding, Exchange, another_type, no_subscriber
from streamtools.message import Message
from streamtools.settings import AsyncIOSettings
from streamtools.validation.checks import Declare


class Topic:
    """One queue name: it has a `Queue` of its own for each group that has ever consumed it.

    Until the first group consumes, messages wait in the `Queue` of the group None. The first group takes that one
    over. From then on each group gets every message.
    """

    def __init__(self, name: str, maxsize: int, lock: RLock) -> None:
        self.name = name
        self.maxsize = maxsize
        self.lock = lock
        self.groups: dict[str | None, Queue] = {None: Queue(name, maxsize, lock)}
        self._claimed = False

    def join(self, group: str | None, *, latest: bool) -> Queue:
        """Return the queue of a group; make it if the group is new."""
        with self.lock:
            if not self._claimed:
                self._claimed = True
                self.groups[group] = self.groups.pop(None)
                if latest and group is not None:
                    self.groups[group].purge()
            return self.groups.setdefault(group, Queue(self.name, self.maxsize, self.lock))

    def delete(self) -> None:
        """Delete all messages, and wake all consumers, which see that the queue was deleted."""
        for queue in self.groups.values():
            queue.deleted = True
            queue.purge()
            queue.interrupt()


class Broker:
    """The topics of one broker name in this process; all its event loops share them, also in several threads."""

    #: The brokers by process and by name; by process, because a forked child must not see its parent's messages.
    _all: ClassVar[dict[tuple[int, str], Broker]] = {}

    def __init__(self, maxsize: int) -> None:
        self.lock: RLock = RLock()
        self.topics: dict[str, Topic] = {}
        #: Exchange name -> its bindings with their queues, in the order in which they were made.
        self.bindings: dict[str, dict[tuple[Binding, str], None]] = {}
        self._maxsize = maxsize

    @classmethod
    def of(cls, settings: AsyncIOSettings) -> Broker:
        """The broker of this name in this process."""
        return cls._all.setdefault((os.getpid(), settings.name), cls(settings.maxsize))

    def declare(self, name: str, declare: Declare) -> None:
        """Create a topic, or check that it exists, as `declare` says.

        Raises:
            QueueError: the topic is missing, and `declare` is "passive".
        """
        if declare is True:
            self.topics.setdefault(name, Topic(name, self._maxsize, self.lock))
        elif declare == "passive":
            self.topic(name)

    def delete(self, name: str) -> None:
        """Delete a topic and its bindings.

        Raises:
            QueueError: there is no such topic.
        """
        with self.lock:
            self.topic(name).delete()
            del self.topics[name]
            for bindings in self.bindings.values():
                for found in [key for key in bindings if key[1] == name]:
                    del bindings[found]

    def bind(self, queue: str, binding: Binding) -> None:
        """Bind a queue to a topic of an exchange. Safe to repeat.

        Raises:
            QueueError: the queue is missing, or the exchange is of another type.
        """
        with self.lock:
            self.topic(queue)
            self._check_type(binding.exchange)
            self.bindings.setdefault(binding.exchange.name, {})[binding, queue] = None

    def unbind(self, queue: str, binding: Binding) -> None:
        """Remove a binding. Safe to repeat."""
        with self.lock:
            self.bindings.get(binding.exchange.name, {}).pop((binding, queue), None)

    async def put(self, message: Message) -> None:
        """Put a message into all its queues at the same moment; wait while one of them is full.

        Raises:
            QueueError: the same as for `route`.
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
        """Return the queues that a message goes to, each with the copy that it gets.

        Raises:
            QueueError: there is no such queue, no queue is bound to the topic, or the exchange has another type.
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
        """Return the topic of this name.

        Raises:
            QueueError: there is no such topic.
        """
        try:
            return self.topics[name]
        except KeyError:
            raise QueueError(
                f"There is no queue {name!r} in this process. Open a consumer of it first, or a producer with "
                "declare=True."
            ) from None


def _first_full(routes: Iterable[tuple[Message, Queue]]) -> Queue | None:
    for _, queue in routes:
        if queue.size >= queue.maxsize:
            return queue
    return None
