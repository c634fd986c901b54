"""Shared by the tests of the bus: an address on each protocol that has exchanges, buses, and what failed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from streamtools import ADMINS, Bus, Consumer, Delivery, Message, Retry
from streamtools.drivers.kafka.brokers.cluster import Cluster
from streamtools.producer import PRODUCERS
from streamtools.settings import KafkaSettings
from streamtools.testing.waiting import eventually
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.node import KafkaNode

ROOT = Path(__file__).parents[2]
#: A policy that is soon done: two retries.
SOON = Retry(retries=2, delay=0.01, backoff=1, jitter=0)
#: Seconds until SQLite gives on what a killed process had in hand.
LEASE = 3
#: None.
NO_RETRY = Retry(retries=0)

MakeBus = Callable[..., Bus]
Running = Callable[..., Awaitable[None]]


#: One process runs all of them: they share a node, which each empties.
KAFKA = pytest.param("kafka", marks=(pytest.mark.kafka, pytest.mark.xdist_group("bus_on_kafka")))


@pytest.fixture(params=["asyncio", "sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq), KAFKA])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Empty, and the test's own."""
    if request.param == "kafka":
        node: KafkaNode = request.getfixturevalue("own_kafka")
        asyncio.run(emptied(KafkaSettings.from_url(node.address.url)))
        return node.address.url
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/bus.db?lease={LEASE}"
    if request.param == "rabbitmq":
        address: RabbitMQAddress = request.getfixturevalue("rabbitmq_vhost")
        return address.url
    return "asyncio://"


async def emptied(settings: KafkaSettings) -> None:
    """Delete every topic, and with them what groups have read of them."""
    cluster = Cluster(settings, "tests")
    await cluster.open()
    try:
        names = [name for name, topic in (await cluster.topics()).items() if not topic.internal]
        for name in names:
            await cluster.delete_topic(name)

        async def gone() -> bool:
            return not await cluster.topics(names)

        await eventually(gone)
    finally:
        await cluster.stop()


@pytest.fixture
async def make(url: str) -> AsyncIterator[MakeBus]:
    """Makes buses, which are stopped at the end."""
    made: list[Bus] = []

    def make(queue: str | None = "orders", **options: Any) -> Bus:
        made.append(Bus(queue, **{"url": url, "retry": NO_RETRY, **options}))
        return made[-1]

    yield make
    for bus in made:
        await bus.stop()


@pytest.fixture
async def waiting(url: str) -> AsyncIterator[Callable[[str, int], Awaitable[list[Message]]]]:
    """Takes exactly so many messages out of a queue."""
    async with AsyncExitStack() as stack:

        async def take(queue: str, number: int) -> list[Message]:
            consumer = Consumer(queue, url=url)
            await stack.enter_async_context(consumer)
            taken: list[Delivery] = []
            while len(taken) < number:
                batch = await consumer.receive(number - len(taken), timeout=20)
                assert batch, f"{len(taken)} of {number} came into {queue!r}"
                taken += batch
            for delivery in taken:
                await delivery.ack()
            await consumer.close()
            return [delivery.message for delivery in taken]

        yield take


@pytest.fixture
def failed(waiting: Callable[[str, int], Awaitable[list[Message]]]) -> Callable[[int], Awaitable[list[Message]]]:
    """Takes exactly so many messages out of the error queue."""
    return lambda number=1: waiting("error", number)


@pytest.fixture
def depth(url: str) -> Callable[[str], Awaitable[int]]:
    """How many messages wait in a queue."""

    async def ready(queue: str) -> int:
        async with ADMINS[PRODUCERS.protocol(url)](url=url) as admin:
            return (await admin.stats(queue)).ready

    return ready


@pytest.fixture
def nothing_waits(depth: Callable[[str], Awaitable[int]]) -> Callable[[str], Awaitable[None]]:
    """A queue is empty, or soon is."""

    async def empty(queue: str) -> None:
        async def is_empty() -> bool:
            return await depth(queue) == 0

        await eventually(is_empty, f"{queue!r} is empty")

    return empty


@pytest.fixture
async def process(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """StartOffsets processes that serve a queue, on the test's address or another; returns once they do."""
    started: list[subprocess.Popen[bytes]] = []

    async def start(url: str | None = None, *words: str) -> subprocess.Popen[bytes]:
        line = ["-m", "tests.bus.service", url or request.getfixturevalue("url"), "orders", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen([sys.executable, *line], stdout=subprocess.PIPE, cwd=ROOT, env=environment)
        started.append(child)
        assert child.stdout is not None
        assert await asyncio.to_thread(child.stdout.readline) == b"ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
