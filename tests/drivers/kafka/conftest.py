"""What the tests of the Kafka driver share."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from streamtools.drivers.kafka import KafkaProducer
from tests.brokers.kafka.address import KafkaAddress

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
