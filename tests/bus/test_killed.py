"""Deferred messages, requests and what a handler sends, when the broker is killed -9, and the service with it."""

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamtools import ADMINS, PRODUCERS, Bus, MessageContext, Retry
from streamtools.testing.waiting import eventually
from tests.brokers.rabbitmq import RabbitMQNode
from tests.bus.contracts import Bill, OrderPlaced, PlaceOrder, Quote

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
NUMBER = 1000
#: Seconds of the longest delay.
LONGEST = 20.0
#: Messages that a service has in hand, at most: those may be handled twice when it is killed.
IN_HAND = 100
#: Messages on their way from one of eight levels to the next, 32 each: those may be there twice when the broker is.
IN_TRANSIT = 8 * 32


async def test_deferred_messages_survive_the_broker_and_the_service(own_rabbitmq: RabbitMQNode, process: Any) -> None:
    url = own_rabbitmq.url
    repeated = await _deferred(url, process, lambda: own_rabbitmq.restart(force=True), own_rabbitmq.wait_saved)
    assert repeated <= IN_HAND + IN_TRANSIT


async def test_deferred_messages_on_sqlite_survive_the_service(tmp_path: Path, process: Any) -> None:
    repeated = await _deferred(f"sqlite:///{tmp_path}/bus.db?lease=2", process)
    assert repeated <= IN_HAND


async def _deferred(
    url: str, process: Any, crash: Callable[[], None] = lambda: None, saved: Callable[[], None] = lambda: None
) -> int:
    """Kill the service, and the broker, while deferred messages come due; how many were handled twice."""
    async with Bus("orders", url=url), Bus(None, url=url) as bus:
        await bus.defer(PlaceOrder(id=-1), delay=LONGEST, to="orders")  # makes all levels of the delay
        await asyncio.to_thread(saved)
    service = await process(url)
    async with Bus(None, url=url) as bus, bus.transaction():
        for n in range(NUMBER):
            await bus.defer(PlaceOrder(id=n), delay=random.uniform(0, LONGEST), to="orders")
    lines = [await asyncio.to_thread(service.stdout.readline) for _ in range(NUMBER // 10)]
    service.kill()
    lines += await asyncio.to_thread(service.stdout.readlines)
    assert len(lines) < NUMBER, "the kill came too late to prove anything"
    await asyncio.to_thread(crash)
    successor = await process(url)
    async with asyncio.timeout(120):
        while len({_id(line) for line in lines}) <= NUMBER:
            lines.append(await asyncio.to_thread(successor.stdout.readline))
    successor.send_signal(signal.SIGTERM)
    lines += await asyncio.to_thread(successor.stdout.readlines)
    assert {_id(line) for line in lines} == {-1, *range(NUMBER)}
    early = [line for line in lines if float(line.split()[2]) > float(line.split()[3])]
    assert not early
    async with ADMINS[PRODUCERS.protocol(url)](url=url) as admin:

        async def nothing_is_left() -> bool:
            found = [await admin.stats(queue) for queue in ("orders", "error")]
            return not any(left.ready or left.delayed or left.in_hand for left in found)

        await eventually(nothing_is_left)
    return len(lines) - NUMBER - 1


def _id(line: bytes) -> int:
    return int(line.split()[1])


async def test_requests_go_on_when_the_broker_is_killed(own_rabbitmq: RabbitMQNode) -> None:
    url = own_rabbitmq.url
    prices = Bus("prices", url=url, concurrency=20)

    @prices.handler
    async def quote(command: Quote) -> int:
        return command.id * 2

    async with prices, Bus(None, url=url) as asker:
        await asyncio.to_thread(own_rabbitmq.wait_saved)
        assert await asker.request(Quote(id=1)) == 2
        await asyncio.to_thread(own_rabbitmq.restart, force=True)

        async def is_answered() -> bool:
            # One whose reply queue goes with the connection is not answered: it times out.
            try:
                answer: int = await asker.request(Quote(id=2), timeout=5)
            except TimeoutError:
                return False
            return answer == 4

        await eventually(is_answered, timeout=120)


async def test_what_handlers_send_arrives_over_a_kill_9_of_the_broker(own_rabbitmq: RabbitMQNode) -> None:
    url, retry = own_rabbitmq.url, Retry(retries=3, delay=0.1)
    orders = Bus("orders", url=url, concurrency=10, retry=retry)
    billing = Bus("billing", url=url, concurrency=10, retry=retry)
    billed: dict[str, set[int]] = {"command": set(), "event": set()}

    @orders.handler
    async def place(command: PlaceOrder, context: MessageContext) -> None:
        await context.send(Bill(id=command.id))
        await context.publish(OrderPlaced(id=command.id))
        if command.id % 10 == 0 and context.attempt == 1:
            raise ValueError("every tenth, once")

    @billing.handler
    async def bill(command: Bill) -> None:
        billed["command"].add(command.id)

    @billing.handler
    async def note(event: OrderPlaced) -> None:
        billed["event"].add(event.id)

    async with billing, orders, Bus(None, url=url) as bus:
        await bus.defer(PlaceOrder(id=0), delay=0.2)  # makes the levels of the delay
        await asyncio.to_thread(own_rabbitmq.wait_saved)
        async with bus.transaction():
            for n in range(2000):
                await bus.send(PlaceOrder(id=n))
        await eventually(lambda: len(billed["event"]) > 300)
        at_the_kill = len(billed["event"])
        await asyncio.to_thread(own_rabbitmq.restart, force=True)
        await eventually(lambda: all(len(found) == 2000 for found in billed.values()), timeout=150)
    assert at_the_kill < 2000, "the kill came too late to prove anything"
