"""The broker dies by kill -9 while messages are in the middle of a retry, a delay or their way to the error queue."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from streamtools import ConsumerFactory, ConsumerRunner, Message, Producer, QueueAdmin, Retry
from streamtools.testing import eventually
from tests.brokers.rabbitmq import RabbitMQNode
from tests.chaos.tally import show

NUMBER = 2000
#: Seconds for a broker that begins again; it takes 10 where the machine is quiet.
PATIENCE = 240


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_retries_and_rejections_survive_a_kill_9_of_the_broker(own_rabbitmq: RabbitMQNode) -> None:
    url = own_rabbitmq.url
    consumers = ConsumerFactory(url=url, retry=Retry(retries=2, delay=0.4))
    begun: set[int] = set()
    handled: Counter[int] = Counter()
    rejected: dict[int, int] = {}

    @consumers.route("orders", concurrency=16)
    async def order(number: int, message: Message) -> None:
        begun.add(number)
        if number % 10 == 0:
            raise ValueError("always")
        if message.attempt == 1:
            raise RuntimeError("the first time")
        handled[number] += 1

    @consumers.route("error", concurrency=16)
    async def failed(number: int, message: Message) -> None:
        assert message.error is not None
        rejected[number] = message.error.attempts

    async with ConsumerRunner(consumers), Producer("orders", url=url, send_timeout=120) as producer:
        await producer.send(0)
        await eventually(lambda: rejected)  # so all queues of the delays are made, too
        await asyncio.to_thread(own_rabbitmq.wait_saved)
        await producer.send_many(range(1, NUMBER))
        try:
            for enough in (lambda: len(begun) > NUMBER // 2, lambda: len(handled) + len(rejected) > NUMBER // 2):
                await eventually(enough, timeout=PATIENCE)
                await asyncio.to_thread(own_rabbitmq.restart, force=True)
            await eventually(lambda: len(handled) + len(rejected) == NUMBER, timeout=PATIENCE)
        finally:
            show("at the end", {"begun": len(begun), "handled": len(handled), "rejected": len(rejected)})
    assert set(rejected) == set(range(0, NUMBER, 10))
    assert set(rejected.values()) == {3}
    async with QueueAdmin(url=url) as admin:
        assert (await admin.stats("streamtools.undeliverable")).ready == 0
