"""One consumer at a time for an ordered queue, across connections."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiormq.abc import AbstractChannel

from streamtools import Consumer, Producer
from tests.brokers.address import RabbitMQAddress
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


async def test_a_new_ordered_queue_is_declared_for_a_single_active_consumer(
    consumer: Any, rabbitmq_vhost: RabbitMQAddress
) -> None:
    await consumer(ordered_by="queue")

    row = rabbitmq_vhost.manage("GET", f"queues/{rabbitmq_vhost.url.rpartition('/')[2]}/orders")
    assert row["arguments"]["x-single-active-consumer"] is True


@pytest.mark.parametrize("declared_before", [False, True], ids=["single active", "lock"])
async def test_a_standby_receives_nothing_until_the_active_one_has_gone(
    producer: Any, consumer: Any, declared_before: bool
) -> None:
    if declared_before:
        await producer()
    active = await consumer(ordered_by="queue", prefetch=10)
    sender = await producer()
    await sender.send_many([str(n) for n in range(30)])
    (zero,) = await take(active, 1)  # alone, until it is settled
    await zero.ack()
    first = await take(active, 10)
    standby = await consumer(ordered_by="queue", prefetch=50)
    assert await standby.receive(1, timeout=0.5) == []

    for delivery in first[:4]:
        await delivery.ack()
    more = await take(active, 4)
    await active.close()

    (again,) = await take(standby, 1)
    await again.ack()
    rest = await take(standby, 24)
    assert [int(d.message.body) for d in first] == list(range(1, 11))
    assert [int(d.message.body) for d in more] == [11, 12, 13, 14]
    assert [int(d.message.body) for d in (again, *rest)] == list(range(5, 30))


@pytest.mark.parametrize("declared_before", [False, True], ids=["single active", "lock"])
async def test_two_processes_keep_the_order_of_each_key_while_they_come_and_go(
    url: str, producer: Any, declared_before: bool
) -> None:
    if declared_before:
        await producer()
    done: list[int] = []
    running = 0
    overlap = False

    async def work(stop_after: int) -> None:
        nonlocal running, overlap
        receiver = Consumer("orders", url=url, ordered_by="queue", prefetch=20)
        seen = 0

        @receiver()
        async def handle(message: int) -> None:
            nonlocal running, overlap, seen
            running += 1
            overlap = overlap or running > 1
            await asyncio.sleep(0.001)
            done.append(message)
            running -= 1
            seen += 1
            if seen == stop_after:
                receiver.stop(5)

        await handle()

    one = asyncio.create_task(work(40))
    async with Producer("orders", url=url) as sender:
        await sender.send(0)
        await wait_until(lambda: done == [0])  # else the second one may be the first, and leave this one nothing
        two = asyncio.create_task(work(1000))
        for n in range(1, 100):
            await sender.send(n)
        await wait_until(lambda: len(set(done)) >= 100)
    two.cancel()
    await asyncio.wait_for(asyncio.gather(one, two, return_exceptions=True), 30)

    assert done == list(range(100))
    assert not overlap


async def test_the_lock_names_itself_and_ends_with_its_connection(
    producer: Any, consumer: Any, foreign: AbstractChannel
) -> None:
    await producer()
    receiver = await consumer(ordered_by="key")
    sender = await producer()
    await sender.send(b"x", key="k")
    await take(receiver, 1)
    await receiver.close()

    async def free() -> bool:
        try:
            await foreign.queue_declare("streamtools.order.orders", exclusive=True)
        except Exception:
            return False
        return True

    await wait_until(free)


@pytest.mark.parametrize("end", ["stopped", "cancelled"])
async def test_a_consumer_that_ends_in_the_middle_leaves_the_rest_in_order(url: str, producer: Any, end: str) -> None:
    total, handled = 3000, list[int]()
    sender = await producer()
    for start in range(0, total, 500):
        await sender.send_many([str(n) for n in range(start, start + 500)])

    while len(handled) < total:
        receiver = Consumer("orders", url=url)
        enough, before = asyncio.Event(), len(handled)

        @receiver()
        async def take_in(number: int, enough: asyncio.Event = enough, before: int = before) -> None:
            handled.append(number)
            if len(handled) in (before + 300, total):
                enough.set()

        running = asyncio.create_task(take_in())
        await asyncio.wait_for(enough.wait(), 60)
        receiver.stop() if end == "stopped" else running.cancel()
        await asyncio.wait({running})
    assert handled == list(range(total))
