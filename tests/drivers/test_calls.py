"""What a message costs, in calls of Python functions.

A time depends on the machine and on its other users; the number of calls does not. Each limit is what was counted, on
Python 3.11, and one or two calls more. Whoever adds a call to the path of each message finds out here, and decides
whether it is worth it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from streamtools import Bus, Command, Consumer, Producer
from tests.brokers.address import RabbitMQAddress

FEW, MANY = 500, 1500
PAYLOAD = {"id": 1, "customer": "Ada"}

#: Moves so many messages at a URL; what is counted is in a `with` block.
Work = Callable[[str, int, "Calls"], Awaitable[None]]


class Place(Command, to="bus"):
    """A command for the bus."""

    id: int


class Calls:
    """Calls of Python functions in this thread, in a `with` block. A coroutine that goes on counts again."""

    def __init__(self) -> None:
        self.number = 0

    def _count(self, _frame: object, event: str, _argument: object) -> None:
        if event == "call":
            self.number += 1

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._count)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)


async def _calls_for_each(work: Work, url: str) -> float:
    few, many = Calls(), Calls()
    await work(url, FEW, few)
    await work(url, MANY, many)
    return (many.number - few.number) / (MANY - FEW)


async def _send(url: str, number: int, calls: Calls) -> None:
    async with Producer("orders", url=url) as producer:
        with calls:
            for _ in range(number):
                await producer.send(PAYLOAD)


async def _send_many(url: str, number: int, calls: Calls) -> None:
    async with Producer("orders", url=url) as producer:
        with calls:
            for _ in range(number // 100):
                await producer.send_many([PAYLOAD] * 100)


async def _consume(url: str, number: int, calls: Calls, *, concurrency: int = 1) -> None:
    async with Producer("orders", url=url) as producer:
        await producer.send_many([PAYLOAD] * number)
    consumer, left = Consumer("orders", url=url, concurrency=concurrency), number

    @consumer()
    async def handle(order: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if not left:
            consumer.stop()

    with calls:
        await handle()
    assert not left


async def _handle_commands(url: str, number: int, calls: Calls) -> None:
    bus, left, done = Bus("bus", url=url), number, asyncio.Event()

    @bus.handler
    async def place(command: Place) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    await bus.open()
    await bus.consumer.open()
    for _ in range(number):
        await bus.send(Place(id=1))
    with calls:
        await bus.start()
        await done.wait()
        await bus.stop()


async def _send_commands(url: str, number: int, calls: Calls) -> None:
    bus = Bus("bus", url=url)
    async with Producer("bus", url=url), bus:
        with calls:
            for _ in range(number):
                await bus.send(Place(id=1))


IN_PROCESS: dict[str, tuple[Work, float]] = {
    "send": (_send, 46),
    "send_many": (_send_many, 17),
    "consume": (_consume, 22),
    "consume with 8 workers": (partial(_consume, concurrency=8), 23),
    "send a command": (_send_commands, 61),
    "handle a command": (_handle_commands, 28),
}


@pytest.mark.parametrize(("work", "limit"), IN_PROCESS.values(), ids=IN_PROCESS)
async def test_no_message_in_process_costs_more_calls(work: Work, limit: float) -> None:
    assert await _calls_for_each(work, "asyncio://calls?maxsize=10000") <= limit


# How many messages make a batch depends on time here, and each batch has calls of its own.
@pytest.mark.parametrize(("work", "limit"), [(_send_many, 11.5), (_consume, 30)], ids=["send_many", "consume"])
async def test_no_message_in_sqlite_costs_more_calls(work: Work, limit: float, tmp_path: Path) -> None:
    assert await _calls_for_each(work, f"sqlite:///{tmp_path}/queues.db") <= limit


@pytest.mark.parametrize(("work", "limit"), [(_send_many, 24), (_consume, 51)], ids=["send_many", "consume"])
async def test_no_message_on_rabbitmq_costs_more_calls(
    work: Work, limit: float, rabbitmq_vhost: RabbitMQAddress
) -> None:
    assert await _calls_for_each(work, rabbitmq_vhost.url) <= limit
