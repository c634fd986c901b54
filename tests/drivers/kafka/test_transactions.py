"""Transactions: all of it or nothing, whoever dies."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from streamtools import KafkaSettings, Reject, Retry, SendError
from streamtools.drivers.kafka import KafkaAdmin, KafkaProducer
from streamtools.drivers.kafka.brokers.topics import Topic, topics_at
from streamtools.message import Message
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.tools import group_rows
from tests.drivers.kafka.conftest import MakeProducer, Running, records
from tests.drivers.kafka.test_producer import limited

pytestmark = pytest.mark.real_kafka("transactions")


async def visible(address: KafkaAddress, topic: str) -> list[bytes]:
    """What is visible once no transaction is open: their markers are written a moment after they are confirmed."""
    await eventually(lambda: _is_quiet(address, topic))
    return await visible_now(address, topic)


async def visible_now(address: KafkaAddress, topic: str) -> list[bytes]:
    return [r.value for r in await records(address, topic, committed=True)]


async def _is_quiet(address: KafkaAddress, topic: str) -> bool:
    return await end(address, topic, committed=True) == await end(address, topic)


async def end(address: KafkaAddress, topic: str, *, committed: bool = False) -> dict[TopicPartition, int]:
    isolation = "read_committed" if committed else "read_uncommitted"
    async with AIOKafkaConsumer(topic, bootstrap_servers=address.bootstrap, isolation_level=isolation) as reader:
        ends: dict[TopicPartition, int] = await reader.end_offsets(list(reader.assignment()))
        return ends


# --- of a producer ----------------------------------------------------------------------------------


async def test_what_is_sent_in_a_transaction_is_visible_together_or_not_at_all(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    orders, stock = await producer(), await producer(f"{queue}-stock")
    async with orders.transaction():
        receipt = await orders.send("o1")
        await stock.send_many(["s1", "s2"])
        assert await visible_now(kafka, queue) == []
    assert (receipt.partition, receipt.offset) == (0, 0)
    with pytest.raises(ZeroDivisionError):
        async with orders.transaction():
            await orders.send("o2")
            await stock.send("s3")
            raise ZeroDivisionError
    await orders.send("o3")
    async with stock.transaction():
        await stock.send("s4")
    assert await visible(kafka, queue) == [b"o1", b"o3"]
    assert await visible(kafka, stock.queue) == [b"s1", b"s2", b"s4"]


async def test_transactions_at_once_do_not_mix(kafka: KafkaAddress, producer: MakeProducer, queue: str) -> None:
    sender = await producer()

    async def one(n: int) -> None:
        async with sender.transaction():
            await sender.send(f"{n}a")
            await asyncio.sleep(0.01)
            await sender.send(f"{n}b")
            if n % 2:
                raise ValueError

    await asyncio.gather(*(one(n) for n in range(6)), return_exceptions=True)
    assert sorted(await visible(kafka, queue)) == sorted(f"{n}{c}".encode() for n in (0, 2, 4) for c in "ab")


async def test_one_refused_message_undoes_the_whole_though_nobody_looks(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    small = f"{queue}-small"
    await limited(kafka, small)
    orders, tight = await producer(), await producer(small)
    with pytest.raises(SendError, match="too large") as caught:
        async with orders.transaction():
            await orders.send("o1")
            with pytest.raises(SendError):
                await tight.send(b"x" * 4000, id="big")
    assert caught.value.refused == ("big",)
    async with orders.transaction():  # the same transactional id goes on
        await orders.send("o2")
        await tight.send_many([b"x" * 500] * 20)  # too large as one batch, and not one by one
    assert await visible(kafka, queue) == [b"o2"]
    assert len(await visible(kafka, small)) == 20


# --- of a consumer ----------------------------------------------------------------------------------


async def test_a_time_that_cannot_be_written_undoes_the_whole_and_is_named(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(partitions=1)
    good = Message(body=b"good", queue=queue, id="good")
    with pytest.raises(SendError, match="expires_at=nan is no time") as caught:
        async with sender.transaction():
            await sender.send_messages([good, good.replace(id="bad", expires_at=math.nan)])
    assert caught.value.refused == ("bad",)
    await sender.send_messages([good])
    assert await visible(kafka, queue) == [b"good"]


async def test_what_a_handler_sends_leaves_with_its_acknowledgement(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    runs: Counter[int] = Counter()
    out = await producer(f"{queue}-out")

    async def handle(msg: int, message: Message) -> None:
        runs[msg] += 1
        await out.send(msg, key="k", headers={"attempt": str(message.attempt)})
        assert not [r for r in (await out.send_many([-msg])) if hasattr(r, "offset")], "collected, not sent"
        if msg == 3 and message.attempt < 3:
            raise ValueError("not yet")
        if msg == 5:
            raise Reject("never")

    await (await producer()).send_many(range(1, 11))
    async with running(handle, exactly_once=True, concurrency=4, retry=Retry(delay=0.05)):
        await eventually(lambda: _numbers(kafka, out.queue, 18))
    expected = [n for n in range(1, 11) if n != 5]
    assert sorted(int(v) for v in await visible(kafka, out.queue)) == sorted([*expected, *(-n for n in expected)])
    assert runs[3] == 3 and runs[5] == 1
    assert [r.value for r in await records(kafka, f"{queue}.error", committed=True)] == [b"5"]
    assert {dict(r.headers)["attempt"] for r in await records(kafka, out.queue) if r.value == b"3"} == {b"3"}


async def test_a_handler_whose_message_is_refused_has_failed_and_the_others_go_on(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    small = f"{queue}-small"
    await limited(kafka, small)
    out = await producer(small)

    async def handle(msg: int) -> None:
        await out.send(b"x" * 4000 if msg == 4 else b"%d" % msg)

    await (await producer()).send_many(range(10))
    async with running(handle, exactly_once=True, concurrency=8):
        await eventually(lambda: _numbers(kafka, small, 9))
        await eventually(lambda: _numbers(kafka, f"{queue}.error", 1))
    assert sorted(await visible(kafka, small)) == [b"%d" % n for n in range(10) if n != 4]
    [error] = await records(kafka, f"{queue}.error", committed=True)
    assert error.value == b"4" and b"too large" in dict(error.headers)["ce_errormessage"]
    assert "handle" in caplog.text and "by hand" not in caplog.text


@pytest.mark.parametrize("bad", [{13}, {0, 29}, set(range(10, 20))])
async def test_a_message_that_its_topic_refuses_fails_one_input_and_the_others_leave_once(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, bad: set[int]
) -> None:
    table = f"{queue}-table"
    async with topics_at(KafkaSettings.from_url(kafka.url), "test") as topics:
        await topics.declare([Topic(name=table, partitions=1, config={"cleanup.policy": "compact"})], True)
    out = await producer(table)

    async def handle(msg: int) -> None:
        await out.send(msg, key=None if msg in bad else f"{msg}")

    await (await producer(partitions=1)).send_many(range(30))
    async with running(handle, exactly_once=True, concurrency=30):
        await eventually(lambda: _numbers(kafka, table, 30 - len(bad)))
        await eventually(lambda: _numbers(kafka, f"{queue}.error", len(bad)))
    assert sorted(int(v) for v in await visible(kafka, table)) == [n for n in range(30) if n not in bad]
    errors = await records(kafka, f"{queue}.error", committed=True)
    assert sorted(int(error.value) for error in errors) == sorted(bad)
    assert all(b"INVALID_RECORD" in dict(error.headers)["ce_errormessage"] for error in errors)


async def test_delays_and_a_new_member_change_nothing_about_once(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    out = await producer(f"{queue}-out")

    async def handle(msg: int) -> None:
        await asyncio.sleep(0.002)
        await out.send(msg)

    sender = await producer(partitions=3)
    for n in range(300):
        await sender.send(n, partition=n % 3, wait=False, **({"delay": 0.5} if n % 10 == 0 else {}))
    await sender.flush()
    options: dict[str, Any] = {"exactly_once": True, "concurrency": 4, "prefetch": 20}
    async with running(handle, **options):
        await eventually(lambda: _numbers(kafka, out.queue, 20))
        async with running(handle, **options):
            await eventually(lambda: _numbers(kafka, out.queue, 150))
        await eventually(lambda: _numbers(kafka, out.queue, 300))
    assert Counter(int(v) for v in await visible(kafka, out.queue)) == Counter(range(300))


@pytest.mark.parametrize("exactly_once", [True, False])
async def test_what_aborted_transactions_have_written_is_not_handled(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, exactly_once: bool
) -> None:
    seen: list[str] = []

    async def handle(msg: str) -> None:
        seen.append(msg)

    sender = await producer()
    with pytest.raises(ValueError):
        async with sender.transaction():
            await sender.send("aborted")
            raise ValueError
    await sender.send("plain")
    async with sender.transaction():
        await sender.send("committed")
    async with running(handle, exactly_once=exactly_once):
        await eventually(lambda: len(seen) == 2)
        await eventually(lambda: _is_done(kafka, queue))  # the ends of transactions are no lag
        async with sender.transaction():
            await sender.send("later")
        await eventually(lambda: len(seen) == 3)
        await eventually(lambda: _is_done(kafka, queue))
    assert seen == ["plain", "committed", "later"]


async def _is_done(address: KafkaAddress, queue: str) -> bool:
    rows = await asyncio.to_thread(group_rows, address.bootstrap, queue, queue)
    return not any(lag for _, _, lag in rows.values())


async def _is_at(address: KafkaAddress, queue: str, offset: int) -> bool:
    rows = await asyncio.to_thread(group_rows, address.bootstrap, queue, queue)
    return {committed for committed, _, _ in rows.values()} == {offset}


async def _numbers(address: KafkaAddress, topic: str, number: int) -> bool:
    return len(await visible_now(address, topic)) >= number


@pytest.mark.parametrize("exactly_once", [True, False])
async def test_a_group_that_stands_behind_the_end_of_its_log_begins_anew(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, exactly_once: bool
) -> None:
    """So it does where an unclean election has cut the log."""
    out, sender = await producer(f"{queue}-out"), await producer()
    await sender.send_many(range(10))
    partition = TopicPartition(queue, 0)
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap, group_id=queue, enable_auto_commit=False
    ) as member:  # else it may commit a place of its own when it closes
        member.assign([partition])
        await member.commit({partition: 1000})

    async def handle(msg: int) -> None:
        await out.send(msg)

    async with running(handle, exactly_once=exactly_once):
        await eventually(lambda: _numbers(kafka, out.queue, 10))
        await eventually(lambda: _is_at(kafka, queue, 10))
        await sender.send(10)
        await eventually(lambda: _numbers(kafka, out.queue, 11))
    assert [int(v) for v in await visible(kafka, out.queue)] == list(range(11))


@pytest.mark.slow
async def test_a_transaction_that_takes_too_long_says_so_and_nothing_of_it_is_visible(
    kafka: KafkaAddress, producer: MakeProducer, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("producing.transactions", "producing.transaction"):
        monkeypatch.setattr(f"streamtools.drivers.kafka.{module}.TIMEOUT", 2.0)
    sender = await producer()
    await sender.send("outside")

    async def is_undone() -> bool:
        return await _is_quiet(kafka, queue)

    with pytest.raises(SendError, match=r"longer than 2 s.*Nothing of it was sent") as caught:
        async with sender.transaction():
            await sender.send("inside", id="1")
            assert not await is_undone()
            await eventually(is_undone, timeout=60)
    assert caught.value.refused == ("1",) and caught.value.unknown == ()
    assert await visible_now(kafka, queue) == [b"outside"]
    async with sender.transaction():
        await sender.send("after")
    assert await visible(kafka, queue) == [b"outside", b"after"]


async def test_what_is_in_hand_of_partitions_that_are_gone_keeps_nobody_waiting(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library commits for a partition that is no more until it is told to stop."""
    monkeypatch.setattr("streamtools.drivers.kafka.consuming.topic_changes.DELETED_AFTER", 0.5)
    seen: list[int] = []
    go_on = asyncio.Event()

    async def handle(msg: int) -> None:
        seen.append(msg)
        await go_on.wait()

    sender = await producer(partitions=3)
    for number in range(3):
        await sender.send(number, partition=number)
    patient = KafkaSettings(host=kafka.bootstrap, request_timeout=120)
    async with KafkaAdmin(url=kafka.url) as admin:
        async with running(handle, exactly_once=True, concurrency=3, url=patient, revoke_timeout=120):
            await eventually(lambda: len(seen) == 3)
            await admin.delete(queue)
            await admin.create(queue, partitions=1)
            go_on.set()
            async with KafkaProducer(queue, url=kafka.url) as anew:
                await anew.send(10)
            await eventually(lambda: 10 in seen, timeout=30)
