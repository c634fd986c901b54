"""What `peek`, `move` and `discard` do with what waits for a group, and a redrive with what one has rejected."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition, errors

from streamtools import Message, QueueAdmin, QueueError, Retry
from streamtools.delivery import Settlement
from streamtools.drivers.kafka import KafkaAdmin
from streamtools.drivers.kafka.operating.admin_reader import AdminReader
from streamtools.testing import eventually
from streamtools.verdicts import ACK
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.tools import kafka_tool
from tests.drivers.kafka.conftest import MakeProducer, Running, member, records, shown

pytestmark = pytest.mark.real_kafka("what its admin and its own tools say")


async def test_peek_works_beside_a_group_at_work_and_shows_what_it_has_still_to_do(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(10)
    async with member(kafka, queue, queue) as consumer:
        await consumer.getmany(timeout_ms=10_000)
        await consumer.commit({TopicPartition(queue, 0): 4})
        assert [message.body for message in await admin.peek(queue, 3)] == [b"4", b"5", b"6"]
        assert len(consumer.assignment()) == 1


async def test_moved_messages_are_done_and_the_others_wait_in_their_places(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(10)
    await admin.create(f"{queue}-2")
    assert await admin.move(queue, f"{queue}-2", where=lambda m: int(m.body) % 2 == 0) == 5
    assert [record.value for record in await records(kafka, f"{queue}-2")] == [b"0", b"2", b"4", b"6", b"8"]
    assert [m.body for m in await admin.peek(queue)] == [b"1", b"3", b"5", b"7", b"9"]
    assert (await admin.stats(queue)).ready == 5
    [group] = await admin.groups(queue)
    assert (group.lag, sum(p.ahead for p in group.partitions)) == (9, 4)
    assert await admin.discard(queue) == 5
    assert await shown(kafka, queue, queue) == {0: (10, 10, 0)}


async def test_of_two_who_move_the_same_messages_the_second_is_told_and_sends_none(
    admin: KafkaAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(4)
    await admin.create(f"{queue}-2")
    first, second = (AdminReader(queue, admin._cluster, admin.settings, client_id=None) for _ in range(2))
    for reader in (first, second):
        await reader.open()
    try:
        for reader in (first, second):
            deliveries = await reader.receive(2, timeout=10)
            moves = [Settlement(each, ACK, (each.message.replace(queue=f"{queue}-2"),)) for each in deliveries]
            if reader is first:
                await reader._settle(moves)
                continue
            with pytest.raises(QueueError, match="Another redrive"):
                await reader._settle(moves)
        more = await first.receive(2, timeout=10)
        await first._settle([Settlement(each, ACK) for each in more])
    finally:
        for reader in (first, second):
            await reader.close()
    assert [record.value for record in await records(kafka, f"{queue}-2")] == [b"0", b"1"]
    assert await shown(kafka, queue, queue) == {0: (4, 4, 0)}


async def test_a_redrive_is_for_the_group_that_had_rejected_it_and_for_no_other(
    admin: QueueAdmin, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[tuple[str, str, int]] = []
    broken = True

    async def billing(msg: str, message: Message) -> None:
        seen.append(("billing", msg, message.attempt))
        if broken:
            raise ValueError("never")

    async def shipping(msg: str, message: Message) -> None:
        seen.append(("shipping", msg, message.attempt))

    retry = Retry(retries=0)
    async with (
        running(billing, group=f"{queue}-billing", retry=retry, topics=[f"{queue}-2"]),
        running(shipping, group=f"{queue}-shipping", topics=[f"{queue}-2"]),
    ):
        receipt = await (await producer(f"{queue}-2")).send("x")
        await eventually(lambda: _waits(admin, f"{queue}.error", 1))
        [message] = await admin.peek(f"{queue}.error")
        assert message.error is not None
        assert (message.error.queue, message.error.place) == (f"{queue}-2", f"partition 0, offset {receipt.offset}")
        broken = False
        assert await admin.move(f"{queue}.error", failed_in=[f"{queue}-2"]) == 1
        await eventually(lambda: seen.count(("billing", "x", 1)) == 2)
        await (await producer()).send("last")
        await eventually(lambda: {("billing", "last", 1), ("shipping", "last", 1)} <= set(seen))
    assert seen.count(("shipping", "x", 1)) == 1


@pytest.mark.parametrize("gone", ["topic", "group", "nothing"])
async def test_without_its_groups_retry_topic_or_with_a_target_a_redrive_is_for_all_who_read_the_queue(
    admin: QueueAdmin, kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, gone: str
) -> None:
    async def fails(msg: str) -> None:
        raise ValueError("never")

    async with running(fails, retry=Retry(retries=0)):
        await (await producer()).send("x")
        await eventually(lambda: _waits(admin, f"{queue}.error", 1))
    if gone == "topic":
        await admin.delete(f"{queue}.retry")
    elif gone == "group":
        arguments = ("--delete", "--group", queue)
        await asyncio.to_thread(kafka_tool, kafka.bootstrap, "kafka-consumer-groups", *arguments)
    assert await admin.move(f"{queue}.error", queue if gone == "nothing" else None) == 1
    assert [record.value for record in await records(kafka, queue)] == [b"x", b"x"]


async def _waits(admin: QueueAdmin, queue: str, number: int) -> bool:
    return (await admin.stats(queue)).ready == number


async def test_a_group_at_work_keeps_its_messages_and_none_is_sent(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(5)
    await admin.create(f"{queue}-2")
    async with member(kafka, queue, queue) as consumer:
        await consumer.getmany(timeout_ms=10_000)
        with pytest.raises(QueueError, match="has consumers"):
            await admin.move(queue, f"{queue}-2")
    assert await records(kafka, f"{queue}-2") == []
    assert (await admin.stats(queue)).ready == 5


async def test_more_gaps_than_a_commit_has_room_for_lose_and_repeat_nothing(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    number = 6000  # 3000 gaps; a commit tells some 1300
    await filled(number)
    await admin.create(f"{queue}-2")
    assert await admin.move(queue, f"{queue}-2", where=lambda m: int(m.body) % 2 == 0) == number // 2
    assert (await admin.stats(queue)).ready == number // 2
    assert await admin.move(queue, f"{queue}-2") == number // 2
    moved = [int(record.value) for record in await records(kafka, f"{queue}-2")]
    assert sorted(moved) == list(range(number))
    assert (await admin.stats(queue)).ready == 0


async def test_a_move_whose_commit_failed_is_committed_when_it_is_tried_again(
    filled: Any, kafka: KafkaAddress, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(2)
    async with KafkaAdmin(url=kafka.url) as admin:
        reader = AdminReader(queue, admin._cluster, admin.settings, client_id=None)
        await reader.open()
        try:
            [delivery] = await reader.receive(1)
            with monkeypatch.context() as patch:
                patch.setattr(reader._groups, "commit", _fails)
                with pytest.raises(QueueError):
                    await reader._settle([Settlement(delivery, ACK)])
            await reader._settle([Settlement(delivery, ACK)])
        finally:
            await reader.close()
    assert await shown(kafka, queue, queue) == {0: (1, 2, 1)}


async def _fails(*_: Any) -> None:
    raise errors.InvalidCommitOffsetSizeError


async def test_what_was_aborted_is_neither_shown_nor_waited_for(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(3)
    sender = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, transactional_id=queue)
    await sender.start()
    for end in (sender.abort_transaction, sender.commit_transaction):
        await sender.begin_transaction()
        await sender.send_and_wait(queue, end.__name__.encode())
        await end()
    await sender.stop()
    assert [message.body for message in await admin.peek(queue)] == [b"0", b"1", b"2", b"commit_transaction"]
    assert await admin.discard(queue) == 4
    assert await admin.peek(queue) == []


async def test_a_reader_leaves_what_came_after_it_was_opened(
    admin: KafkaAdmin, filled: Any, producer: MakeProducer, queue: str
) -> None:
    await filled(3)
    reader = admin._reader(queue, 10)
    assert isinstance(reader, AdminReader)
    await reader.open()
    await (await producer()).send("late")
    found = []
    while batch := await reader.receive(10, timeout=10):
        found += [delivery.message.body for delivery in batch]
    await reader.close()
    assert found == [b"0", b"1", b"2"]
