"""Deferred messages, requests and what a handler sends, when the broker is killed -9, and the service with it."""

import asyncio
import time
from typing import Any

import pytest

from streamtools import Bus, MessageContext, Retry
from streamtools.testing.waiting import eventually
from tests.brokers.rabbitmq import RabbitMQNode
from tests.bus.contracts import Bill, OrderPlaced, PlaceOrder, Quote

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
NUMBER = 100


async def test_deferred_messages_survive_the_broker_and_the_service(own_rabbitmq: RabbitMQNode, process: Any) -> None:
    url = own_rabbitmq.url
    async with Bus(None, url=url) as bus:
        async with Bus("orders", url=url):
            pass  # the queue is there now
        await bus.defer(PlaceOrder(id=-1), delay=13, to="orders")  # makes all levels of the delay
        await asyncio.to_thread(own_rabbitmq.wait_saved)
        service = await process(url)
        for n in range(NUMBER):
            await bus.defer(PlaceOrder(id=n), delay=1 + n % 12, to="orders")
        service.kill()
        await asyncio.to_thread(own_rabbitmq.restart, force=True)
        successor = await process(url)
        placed = set()
        while len(placed) <= NUMBER:
            _, id_, due = (await asyncio.to_thread(successor.stdout.readline)).split()
            assert float(due) <= time.time(), "it came early"
            placed.add(int(id_))
    assert placed == {-1, *range(NUMBER)}


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
