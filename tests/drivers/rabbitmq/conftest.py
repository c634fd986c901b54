"""Shared by the RabbitMQ driver's tests: an empty virtual host, and a client that is not ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel

from streamtools.delivery import Delivery
from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
from tests.brokers.address import RabbitMQAddress


@pytest.fixture
def url(rabbitmq_vhost: RabbitMQAddress) -> str:
    """The shared broker, in an empty virtual host."""
    return rabbitmq_vhost.url


@pytest.fixture
async def foreign(url: str) -> AsyncIterator[AbstractChannel]:
    """A channel of another client, for what a foreign service would do."""
    connection = await aiormq.connect(url)
    yield await connection.channel()
    await connection.close()


@pytest.fixture
async def producer(url: str) -> AsyncIterator[Callable[..., Any]]:
    """Opens producers and closes them at the end."""
    opened: list[RabbitMQProducer] = []

    async def make(queue: str = "orders", **options: Any) -> RabbitMQProducer:
        made = RabbitMQProducer(queue, **{"url": url, **options})
        opened.append(made)
        await made.open()
        return made

    yield make
    for one in opened:
        await one.close()


@pytest.fixture
async def consumer(url: str) -> AsyncIterator[Callable[..., Any]]:
    """Opens consumers and closes them at the end."""
    opened: list[RabbitMQConsumer] = []

    async def make(queue: str = "orders", **options: Any) -> RabbitMQConsumer:
        made = RabbitMQConsumer(queue, **{"url": url, **options})
        opened.append(made)
        await made.open()
        return made

    yield make
    for one in opened:
        await one.close()


async def take(consumer: RabbitMQConsumer, number: int, *, timeout: float = 20) -> list[Delivery]:
    """Receive exactly so many."""
    taken: list[Delivery] = []
    while len(taken) < number:
        batch = await consumer.receive(number - len(taken), timeout=timeout)
        assert batch, f"{len(taken)} of {number} came within {timeout} s"
        taken += batch
    return taken
