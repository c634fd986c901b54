"""Two connections for a process: one receives, one sends. What happens to one channel is no matter to the others."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from streamtools import Bus, Command, ConsumerFactory, ConsumerRunner, Event, Retry
from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.amqp import connection, frames
from tests.brokers.address import RabbitMQAddress
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until

#: Routes and producers of a large service.
ROUTES, PRODUCERS = 300, 50


class Placed(Event, name="connections.Placed"):
    """Something to publish."""

    id: int


class Place(Command, name="connections.Place"):
    """Something to defer, and to ask for."""

    id: int


def _connections(address: RabbitMQAddress) -> list[str]:
    """The names of the connections to this virtual host, as the broker tells them."""
    rows = address.manage("GET", f"vhosts/{address.url.rpartition('/')[2]}/connections")
    return sorted(row["client_properties"].get("connection_name", "") for row in rows)


async def _has(address: RabbitMQAddress, number: int) -> None:
    async def as_many() -> bool:
        return len(await asyncio.to_thread(_connections, address)) == number

    await wait_until(as_many)


def _kill(consumer: RabbitMQConsumer) -> bool:
    """End a consumer's channel by an acknowledgement that makes no sense (406); False while it has none."""
    subscription = consumer._subscription
    if subscription is None or subscription.channel.error is not None:
        return False
    channel = subscription.channel
    channel.connection.write(frames.ack_frame(channel.number, 1 << 40, multiple=False))
    return True


async def test_many_routes_and_producers_have_two_connections(rabbitmq_vhost: RabbitMQAddress) -> None:
    consumers = ConsumerFactory(
        "rabbitmq",
        url=rabbitmq_vhost.url,
        arguments={"x-queue-type": "classic"},
        retry=Retry(retries=1, delay=0),
        client_id="shop",
    )
    handled: list[str] = []
    names = [f"orders.{number}" for number in range(ROUTES)]
    for name in names:

        @consumers.route(name)
        async def handle(message: str) -> None:
            handled.append(message)
            if handled.count(message) == 1:
                raise ValueError("once more")  # a copy is sent

    runner = ConsumerRunner(consumers)
    running = asyncio.create_task(runner.serve())
    async with AsyncExitStack() as stack:
        producers = [
            await stack.enter_async_context(RabbitMQProducer(name, url=rabbitmq_vhost.url, queue_type="classic"))
            for name in names[:PRODUCERS]
        ]
        await stack.enter_async_context(RabbitMQAdmin(url=rabbitmq_vhost.url))
        await asyncio.gather(*(producer.send(producer.queue) for producer in producers))
        await wait_until(lambda: len(handled) == 2 * PRODUCERS)
        await _has(rabbitmq_vhost, 2)
        assert all(name.endswith(("(receiving)", "(sending)")) for name in _connections(rabbitmq_vhost))
    runner.stop()
    await running
    await _has(rabbitmq_vhost, 0)


async def test_a_bus_a_request_and_a_deferred_message_need_no_further_connection(
    rabbitmq_vhost: RabbitMQAddress,
) -> None:
    url, seen = rabbitmq_vhost.url, list[int]()
    async with Bus("shop", url=url) as bus, Bus("store", url=url) as store:

        @store.handler
        async def note(event: Placed) -> int:
            seen.append(event.id)
            return event.id

        @store.handler
        async def place(command: Place) -> int:
            seen.append(command.id)
            return command.id

        await store.start()
        await store.subscribe(Placed)
        await bus.start()
        await bus.publish(Placed(id=1))
        await bus.defer(Place(id=2), delay=0.1, to="store")
        assert await bus.request(Place(id=3), to="store", timeout=20) == 3
        await wait_until(lambda: sorted(seen) == [1, 2, 3])
        await _has(rabbitmq_vhost, 2)


async def test_a_connection_is_called_as_its_first_user_and_a_consumer_as_itself(
    rabbitmq_vhost: RabbitMQAddress,
) -> None:
    url = rabbitmq_vhost.url
    async with (
        RabbitMQConsumer("orders", url=url, client_id="shop-7"),
        RabbitMQConsumer("orders", url=url, client_id="shop-8"),
    ):
        await _has(rabbitmq_vhost, 1)
        assert _connections(rabbitmq_vhost) == ["shop-7 (receiving)"]

        def tags() -> set[str]:
            rows = rabbitmq_vhost.manage("GET", f"consumers/{url.rpartition('/')[2]}")
            return {row["consumer_tag"].rpartition("-")[0] for row in rows}

        async def named() -> bool:
            return await asyncio.to_thread(tags) == {"shop-7", "shop-8"}

        await wait_until(named)


