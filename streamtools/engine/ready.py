"""ReadyQueue: holds deliveries that wait for a worker, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable

from streamtools.delivery import Delivery


class ReadyQueue:
    """Holds deliveries that wait for a worker. A delivery waits for the one before it that has its ordering key.

    Parameters:
        ordering_key: returns the key; deliveries with the same key are handled one after the other, those with the
            key None in any order.

    Attributes:
        deliveries: the deliveries that a worker may take.
        is_ordered: whether there is an ordering key.
    """

    def __init__(self, ordering_key: Callable[[Delivery], Hashable] | None) -> None:
        self.deliveries: deque[Delivery] = deque()
        self.is_ordered: bool = ordering_key is not None
        self._ordering_key = ordering_key
        #: Ordering key of a delivery that is ready or being handled -> the deliveries that wait behind it.
        self._behind: dict[Hashable, deque[Delivery]] = {}
        self._idle: deque[asyncio.Future[None]] = deque()
        #: After `hold()`: the deliveries that are ready, but that no worker may take.
        self._held: deque[Delivery] | None = None

    def add(self, delivery: Delivery) -> None:
        """Add a delivery; a worker takes it when its turn comes."""
        if self._ordering_key is not None and (key := self._ordering_key(delivery)) is not None:
            if (behind := self._behind.get(key)) is not None:
                behind.append(delivery)
                return
            self._behind[key] = deque()
        self._make_ready(delivery)

    def decided(self, delivery: Delivery) -> None:
        """Let the next delivery with this ordering key have its turn, because the handler of this one has ended."""
        if self._ordering_key is None or (key := self._ordering_key(delivery)) is None:
            return
        if behind := self._behind.get(key):
            self._make_ready(behind.popleft())
        else:
            self._behind.pop(key, None)

    async def wait(self) -> None:
        """Wait until a delivery is ready; called by an idle worker."""
        waiter = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        await waiter

    def hold(self) -> None:
        """Let no worker take a delivery until `resume()`."""
        if self._held is None:
            self._held = self.deliveries.copy()
            self.deliveries.clear()

    def resume(self) -> None:
        """Let workers take deliveries again, in the same order."""
        held, self._held = self._held, None
        for delivery in held or ():
            self._make_ready(delivery)

    def clear(self) -> list[Delivery]:
        """Remove and return all deliveries that no worker has begun."""
        self.resume()
        waiting = [*self.deliveries, *(each for behind in self._behind.values() for each in behind)]
        self.deliveries.clear()
        for behind in self._behind.values():
            behind.clear()
        return waiting

    def _make_ready(self, delivery: Delivery) -> None:
        if self._held is not None:
            self._held.append(delivery)
            return
        self.deliveries.append(delivery)
        while self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
