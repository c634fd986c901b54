"""Queues: what is declared, what is accepted as it is, and which difference is an error."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity

from streamtools import Bus, ConsumerFactory, ConsumerRunner, Exchange, Producer
from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQConsumer, RabbitMQProducer
from streamtools.errors import ConfigurationError, ConnectError, QueueError, SendError
from streamtools.message import Message
from tests.brokers.address import RabbitMQAddress
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


def _queues(address: RabbitMQAddress) -> dict[str, dict[str, Any]]:
    rows = address.manage("GET", f"queues/{address.url.rpartition('/')[2]}")
    return {row["name"]: row for row in rows}


async def test_queues_are_durable_quorum_queues_that_dead_letter_safely(
    consumer: Any, rabbitmq_vhost: RabbitMQAddress
) -> None:
    await consumer()

    queues = _queues(rabbitmq_vhost)
    assert queues["orders"]["durable"]
    assert queues["orders"]["arguments"] == {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "error",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    assert queues["error"]["type"] == "quorum"


async def test_producer_and_consumer_declare_the_same_in_either_order(producer: Any, consumer: Any) -> None:
    await producer("one")
    await consumer("one", queue_type="quorum", durable=True)
    await consumer("two")
    await producer("two", queue_type="quorum")


async def test_a_producer_that_asks_for_nothing_takes_an_existing_queue_as_it_is(
    foreign: AbstractChannel, producer: Any
) -> None:
    await foreign.queue_declare("orders", durable=False, arguments={"x-max-length": 5})

    sender = await producer()

    await sender.send(b"x")


async def test_a_consumer_that_asks_for_nothing_takes_an_existing_queue_as_it_is(
    foreign: AbstractChannel, consumer: Any
) -> None:
    await foreign.queue_declare("orders", durable=True)
    await foreign.queue_declare("error", durable=True)

    await consumer()


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_services_that_declare_one_queue_in_the_same_moment_all_have_it(url: str, queue_type: str) -> None:
    """RabbitMQ refuses some of them: the queue is being made (404), or its own process crashed over it (541)."""
    for number in range(3):
        services = [  # each with a connection of its own, as another process has: the address is another one
            RabbitMQConsumer(f"orders.{number}", url=f"{url}?heartbeat={60 + n}", queue_type=queue_type)
            for n in range(10)
        ]
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(stack.enter_async_context(service) for service in services))
            assert all(service.connected for service in services)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"queue_type": "quorum"}, "x-queue-type"),
        ({"durable": False}, "durable"),
        ({"arguments": {"x-max-length": 9}}, "x-max-length"),
    ],
)
@pytest.mark.parametrize("kind", [RabbitMQConsumer, RabbitMQProducer])
async def test_a_difference_from_what_is_asked_names_it_and_the_ways_out(
    foreign: AbstractChannel, url: str, kind: Any, asked: dict[str, Any], named: str
) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-max-length": 5, "x-message-ttl": 60_000})

    with pytest.raises(QueueError, match=f"(?s){named}.*Three ways out"):
        async with kind("orders", url=url, **asked):
            pass


async def test_a_difference_that_was_not_asked_about_is_accepted(foreign: AbstractChannel, consumer: Any) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-max-length": 5, "x-message-ttl": 60_000})

    await consumer(queue_type="classic", arguments={"x-max-length": 5})


@pytest.mark.parametrize("kind", [RabbitMQConsumer, RabbitMQProducer])
async def test_a_missing_queue_is_an_error_when_it_is_only_checked(url: str, kind: Any) -> None:
    with pytest.raises(QueueError, match="no queue 'orders'"):
        async with kind("orders", url=url, declare="passive"):
            pass


async def test_a_missing_queue_is_an_error_to_a_consumer_that_declares_nothing(url: str) -> None:
    with pytest.raises(QueueError, match="no queue 'orders'"):
        async with RabbitMQConsumer("orders", url=url, declare=False):
            pass


async def test_the_error_queue_has_options_of_its_own(consumer: Any, rabbitmq_vhost: RabbitMQAddress) -> None:
    await consumer(error_queue="{queue}.error", error_arguments={"x-max-length": 100})

    queues = _queues(rabbitmq_vhost)
    assert queues["orders.error"]["arguments"]["x-max-length"] == 100
    assert queues["orders"]["arguments"]["x-dead-letter-routing-key"] == "orders.error"


async def test_a_queue_is_made_with_the_error_queue_of_its_consumers_to_be(
    url: str, rabbitmq_vhost: RabbitMQAddress
) -> None:
    async with RabbitMQProducer("orders", url=url, error_queue="{queue}.error"):
        pass
    async with RabbitMQAdmin(url=url) as admin:
        await admin.create("invoices", error_queue="invoices.error")
    bus = Bus("payments", url=url, error_queue="payments.error")
    await bus.declare()
    await bus.close()

    queues = _queues(rabbitmq_vhost)
    for name in ("orders", "invoices", "payments"):
        assert queues[name]["arguments"]["x-dead-letter-routing-key"] == f"{name}.error"
        assert f"{name}.error" in queues
    assert "error" not in queues


def test_a_template_of_an_error_queue_knows_the_queue_alone(url: str) -> None:
    with pytest.raises(ConfigurationError, match="only {queue} in it is replaced"):
        RabbitMQProducer("orders", url=url, error_queue="{name}.error")


async def test_the_error_queue_can_be_left_undeclared(consumer: Any, foreign: AbstractChannel) -> None:
    await consumer(error_declare=False)

    with pytest.raises(ChannelNotFoundEntity):
        await foreign.queue_declare("error", passive=True)


async def test_a_queue_that_ends_with_its_consumer_is_classic(consumer: Any, rabbitmq_vhost: RabbitMQAddress) -> None:
    await consumer(exclusive=True, auto_delete=True, durable=False)

    row = _queues(rabbitmq_vhost)["orders"]
    assert row["type"] == "classic"
    assert row["exclusive"]
    assert row["auto_delete"]


async def test_an_exclusive_queue_of_another_connection_is_waited_for_and_named(
    foreign: AbstractChannel, url: str
) -> None:
    await foreign.queue_declare("orders", exclusive=True)

    with pytest.raises(ConnectError, match="exclusive to another connection"):
        async with RabbitMQConsumer("orders", url=url, connect_timeout=0.5):
            pass
    waiting = asyncio.create_task(RabbitMQConsumer("orders", url=url, exclusive=True).open())
    await foreign.queue_delete("orders")
    await (await waiting).close()


async def test_an_exclusive_queue_ends_with_its_consumer_though_the_connection_does_not(
    consumer: Any, producer: Any, foreign: AbstractChannel
) -> None:
    await producer("other")
    receiver = await consumer(exclusive=True)
    await consumer("another")

    await receiver.close()

    with pytest.raises(ChannelNotFoundEntity):
        await foreign.queue_declare("orders", passive=True)


@pytest.mark.parametrize(
    "options",
    [
        {"queue_type": "quorum", "exclusive": True},
        {"queue_type": "stream"},
        {"error_declare": "passiv"},
        {"arguments": {"x-delivery-limit": 5}},
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RabbitMQConsumer("orders", url="amqp://localhost", **options)


@pytest.mark.parametrize("name", ["amq.orders", "größe", "a*"])
def test_names_that_cannot_be_used_are_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigurationError, match="queue name"):
        RabbitMQProducer(name, url="amqp://localhost")


async def test_consuming_the_error_queue_itself_works(producer: Any, consumer: Any) -> None:
    receiver = await consumer("error")
    sender = await producer("error")

    await sender.send(b"x")

    assert await take(receiver, 1)


@pytest.mark.parametrize("options", [{}, {"declare": False}, {"auto_delete": True}])
async def test_a_producer_that_would_make_the_queue_of_a_consumer_otherwise(
    url: str, options: dict[str, Any]
) -> None:
    handled: list[int] = []
    consumers = ConsumerFactory("rabbitmq", url=url)

    @consumers.route("orders", auto_delete=True)
    async def handle(message: int) -> None:
        handled.append(message)

    producer = Producer("orders", url=url, **options)
    runner = ConsumerRunner(consumers, producer)
    running = asyncio.create_task(runner.serve())
    if not options:
        with pytest.raises(QueueError, match=r"producer of yours .* Producer\('orders', declare=False\), or give"):
            await running
        return
    await runner.ready()
    await producer.send(1)
    await wait_until(lambda: handled == [1])
    runner.stop()
    await running


@pytest.mark.parametrize("declare", [False, "passive"])
async def test_a_missing_exchange_is_not_made_by_who_declares_nothing(
    url: str, rabbitmq_vhost: RabbitMQAddress, declare: Any
) -> None:
    async with Bus(None, url=url, declare=declare) as bus:
        with pytest.raises(SendError, match="no exchange 'shop'"):
            await bus.publish({"id": 1}, "a.b", exchange=Exchange("shop"))
    async with RabbitMQProducer("orders", url=url, declare=False) as producer:
        with pytest.raises(SendError, match="no exchange 'shop'"):
            await producer.send_messages([Message(body=b"", queue="a.b", id="1", exchange=Exchange("shop"))])
    rows = rabbitmq_vhost.manage("GET", f"exchanges/{rabbitmq_vhost.url.rpartition('/')[2]}")
    assert "shop" not in {row["name"] for row in rows}


async def test_a_bus_that_only_sends_makes_the_exchange_that_it_publishes_to(
    url: str, foreign: AbstractChannel
) -> None:
    async with Bus(None, url=url) as bus:
        with suppress(SendError):  # nobody subscribes
            await bus.publish({"id": 1}, "a.b", exchange=Exchange("shop"))
    await foreign.exchange_declare("shop", passive=True)
