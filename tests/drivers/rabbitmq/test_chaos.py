"""What breaks: the broker killed, connections cut, queues deleted, alarms, silence. Nothing confirmed is lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from streamtools import Consumer, Producer, Retry
from streamtools.admin import QueueAdmin
from streamtools.errors import StreamToolsError
from tests.brokers.address import RabbitMQAddress
from tests.brokers.rabbitmq import RabbitMQNode
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until


class Traffic:
    """Sends numbers and handles them, until told to stop; keeps what was confirmed and what was handled."""

    def __init__(self, url: str, *, pause: float = 0.0) -> None:
        self.url = url
        self.pause = pause
        self.confirmed: set[int] = set()
        self.handled: Counter[int] = Counter()
        self._consumer = Consumer("orders", url=url, concurrency=8, prefetch=200)
        self._producer = Producer("orders", url=url, send_timeout=300)
        self._tasks: list[asyncio.Task[Any]] = []
        self._done = asyncio.Event()

    async def __aenter__(self) -> Traffic:
        @self._consumer()
        async def handle(message: int) -> None:
            self.handled[message] += 1

        await self._producer.open()
        self._tasks = [asyncio.create_task(handle()), asyncio.create_task(self._send())]
        await wait_until(lambda: len(self.handled) > 0)
        return self

    async def _send(self) -> None:
        start = 0
        while not self._done.is_set():
            numbers = range(start, start + 50)
            start += 50
            await self._producer.send_many(numbers)
            self.confirmed.update(numbers)
            await asyncio.sleep(self.pause)

    async def grows(self, number: int) -> None:
        """Wait until so many more are confirmed and handled: both sides are at work."""
        sent, done = len(self.confirmed) + number, len(self.handled) + number
        await wait_until(lambda: len(self.confirmed) >= sent and len(self.handled) >= done, timeout=60)

    async def finish(self) -> None:
        """Stop sending and wait until all that was confirmed is handled."""
        self._done.set()
        await self._tasks[1]
        await wait_until(lambda: self.confirmed <= set(self.handled), timeout=60)

    async def __aexit__(self, *_: object) -> None:
        self._done.set()
        self._consumer.stop(5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._producer.close()


@pytest.mark.slow
async def test_kill_9_of_the_broker_loses_nothing_and_both_sides_resume(own_rabbitmq: RabbitMQNode) -> None:
    async with Traffic(own_rabbitmq.url) as traffic:
        await asyncio.sleep(1.5)  # a quorum queue younger than a second may be lost by this version
        await traffic.grows(1000)
        await asyncio.to_thread(own_rabbitmq.restart, force=True)
        await traffic.grows(1000)
        await traffic.finish()


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_connection_that_is_cut_is_made_again(rabbitmq_vhost: RabbitMQAddress, fault: str) -> None:
    host, _, port = rabbitmq_vhost.url.split("@")[1].split("/")[0].partition(":")
    async with Proxy(host, int(port)) as proxy:
        async with Traffic(rabbitmq_vhost.url.replace(f":{port}/", f":{proxy.port}/")) as traffic:
            for _ in range(3):
                await traffic.grows(500)
                await getattr(proxy, fault)()
            await traffic.grows(500)
            await traffic.finish()


async def test_connections_closed_by_the_operator_are_made_again(own_rabbitmq: RabbitMQNode) -> None:
    async with Traffic(own_rabbitmq.url) as traffic:
        await traffic.grows(500)
        await asyncio.to_thread(own_rabbitmq.close_all_connections)
        await traffic.grows(500)
        await traffic.finish()


async def test_a_queue_deleted_under_its_consumer_is_made_again(rabbitmq_vhost: RabbitMQAddress) -> None:
    received: list[bytes] = []
    consumer = Consumer("orders", url=rabbitmq_vhost.url)

    @consumer()
    async def handle(message: bytes) -> None:
        received.append(message)

    running = asyncio.create_task(handle())
    async with Producer("orders", url=rabbitmq_vhost.url) as producer:
        await producer.send(b"1")
        await wait_until(lambda: received == [b"1"])
        rabbitmq_vhost.manage("DELETE", f"queues/{rabbitmq_vhost.url.rpartition('/')[2]}/orders")

        async def send() -> bool:
            try:
                await producer.send(b"2")
            except StreamToolsError:
                return False
            return True

        await wait_until(send)
        await wait_until(lambda: b"2" in received)
    consumer.stop()
    await running


async def test_an_alarm_holds_senders_back_and_lets_acknowledgements_through(own_rabbitmq: RabbitMQNode) -> None:
    url = own_rabbitmq.url
    async with Producer("orders", url=url, send_timeout=60) as producer:
        await producer.send_many([str(n) for n in range(100)])
        async with Consumer("orders", url=url, prefetch=200) as consumer:
            deliveries = []
            while len(deliveries) < 100:
                deliveries += await consumer.receive(100, timeout=10)
            await deliveries.pop().retry(0)  # so that the publishing connection exists
            await consumer.receive(1, timeout=10)
            await asyncio.to_thread(own_rabbitmq.raise_alarm)
            try:
                sending = asyncio.create_task(producer.send(b"held"))
                retrying = asyncio.create_task(deliveries.pop().retry(0))
                async with asyncio.timeout(10):
                    for delivery in deliveries:
                        await delivery.ack()
                await asyncio.sleep(0.5)
                assert not sending.done()
                assert not retrying.done()
            finally:
                await asyncio.to_thread(own_rabbitmq.clear_alarm)
            async with asyncio.timeout(30):
                await sending
                await retrying
        async with QueueAdmin(url=url) as admin:

            async def left() -> bool:
                return (await admin.stats("orders")).ready == 3

            await wait_until(left)


async def test_closing_during_an_alarm_does_not_hang(own_rabbitmq: RabbitMQNode) -> None:
    producer = Producer("orders", url=own_rabbitmq.url)
    await producer.open()
    await producer.send(b"x")
    await asyncio.to_thread(own_rabbitmq.raise_alarm)
    try:
        sending = asyncio.create_task(producer.send_many([b"x" * 1000] * 5000))
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        await producer.close()
        assert time.monotonic() - begin < 6
        await asyncio.gather(sending, return_exceptions=True)
        assert isinstance(sending.exception(), StreamToolsError)
    finally:
        await asyncio.to_thread(own_rabbitmq.clear_alarm)


async def test_a_frozen_broker_does_not_hang_a_close(own_rabbitmq: RabbitMQNode) -> None:
    consumer = Consumer("orders", url=own_rabbitmq.url)
    await consumer.open()
    own_rabbitmq.freeze()
    try:
        begin = time.monotonic()
        await consumer.close()
        assert time.monotonic() - begin < 6
    finally:
        own_rabbitmq.thaw()


@pytest.mark.slow
async def test_an_outage_of_30_seconds_costs_no_cpu(own_rabbitmq: RabbitMQNode) -> None:
    async with Traffic(own_rabbitmq.url, pause=0.01) as traffic:
        await asyncio.sleep(1.5)
        await traffic.grows(100)
        await asyncio.to_thread(own_rabbitmq.kill)
        try:
            await asyncio.sleep(2)
            cpu, begin = time.process_time(), time.monotonic()
            await asyncio.sleep(30)
            share = (time.process_time() - cpu) / (time.monotonic() - begin)
        finally:
            await asyncio.to_thread(own_rabbitmq.start)
        await traffic.grows(100)
        await traffic.finish()

    assert share < 0.05


async def test_failing_messages_reach_the_error_queue_after_their_retries(rabbitmq_vhost: RabbitMQAddress) -> None:
    runs: Counter[int] = Counter()
    consumer = Consumer("orders", url=rabbitmq_vhost.url, concurrency=8, retry=Retry(retries=2, delay=0.1, jitter=0))

    @consumer()
    async def handle(message: int) -> None:
        runs[message] += 1
        if message % 10 == 0:
            raise ValueError("ten")

    running = asyncio.create_task(handle())
    async with Producer("orders", url=rabbitmq_vhost.url) as producer:
        await producer.send_many(range(500))
    async with QueueAdmin(url=rabbitmq_vhost.url) as admin:

        async def failed() -> bool:
            return len(runs) == 500 and (await admin.stats("error")).ready == 50

        await wait_until(failed)
        message = (await admin.peek("error", 1))[0]
    consumer.stop()
    await running

    assert runs == Counter({n: 3 if n % 10 == 0 else 1 for n in range(500)})
    assert message.error is not None
    assert (message.error.queue, message.error.attempts, message.error.exception) == ("orders", 3, "ValueError")
