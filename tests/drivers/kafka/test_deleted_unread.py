"""Messages that Kafka has deleted before they were read are named in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from streamtools.drivers.kafka.client.coordinator import Coordinator, GroupPlace
from streamtools.drivers.kafka.client.fetched import Fetched
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.offsets import Offsets, encode
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, Running

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
    partition = AssignedPartition(PLACE, Offsets(5, ahead))
    partition.arrive(Fetched(iter(()), 20, 1, start=10))
    assert told(caplog) == []
    partition.arrive(Fetched(iter(()), 30, 1, start=20))
    assert told(caplog) == []
    with caplog.at_level(logging.WARNING):
        partition.arrive(Fetched(iter(()), 50, 1, start=40))
    [line] = told(caplog)
    assert "topic 'orders', partition 3, from offset 30 to 39." in line


@pytest.mark.real_kafka("deleting topics")
@pytest.mark.parametrize("exactly_once", [False, True])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_topic_that_comes_back_with_fewer_partitions_is_told_once_and_read_from_its_first_message(
    kafka: KafkaAddress,
    producer: MakeProducer,
    running: Running,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    at_once: bool,
    exactly_once: bool,
) -> None:
    """Made anew at once, it may never be seen to be away, and it has more messages than the old one was read of."""
    seen: list[str] = []

    async def handle(msg: str) -> None:
        seen.append(msg)

    old, new = [f"old {number}" for number in range(40)], [f"new {number}" for number in range(200)]
    await (await producer(partitions=4)).send_many(old)
    async with running(handle, exactly_once=exactly_once), topics(kafka) as admin:
        await eventually(lambda: all_is_committed(admin, queue, len(old)))
        await admin.delete_topics([queue])
        if not at_once:
            await eventually(lambda: was_told("was deleted while it was read", caplog))

        async def is_made() -> bool:  # refused while the old one is on its way out
            return (await admin.create_topics([NewTopic(queue, 2, 1)])).topic_errors[0][1] == 0

        await eventually(is_made)
        await eventually(lambda: has_partitions(admin, queue, 2))
        await (await producer()).send_many(new)
        await eventually(lambda: set(new) <= set(seen))
    [line] = was_told("made anew while it was read", caplog)
    assert repr(queue) in line and "instead of 4" in line and f"alter {queue} --partitions 4" in line
    assert len(was_told("was deleted while it was read", caplog)) <= 1


def was_told(text: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if text in r.getMessage()]


@asynccontextmanager
async def topics(kafka: KafkaAddress) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def all_is_committed(admin: AIOKafkaAdminClient, queue: str, number: int) -> bool:
    found = await admin.list_consumer_group_offsets(queue)
    return sum(commit.offset for place, commit in found.items() if place.topic == queue) >= number


async def has_partitions(admin: AIOKafkaAdminClient, queue: str, number: int) -> bool:
    [found] = await admin.describe_topics([queue])
    return len(found["partitions"]) == number


async def test_what_was_finished_of_a_deleted_topic_is_not_committed_for_the_next_one_of_that_name() -> None:
    """A commit is tried again while a topic is not known where it is committed, unless it is not known here."""
    there, tries = {PLACE.topic: {3}}, []
    place = GroupPlace(1, "me")

    async def refuse(*_: object) -> None:
        tries.append(1)
        if len(tries) == 3:
            there.clear()
        raise kafka_errors.UnknownTopicOrPartitionError

    async def known() -> None:
        pass

    inner = SimpleNamespace(
        generation=1, member_id="me", _commit_lock=asyncio.Lock(), _send_req=None, _do_commit_offsets=refuse,
        ensure_coordinator_known=known,
        _client=SimpleNamespace(cluster=SimpleNamespace(partitions_for_topic=there.get)),
    )  # fmt: skip
    coordinator = Coordinator(
        SimpleNamespace(_coordinator=inner),
        static_id=None,
        session_timeout=10,
        fenced=lambda: None,
        doubted=lambda _: None,
    )
    with pytest.raises(kafka_errors.UnknownTopicOrPartitionError):
        await coordinator.commit({PLACE: OffsetAndMetadata(7, "")}, place)
    assert len(tries) == 3
