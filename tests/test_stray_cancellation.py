"""A client library that cancels whoever waits for it has lost its connection; it must not end us silently."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from streamtools import ConsumerRunner
from streamtools.consumer import CONSUMER_LOOPS
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.asyncio import AsyncIOConsumer, AsyncIOProducer
from tests.faults.waiting import wait_until


class Fickle(AsyncIOConsumer):
    """Cancels its caller once at each hook."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.to_come = {"open", "receive", "settle", "close"}

    def _stray(self, hook: str) -> None:
        if hook in self.to_come:
            self.to_come.discard(hook)
            raise asyncio.CancelledError

    async def _open(self) -> None:
        self._stray("open")
        await super()._open()

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        self._stray("receive")
        return await super()._receive(limit)

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        self._stray("settle")
        await super()._settle(settlements)

    async def _close(self) -> None:
        await super()._close()
        self._stray("close")


async def test_a_handler_that_cancels_every_task_of_its_consumer_ends_nothing() -> None:
    consumer = CONSUMER_LOOPS["asyncio"]("orders", url="asyncio://fickle")
    handled: list[int] = []

    @consumer()
    async def handle(number: int) -> None:
        handled.append(number)
        if len(handled) == 1:
            for task in asyncio.all_tasks():
                if task.get_name() in ("streamtools-worker", "streamtools-settle", "streamtools-receive"):
                    task.cancel()

    async with AsyncIOProducer("orders", url="asyncio://fickle") as producer, ConsumerRunner(consumer):
        await producer.send_many(range(100))
        await wait_until(lambda: set(handled) == set(range(100)))


async def test_a_consumer_whose_library_cancels_it_goes_on() -> None:
    assert "asyncio" in CONSUMER_LOOPS
    consumer = Fickle("orders", url="asyncio://fickle")
    handled: list[int] = []

    @consumer()
    async def handle(number: int) -> None:
        handled.append(number)

    async with AsyncIOProducer("orders", url="asyncio://fickle") as producer, ConsumerRunner(consumer):
        await producer.send_many(range(100))
        await wait_until(lambda: set(handled) == set(range(100)))

    assert not consumer.to_come
