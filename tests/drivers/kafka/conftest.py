"""What the tests of the Kafka driver share."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from streamtools import QueueAdmin
from streamtools.consumer import BoundHandler
from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer, KafkaProducer
from streamtools.errors import QueueError
from streamtools.testing.waiting import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.node import KafkaNode
from tests.brokers.kafka.tools import group_rows, kafka_tool

#: Makes an open producer, closed at the end of the test.
MakeProducer = Callable[..., Any]


@pytest.fixture
def queue() -> str:
    """A name that no other test uses."""
    return f"orders-{secrets.token_hex(4)}"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def producer(kafka: KafkaAddress, queue: str, stack: AsyncExitStack) -> MakeProducer:
    async def make(name: str = queue, **options: Any) -> KafkaProducer:
        producer = KafkaProducer(name, **{"url": kafka.url, **options})
        return await stack.enter_async_context(producer)

    return make


async def records(address: KafkaAddress, topic: str, *, committed: bool = False) -> list[Any]:
    """All records of a topic, by the client library alone, partition by partition."""
    isolation = "read_committed" if committed else "read_uncommitted"
    reader = AIOKafkaConsumer(bootstrap_servers=address.bootstrap, isolation_level=isolation)
    await reader.start()
    try:
        await reader._client._wait_on_metadata(topic)
        partitions = [TopicPartition(topic, p) for p in sorted(reader.partitions_for_topic(topic))]
        reader.assign(partitions)
        await reader.seek_to_beginning(*partitions)
        ends = await reader.end_offsets(partitions)
        found: list[Any] = []
        for partition in partitions:
            while await reader.position(partition) < ends[partition]:
                for batch in (await reader.getmany(partition, timeout_ms=200)).values():
                    found += batch
        return found
    finally:
        await reader.stop()


#: Runs a handler on a consumer of the test's queue while its block lasts.
Running = Callable[..., AbstractAsyncContextManager[Any]]


@pytest.fixture
def running(kafka: KafkaAddress, queue: str) -> Running:
    @asynccontextmanager
    async def run(handler: Any, name: str = queue, *, grace: float = 20, **options: Any) -> AsyncIterator[Any]:
        consumer = KafkaConsumer(name, **{"url": kafka.url, "error_queue": "{queue}.error", **options})
        started = asyncio.Event()
        task = asyncio.create_task(consumer.run(BoundHandler(consumer, handler), on_started=started.set))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        waiting.cancel()
        if task.done():
            task.result()
        try:
            yield consumer
        finally:
            consumer.stop(grace)
            async with asyncio.timeout(60):
                await task

    return run


# --- for operators --------------------------------------------------------------------------------

#: Runs one of Kafka's own tools.
Tool = Callable[..., Awaitable[str]]


@pytest.fixture
async def admin(kafka: KafkaAddress, stack: AsyncExitStack) -> QueueAdmin:
    return await stack.enter_async_context(KafkaAdmin(url=kafka.url))


@pytest.fixture
def tool(kafka: KafkaAddress) -> Tool:
    async def run(name: str, *arguments: str) -> str:
        said = await asyncio.to_thread(kafka_tool, kafka.bootstrap, name, *arguments)
        if "--create" in arguments:
            await known(kafka, arguments[arguments.index("--topic") + 1])
        return said

    return run


async def known(address: KafkaAddress, topic: str) -> None:
    """Wait until the broker knows a topic; the tool that makes it asks the controller, which knows it first."""

    async def is_known() -> bool:
        try:
            await admin.stats(topic)
        except QueueError:
            return False
        return True

    async with KafkaAdmin(url=address.url) as admin:
        await eventually(is_known)


@pytest.fixture
def filled(admin: QueueAdmin, producer: MakeProducer, queue: str) -> Callable[..., Awaitable[None]]:
    async def fill(number: int, *, partitions: int = 1) -> None:
        """Messages b"0", b"1", ... in turns in the partitions."""
        await admin.create(queue, partitions=partitions)
        sender = await producer()
        for partition in range(partitions):
            await sender.send_many([str(n) for n in range(partition, number, partitions)], partition=partition)

    return fill


async def shown(address: KafkaAddress, group: str, topic: str) -> dict[int, Any]:
    """What kafka-consumer-groups says: partition to (committed, end, lag)."""
    return await asyncio.to_thread(group_rows, address.bootstrap, group, topic)


@asynccontextmanager
async def member(address: KafkaAddress, group: str, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    """Another program's consumer, at work in a group."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=address.bootstrap,
        group_id=group,
        client_id="other",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


@pytest.fixture(scope="session")
def strict() -> Iterator[KafkaNode]:
    """A node that allows its own tools everything, and other users what a test allows."""
    node = KafkaNode(
        config={
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "auto.create.topics.enable": "false",
        }
    )
    node.start()
    yield node
    node.close()