async def test_a_channel_that_ends_again_and_again_costs_the_others_nothing(rabbitmq_vhost: RabbitMQAddress) -> None:
    url, times = rabbitmq_vhost.url, list[float]()
    numbers: list[int] = []
    other, victim = RabbitMQConsumer("others", url=url), RabbitMQConsumer("victims", url=url, max_deliveries=1000)

    @other()
    async def take(message: int) -> None:
        times.append(time.monotonic())
        numbers.append(message)

    seen: set[int] = set()

    @victim()
    async def suffer(message: int) -> None:
        seen.add(message)

    running = [asyncio.create_task(take()), asyncio.create_task(suffer())]
    async with RabbitMQProducer("others", url=url) as calm, RabbitMQProducer("victims", url=url) as producer:
        sent, ending = 0, asyncio.Event()

        async def load() -> None:
            nonlocal sent
            while not ending.is_set():
                await asyncio.gather(calm.send(sent), producer.send(sent))
                sent += 1

        sending = asyncio.create_task(load())
        await wait_until(lambda: len(numbers) > 100 and len(seen) > 10)
        for number in range(100):
            await wait_until(lambda: _kill(victim))
            await wait_until(lambda: victim._opened > number + 1)  # noqa: B023
        ending.set()
        await sending
        await wait_until(lambda: len(numbers) >= sent and len(seen) == sent)
    assert numbers == list(range(sent))  # each once, in order
    assert other._opened == 1
    assert max(later - sooner for sooner, later in zip(times, times[1:], strict=False)) < 10
    for consumer in (other, victim):
        consumer.stop()
    await asyncio.gather(*running)


async def test_a_producers_channel_that_ends_is_opened_anew(rabbitmq_vhost: RabbitMQAddress) -> None:
    url = rabbitmq_vhost.url
    async with RabbitMQProducer("orders", url=url) as one, RabbitMQProducer("orders", url=url) as other:
        before: Any = other._publisher
        for _ in range(20):
            await one.send(b"x")  # opens the channel
            publisher = one._publisher._channel  # type: ignore[union-attr]
            assert publisher is not None
            one._lease.connection.write(frames.ack_frame(publisher.number, 1 << 40, multiple=False))  # type: ignore[union-attr]
            await asyncio.gather(one.send(b"x"), other.send(b"x"))
        assert one._opened == other._opened == 1
        assert other._publisher is before


async def test_a_connection_that_was_lost_is_made_again_once_for_all(rabbitmq_vhost: RabbitMQAddress) -> None:
    host, _, port = rabbitmq_vhost.url.split("@")[1].split("/")[0].partition(":")
    handled: set[int] = set()
    async with Proxy(host, int(port)) as proxy:
        url = rabbitmq_vhost.url.replace(f":{port}/", f":{proxy.port}/")
        consumers = [RabbitMQConsumer("orders", url=url, queue_type="classic") for _ in range(20)]

        async def take(message: int) -> None:
            handled.add(message)

        running = [asyncio.create_task(consumer()(take)()) for consumer in consumers]
        async with RabbitMQProducer("orders", url=url, queue_type="classic") as producer:
            await wait_until(lambda: all(consumer.connected for consumer in consumers))
            await producer.send(1)
            before = proxy.accepted
            await proxy.reset()
            await producer.send(2)
            await wait_until(lambda: all(consumer._opened == 2 for consumer in consumers))
            await wait_until(lambda: handled == {1, 2})
            assert proxy.accepted == before + 2
        for consumer in consumers:
            consumer.stop()
        await asyncio.gather(*running)


async def test_a_further_connection_is_opened_when_one_has_no_channels_left(
    rabbitmq_vhost: RabbitMQAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = connection.Connection.connect

    async def connect_to_a_small_broker(self: connection.Connection, *arguments: Any) -> None:
        await connect(self, *arguments)
        self.channels.channel_max = 16

    monkeypatch.setattr(connection.Connection, "connect", connect_to_a_small_broker)
    url = rabbitmq_vhost.url
    async with AsyncExitStack() as stack:
        for number in range(30):
            consumer = RabbitMQConsumer(f"orders.{number}", url=url, queue_type="classic")
            await stack.enter_async_context(consumer)
        await _has(rabbitmq_vhost, 3)
    await _has(rabbitmq_vhost, 0)


async def test_who_is_cancelled_while_closing_leaves_no_message_held(rabbitmq_vhost: RabbitMQAddress) -> None:
    url = rabbitmq_vhost.url
    async with RabbitMQProducer("orders", url=url) as producer, RabbitMQConsumer("other", url=url):
        await producer.send(b"x")
        for turns in range(1, 20):  # RabbitMQ 4 gives up on what is given back more than 20 times
            consumer = RabbitMQConsumer("orders", url=url)
            assert await consumer.receive(1, timeout=20)
            closing = asyncio.create_task(consumer.close())
            for _ in range(turns):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
        async with RabbitMQConsumer("orders", url=url) as last:
            (delivery,) = await last.receive(1, timeout=20)
            await delivery.ack()
