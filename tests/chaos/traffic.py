"""A sender and a consumer at full speed in this process, on either side of a broker that is hurt."""

from __future__ import annotations

import asyncio
from typing import Any

from streamtools import Consumer, Producer
from streamtools.testing import eventually
from tests.chaos.tally import Tally

#: Messages in one confirmed batch.
BATCH = 50


class Traffic(Tally):
    """Sends numbers and handles them, until told to stop or until `limit` of them were sent.

    Parameters:
        url: the broker.
        queue: its name.
        limit: numbers to send; None for no end.
        pause: seconds between two batches.
    """

    def __init__(self, url: str, *, queue: str = "orders", limit: int | None = None, pause: float = 0.0) -> None:
        super().__init__()
        self._limit = limit
        self._pause = pause
        self._consumer = Consumer(queue, url=url, concurrency=8, prefetch=200)
        self._producer = Producer(queue, url=url, send_timeout=300)
        self._tasks: list[asyncio.Task[Any]] = []
        self._stopped = asyncio.Event()

    async def __aenter__(self) -> Traffic:
        @self._consumer()
        async def handle(message: int) -> None:
            self.handled[message] += 1

        await self._producer.open()
        self._tasks = [asyncio.create_task(handle()), asyncio.create_task(self._send())]
        await self.grows(1)
        return self

    async def _send(self) -> None:
        start = 0
        while not self._stopped.is_set() and (self._limit is None or start < self._limit):
            numbers = range(start, start + BATCH)
            start += BATCH
            await self._producer.send_many(numbers)
            self.confirmed.update(numbers)
            await asyncio.sleep(self._pause)

    async def grows(self, number: int) -> None:
        """Wait until so many more are confirmed and handled: both sides are at work."""
        sent, done = len(self.confirmed) + number, len(self.handled) + number
        await eventually(
            lambda: len(self.confirmed) >= sent and len(self.handled) >= done,
            f"{number} more confirmed and handled, {self.counts()}",
            timeout=120,
        )

    async def finish(self) -> None:
        """Send what is left of the limit (nothing more without one); wait until all confirmed is handled."""
        if self._limit is None:
            self._stopped.set()
        async with asyncio.timeout(120):
            await self._tasks[1]
        await eventually(lambda: not self.missing, "all that was confirmed is handled", timeout=60)

    async def __aexit__(self, *_: object) -> None:
        self._stopped.set()
        self._consumer.stop(5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._producer.close()
