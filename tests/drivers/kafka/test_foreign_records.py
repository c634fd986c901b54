"""What other programs have written, and what Kafka itself has made of it, as a real Kafka keeps it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka import Producer as Confluent

from streamtools import QueueAdmin
from streamtools.drivers.kafka import KafkaConsumer
from streamtools.message import Message
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import Tool, records, shown

pytestmark = pytest.mark.real_kafka("transactions, compaction, a place to begin")


async def received(kafka: KafkaAddress, topic: str, number: int, **options: Any) -> list[Message]:
    """So many messages, acknowledged; then nothing is left to do for the group."""
    found: list[Message] = []
    async with KafkaConsumer(topic, url=kafka.url, group="reader", **options) as consumer:
        while len(found) < number:
            batch = await consumer.receive(7, timeout=30)
            assert batch, f"{len(found)} of {number} have come"
            found += [delivery.message for delivery in batch]
            await consumer.ack_many(batch)
        async with asyncio.timeout(30):
            while any(lag for _, _, lag in (await shown(kafka, "reader", topic)).values()):
                assert not await consumer.receive(1, timeout=0.1)
    return found


def offset_of(message: Message) -> int:
    """Of one without an id of its own."""
    return int(message.id.rsplit("-", 1)[-1])


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_a_group_begins_in_the_middle_of_a_batch(
    kafka: KafkaAddress, admin: QueueAdmin, queue: str, compression: str
) -> None:
    await admin.create(queue)
    other = Confluent({"bootstrap.servers": kafka.bootstrap, "compression.type": compression, "linger.ms": 100})
    for number in range(50):
        other.produce(queue, b"%d" % number * 100, partition=0)
    assert await asyncio.to_thread(other.flush, 30) == 0
    found = await received(kafka, queue, 13, start_offset=37)
    assert [message.body for message in found] == [b"%d" % n * 100 for n in range(37, 50)]
    assert [offset_of(message) for message in found] == [*range(37, 50)]


async def test_what_was_aborted_between_what_was_committed_is_passed_over_to_the_end(
    kafka: KafkaAddress, admin: QueueAdmin, queue: str
) -> None:
    await admin.create(queue)
    one, two = [
        AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, transactional_id=f"{queue}-{n}", compression_type="gzip")
        for n in range(2)
    ]
    async with one, two:
        for turn in range(6):
            await one.begin_transaction()
            await two.begin_transaction()
            for n in range(3):
                await one.send_and_wait(queue, b"one %d" % turn + b"." * 200, partition=0)
                await two.send_and_wait(queue, b"two %d.%d" % (turn, n), partition=0)
            await (one.abort_transaction() if turn % 2 else one.commit_transaction())
            await (two.commit_transaction() if turn % 3 else two.abort_transaction())
    expected = [
        (who, turn)
        for turn in range(6)
        for _ in range(3)
        for who, seen in ((b"one", not turn % 2), (b"two", turn % 3))
        if seen
    ]
    found = await received(kafka, queue, len(expected))
    assert [(message.body[:3], int(message.body[4:5])) for message in found] == expected


async def test_records_without_value_headers_or_text_are_messages(
    kafka: KafkaAddress, admin: QueueAdmin, queue: str
) -> None:
    await admin.create(queue)
    rows: list[dict[str, Any]] = [
        {"value": None, "key": b"gone"},
        {"value": b""},
        {"value": b"x", "key": b"\xff\xfe"},
        {"value": b"x", "headers": [("nothing", None), ("bytes", b"\xff")]},
        {"value": b"x", "headers": [("ce_id", None), ("content-type", None)]},
        {"value": b"x", "headers": [("ce_id", b"\xff"), ("content-type", b"text/plain")]},
    ]
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap) as other:
        for row in rows:
            await other.send_and_wait(queue, partition=0, **row)
    tomb, empty, key, headers, nothing, odd = await received(kafka, queue, len(rows))
    assert (tomb.body, tomb.key, offset_of(tomb)) == (None, "gone", 0)
    assert (empty.body, empty.key, offset_of(empty)) == (b"", None, 1)
    assert key.key == b"\xff\xfe"
    assert dict(headers.headers) == {"nothing": "", "bytes": "\udcff"}
    assert (nothing.id, nothing.content_type) == ("", "")
    assert (odd.id, odd.content_type) == (r"\xff", "text/plain")


@pytest.mark.slow
async def test_what_compaction_has_left_is_read_and_its_holes_are_no_lag(
    kafka: KafkaAddress, tool: Tool, queue: str
) -> None:
    wanted = ["cleanup.policy=compact", "segment.ms=100", "min.cleanable.dirty.ratio=0.001"]
    options = [word for each in wanted for word in ("--config", each)]
    await tool("kafka-topics", "--create", "--topic", queue, "--partitions", "1", *options)
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, transactional_id=queue, compression_type="gzip"
    ) as other:

        async def write(keys: list[bytes]) -> None:
            async with other.transaction():
                for key in keys:
                    await other.send_and_wait(queue, key * 200, key=key, partition=0)

        await write([b"a", b"b", b"c"])
        await write([b"a", b"b", b"d"])
        async with asyncio.timeout(120):
            while (left := await records(kafka, queue, committed=True)) and left[0].offset == 0:
                await write([b"a"])  # a new segment, so that those before can be cleaned
                await asyncio.sleep(1)
    left = await records(kafka, queue, committed=True)
    found = await received(kafka, queue, len(left))
    assert [offset_of(message) for message in found] == [record.offset for record in left]
    assert [message.body for message in found] == [record.value for record in left]
