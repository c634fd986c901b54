"""A group is told where to begin once, when it is new. What is added later is read from its beginning."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from streamtools import QueueAdmin
from streamtools.drivers.kafka import KafkaConsumer
from streamtools.drivers.kafka.consuming.starts import Start, StartOffsets
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, Running, Tool, shown
from tests.faults.waiting import wait_until

TOLD = [
    pytest.param({"offset": "latest"}, id="latest"),
    pytest.param({"start_offset": 1000}, id="offset"),
    pytest.param({"start_time": time.time() + 3600}, id="time"),
]


class Seen(list[str]):
    """What a handler was given."""

    async def handle(self, msg: str) -> None:
        self.append(msg)


async def nothing(consumer: KafkaConsumer) -> None:
    assert await consumer.receive(timeout=0.5) == []


@pytest.mark.parametrize("begin", TOLD)
async def test_a_topic_of_a_pattern_that_is_made_while_the_service_is_away_is_read_from_its_first_message(
    producer: MakeProducer, running: Running, queue: str, begin: dict[str, Any]
) -> None:
    seen, options = Seen(), {"pattern": rf"{queue}-.*", **begin}
    await (await producer(f"{queue}-there")).send("old")
    async with running(seen.handle, **options):
        pass
    await (await producer(f"{queue}-later")).send_many(["first", "second"])
    await (await producer(f"{queue}-there")).send("third")
    async with running(seen.handle, **options):
        await eventually(lambda: len(seen) == 3)
    assert sorted(seen) == ["first", "second", "third"]


@pytest.mark.parametrize("begin", TOLD)
async def test_partitions_that_are_added_while_an_idle_group_is_away_are_read_from_their_beginning(
    producer: MakeProducer, running: Running, admin: QueueAdmin, queue: str, begin: dict[str, Any]
) -> None:
    seen = Seen()
    await (await producer()).send("old")
    async with running(seen.handle, **begin):
        pass
    await admin.alter(queue, partitions=3)
    sender = await producer()
    for partition in range(3):
        await sender.send(f"new {partition}", partition=partition)
    async with running(seen.handle, **begin):
        await eventually(lambda: len(seen) == 3)
    assert sorted(seen) == ["new 0", "new 1", "new 2"]


async def test_partitions_that_are_added_under_an_idle_group_are_read_from_their_beginning_by_a_member_that_joins(
    producer: MakeProducer, running: Running, admin: QueueAdmin, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtools.drivers.kafka.client.connect.METADATA_AGE", 0.5)
    seen = Seen()
    await (await producer()).send("old")
    async with running(seen.handle, offset="latest"):
        await admin.alter(queue, partitions=2)
        await (await producer()).send("new", partition=1)
        async with running(seen.handle, offset="latest"):
            await eventually(lambda: bool(seen))
    assert seen == ["new"]


async def test_a_partition_whose_commit_has_expired_is_read_from_its_beginning(
    producer: MakeProducer, running: Running, tool: Tool, queue: str
) -> None:
    seen = Seen()
    sender = await producer(partitions=2)
    async with running(seen.handle, offset="latest"):
        for partition in range(2):
            await sender.send(f"a{partition}", partition=partition)
        await eventually(lambda: len(seen) == 2)
    await tool("kafka-consumer-groups", "--group", queue, "--delete-offsets", "--topic", f"{queue}:1")
    await sender.send("b1", partition=1)
    async with running(seen.handle, offset="latest"):
        await eventually(lambda: "b1" in seen)
    assert sorted(seen) == ["a0", "a1", "a1", "b1"]


async def test_a_topic_that_is_made_anew_while_the_service_is_away_is_read_from_its_first_message(
    producer: MakeProducer, running: Running, admin: QueueAdmin, tool: Tool, queue: str
) -> None:
    seen = Seen()

    async def is_gone() -> bool:
        return queue not in [info.name for info in await admin.list()]

    await (await producer()).send("old")
    async with running(seen.handle, offset="latest"):
        pass
    await tool("kafka-topics", "--delete", "--topic", queue)
    await wait_until(is_gone)  # the broker learns of it a moment after its controller
    await admin.create(queue, partitions=2)
    await (await producer()).send_many(["new", "newer"], partition=1)
    async with running(seen.handle, offset="latest"):
        await eventually(lambda: len(seen) == 2)
    assert seen == ["new", "newer"]


async def test_a_group_that_has_committed_nothing_begins_at_the_end_and_all_of_it_at_once(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen = Seen()
    sender = await producer(partitions=3)
    for partition in range(3):
        await sender.send("old", partition=partition)
    async with running(seen.handle), running(seen.handle):  # by itself, from the beginning; and away again
        await eventually(lambda: len(seen) == 3)
    seen.clear()
    async with running(seen.handle, group=f"{queue}-late", offset="latest"):
        assert {row[0] for row in (await shown(kafka, f"{queue}-late", queue)).values()} == {1}
        await sender.send("new", partition=2)
        await eventually(lambda: bool(seen))
    assert seen == ["new"]


async def test_two_queues_of_one_group_begin_each_at_its_own_end(
    producer: MakeProducer, running: Running, queue: str
) -> None:
    seen, other = Seen(), f"{queue}-other"
    for name in (queue, other):
        await (await producer(name)).send("old")
    options = {"group": f"{queue}-both", "offset": "latest"}
    async with running(seen.handle, **options), running(seen.handle, other, **options):
        for name in (queue, other):
            await (await producer(name)).send(name)
        await eventually(lambda: len(seen) >= 2)
    assert sorted(seen) == [queue, other]


class Library:
    """In the place of the library's consumer: one topic of two partitions with ten messages each."""

    def subscription(self) -> set[str]:
        return {"orders"}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0, 1}

    async def beginning_offsets(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 10)


async def test_of_two_members_that_begin_at_once_the_one_that_commits_first_decides() -> None:
    zero, one = TopicPartition("orders", 0), TopicPartition("orders", 1)
    answers: list[Mapping[TopicPartition, Any]] = [{}, {one: OffsetAndMetadata(7, "")}]
    committed: list[Any] = []

    async def read(partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Any]:
        return answers.pop(0)

    async def commit(offsets: Mapping[TopicPartition, Any]) -> None:
        committed.append(offsets)

    starts = StartOffsets(Library(), Start(latest=True), retry_topic="orders.retry", committed=read, commit=commit)
    found = await starts.find([zero, one])
    assert {p: at.offset for p, at in found.items()} == {zero: 0, one: 7}
    assert committed == []
