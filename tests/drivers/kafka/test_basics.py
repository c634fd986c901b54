"""What a mock cluster does faithfully too: sending, headers, receiving, commit and resume, a static member."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from confluent_kafka import Producer as Confluent

from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer, KafkaProducer
from tests.brokers.kafka.address import KafkaAddress


@pytest.fixture
async def topic(kafka: KafkaAddress, queue: str) -> str:
    """A topic of the test's own; the mock cluster makes one when it is asked for."""
    if kafka.mock:
        asking = Confluent({"bootstrap.servers": kafka.bootstrap, "allow.auto.create.topics": True})
        await asyncio.to_thread(asking.list_topics, queue, 10)
    else:
        async with KafkaAdmin(url=kafka.url) as admin:
            await admin.create(queue)
    return queue


async def received(kafka: KafkaAddress, topic: str, number: int, **options: Any) -> list[Any]:
    """So many messages, acknowledged, by a consumer that is then closed."""
    found: list[Any] = []
    async with KafkaConsumer(topic, url=kafka.url, declare=False, **options) as consumer:
        while len(found) < number:
            for delivery in await consumer.receive(number - len(found), timeout=30):
                found.append(delivery.message)
                await delivery.ack()
    return found


async def test_what_is_sent_arrives_as_it_was(kafka: KafkaAddress, topic: str) -> None:
    async with KafkaProducer(topic, url=kafka.url, declare=False) as producer:
        receipt = await producer.send({"id": 1}, key="k/1", type="orders.Placed", headers={"tenant": "ä"})
    [message] = await received(kafka, topic, 1)
    assert (message.id, message.body, message.key) == (receipt.id, b'{"id":1}', "k/1")
    assert (message.type, dict(message.headers)) == ("orders.Placed", {"tenant": "ä"})


@pytest.mark.parametrize("static_id", [None, "one"])
async def test_a_group_goes_on_where_it_was(kafka: KafkaAddress, topic: str, static_id: str | None) -> None:
    async with KafkaProducer(topic, url=kafka.url, declare=False) as producer:
        await producer.send_many([b"%d" % n for n in range(100)], partition=0)
    first = await received(kafka, topic, 40, static_id=static_id)
    rest = await received(kafka, topic, 60, static_id=static_id)
    assert [message.body for message in first + rest] == [b"%d" % n for n in range(100)]


@pytest.mark.parametrize("compression", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_other_clients_have_compressed_is_read(kafka: KafkaAddress, topic: str, compression: str) -> None:
    other = Confluent({"bootstrap.servers": kafka.bootstrap, "compression.type": compression, "linger.ms": 20})
    for number in range(50):
        other.produce(topic, b"%d" % number * 100, partition=0)
    assert await asyncio.to_thread(other.flush, 30) == 0
    assert [message.body for message in await received(kafka, topic, 50)] == [b"%d" % n * 100 for n in range(50)]
