"""Messages that Kafka has deleted before they were read are named in the log."""

from __future__ import annotations

import logging

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from streamtools.drivers.kafka.fetched import Fetched
from streamtools.drivers.kafka.offsets import Offsets, encode
from streamtools.drivers.kafka.track import Track
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, Running, Tool

PLACE = TopicPartition("orders", 3)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "deleted messages" in r.getMessage()]


async def delete_before(kafka: KafkaAddress, queue: str, offset: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(queue, 0): RecordsToDelete(before_offset=offset)})
    finally:
        await admin.close()


@pytest.mark.real_kafka("deleting records")
@pytest.mark.parametrize("before", [4, 6])
async def test_what_was_deleted_while_the_service_was_away_is_told_once(
    kafka: KafkaAddress,
    producer: MakeProducer,
    running: Running,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    before: int,
) -> None:
    """With messages left behind them, and with none."""
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    sender = await producer(partitions=1)
    async with running(handle):
        await sender.send_many([0, 1])
        await eventually(lambda: len(seen) == 2)
    await sender.send_many([2, 3, 4, 5])
    await delete_before(kafka, queue, before)
    async with running(handle):
        await eventually(lambda: bool(told(caplog)))
        await sender.send(6)
        await eventually(lambda: 6 in seen)
    assert seen == [0, 1, *range(before, 7)]
    [line] = told(caplog)
    assert f"topic '{queue}', partition 0, from offset 2 to {before - 1}." in line and f"at {before}." in line


def test_what_others_had_finished_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    ahead, _ = encode(5, [(5, 10)])
    track = Track(PLACE, Offsets(5, ahead))
    track.arrive(Fetched(iter(()), 20, 1, start=10))
    assert told(caplog) == []
    track.arrive(Fetched(iter(()), 30, 1, start=20))
    assert told(caplog) == []
    with caplog.at_level(logging.WARNING):
        track.arrive(Fetched(iter(()), 50, 1, start=40))
    [line] = told(caplog)
    assert "topic 'orders', partition 3, from offset 30 to 39." in line


@pytest.mark.real_kafka("deleting topics")
async def test_a_topic_that_comes_back_with_fewer_partitions_is_told(
    kafka: KafkaAddress,
    producer: MakeProducer,
    running: Running,
    tool: Tool,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamtools.drivers.kafka.client.METADATA_AGE", 0.5)
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    await producer(partitions=4)
    async with running(handle):
        await tool("kafka-topics", "--delete", "--topic", queue)
        await eventually(lambda: any("was deleted while it was read" in r.getMessage() for r in caplog.records))
        await (await producer(partitions=1)).send(1)
        await eventually(lambda: seen == [1])
    [line] = [r.getMessage() for r in caplog.records if "made anew while it was read" in r.getMessage()]
    assert repr(queue) in line and "instead of 4" in line and f"alter {queue} --partitions 4" in line
