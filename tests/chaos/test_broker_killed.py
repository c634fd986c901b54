"""The broker dies by kill -9, once and for a while; everybody goes on by itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from streamtools import Producer
from tests.brokers.rabbitmq import RabbitMQNode
from tests.chaos.tally import show
from tests.chaos.traffic import Traffic
from tests.lengths import length


async def declare(node: RabbitMQNode) -> None:
    """Have the queues, so old that this broker does not lose them by a kill -9."""
    async with Producer("orders", url=node.url):
        await asyncio.to_thread(node.wait_saved)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_20_000_messages_survive_a_kill_9_of_the_broker_in_their_middle(own_rabbitmq: RabbitMQNode) -> None:
    await declare(own_rabbitmq)
    async with Traffic(own_rabbitmq.url, limit=20_000) as traffic:
        await traffic.grows(5000)
        at_the_kill = traffic.counts()
        await asyncio.to_thread(own_rabbitmq.restart, force=True)
        await traffic.finish()

    show("before the kill -9 of the broker", at_the_kill)
    show("at the end", traffic.counts())
    assert at_the_kill["confirmed"] < 20_000, "the kill came too late to prove anything"
    assert traffic.confirmed == set(range(20_000))
    assert traffic.missing == set()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_an_outage_costs_under_5_percent_of_a_cpu_and_both_sides_resume(
    own_rabbitmq: RabbitMQNode,
) -> None:
    await declare(own_rabbitmq)
    async with Traffic(own_rabbitmq.url, pause=0.01) as traffic:
        await traffic.grows(500)
        await asyncio.to_thread(own_rabbitmq.kill)
        try:
            cpu, begin = time.process_time(), time.monotonic()
            await asyncio.sleep(length(10, 30))  # it is the length of the outage that is asked for
            share = (time.process_time() - cpu) / (time.monotonic() - begin)
        finally:
            await asyncio.to_thread(own_rabbitmq.start)
        during = traffic.counts()
        await traffic.grows(500)
        await traffic.finish()

    show("at the end of the outage", during, cpu=f"{share:.2%}")
    show("at the end", traffic.counts())
    assert share < 0.05
    assert traffic.missing == set()
