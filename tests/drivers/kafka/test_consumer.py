"""What the consumer promises beyond the conformance suite."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from streamtools import ConfigurationError, Message, QueueError, Reject, Retry
from streamtools.delivery import current
from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer
from streamtools.drivers.kafka.consuming.delays import DELAY_LEVELS
from streamtools.drivers.kafka.offsets import decode
from streamtools.drivers.kafka.records import Plain
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, Running, records

pytestmark = pytest.mark.real_kafka("making topics")

NEVER = Retry(retries=0)


async def raw(address: KafkaAddress, topic: str, *sent: dict[str, Any]) -> None:
    """Send by the client library alone."""
    producer = AIOKafkaProducer(bootstrap_servers=address.bootstrap)
    await producer.start()
    try:
        for record in sent:
            await producer.send_and_wait(topic, **record)
    finally:
        await producer.stop()


# --- errors ---------------------------------------------------------------------------------------


async def test_the_error_topic_says_where_a_message_was_read_first(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    async def fails(msg: str) -> None:
        raise ValueError("never")

    sender = await producer(partitions=3)
    async with running(fails, group=queue, error_queue="{queue}.error", retry=Retry(retries=1, delay=0)):
        receipt = await sender.send("x", key="k", headers={"a": "b"}, partition=2)
        await eventually(lambda: _has(kafka, f"{queue}.error", 1))
    [record] = await records(kafka, f"{queue}.error")
    headers = dict(record.headers)
    assert (record.key, record.value, headers["a"]) == (b"k", b"x", b"b")
    assert headers["streamtools-origin-topic"] == queue.encode()
    assert (headers["streamtools-origin-partition"], headers["streamtools-origin-offset"]) == (
        b"2",
        str(receipt.offset).encode(),
    )
    assert (headers["streamtools-group"], headers["ce_errorattempts"]) == (queue.encode(), b"2")


async def test_a_key_that_is_no_text_is_bytes_and_kept_on_the_way_to_the_error_topic(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[str] = []

    async def handle(msg: str, message: Message) -> None:
        seen.append(msg)
        if message.key == b"\xff\xfe":
            raise Reject("the one with the key of bytes")

    await producer()
    async with running(handle, error_queue="{queue}.error"):
        text = [("content-type", b"text/plain")]
        await raw(
            kafka, queue, {"key": b"\xff\xfe", "value": b"bad", "headers": [("h", b"\xf0"), *text]},
            {"value": b"good", "headers": text},
        )  # fmt: skip
        await eventually(lambda: len(seen) == 2)
        await eventually(lambda: _has(kafka, f"{queue}.error", 1))
    [record] = await records(kafka, f"{queue}.error")
    headers = dict(record.headers)
    assert (record.key, record.value, headers["h"]) == (b"\xff\xfe", b"bad", b"\xf0")
    assert headers["ce_errormessage"] == b"the one with the key of bytes"


async def test_what_is_rejected_of_further_topics_goes_to_the_consumers_own_error_topic(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[str] = []

    async def fails(msg: str, message: Message) -> None:
        seen.append(message.queue)
        raise ValueError("never")

    names = [f"{queue}.b", f"{queue}.c"]
    senders = [await producer(name) for name in names]
    async with running(fails, topics=[names[0]], pattern=rf"{queue}\..*", retry=NEVER):
        for sender in senders:
            await sender.send("x")
        await eventually(lambda: _has(kafka, f"{queue}.error", 2))
    async with KafkaAdmin(url=kafka.url) as admin:
        failed = [message.error.queue for message in await admin.peek(f"{queue}.error") if message.error]
    assert sorted(seen) == sorted(failed) == names, "and it is not read from there again"


async def test_a_missing_topic_is_a_clear_error(kafka: KafkaAddress, producer: MakeProducer, queue: str) -> None:
    for declare in (False, "passive"):
        with pytest.raises(QueueError, match=f"no topic '{queue}'"):
            await KafkaConsumer(queue, url=kafka.url, declare=declare).open()
    await producer()
    for declare in (False, "passive"):
        with pytest.raises(QueueError, match=f"no topic '{queue}-2'"):
            await KafkaConsumer(queue, url=kafka.url, declare=declare, topics=[f"{queue}-2"]).open()


def test_options_that_cannot_work_are_refused_at_once() -> None:
    for options in (
        {"group": "a", "consumer_group": "b"},
        {"pattern": "("},
        {"topics": ["a b"]},
        {"group": "x.retry"},
        {"exactly_once": True, "auto_ack": True},
        {"start_offset": -1},
        {"start_offset": 1, "start_time": 1.0},
        {"start_time": 1.0, "offset": "latest"},
        {"static_id": ""},
    ):
        with pytest.raises(ConfigurationError):
            KafkaConsumer("orders", url="kafka://h", **options)  # type: ignore[arg-type]
    consumer = KafkaConsumer("orders", url="kafka://h", consumer_group="a", auto_ack=True)
    assert (consumer.group_id, consumer.ack, consumer.retry_topic) == ("a", "on_receive", "orders.retry.a")


# --- what is finished -------------------------------------------------------------------------------


async def test_a_slow_message_never_lets_later_ones_be_committed_past_it_and_only_it_comes_again(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    runs: Counter[int] = Counter()
    gate = asyncio.Event()

    async def handle(msg: int) -> None:
        runs[msg] += 1
        if msg == 3:
            await gate.wait()

    await (await producer()).send_many(range(200))
    async with running(handle, grace=0.05, concurrency=8) as consumer:
        await eventually(lambda: len(runs) == 200)
        await eventually(lambda: consumer._loop.in_hand == 1)
        await eventually(lambda: _committed(kafka, queue, 3, [(4, 200)]))
    gate.set()
    async with running(handle, concurrency=8):
        await (await producer()).send(200)
        await eventually(lambda: runs[200])
    assert runs[3] == 2 and {n: c for n, c in runs.items() if c != 1} == {3: 2}
    await eventually(lambda: _committed(kafka, queue, 201, []))


async def test_without_room_for_what_is_finished_ahead_intake_waits_until_there_is(
    producer: MakeProducer, running: Running
) -> None:
    seen: list[int] = []
    gate = asyncio.Event()

    async def handle(msg: int) -> None:
        seen.append(msg)
        if msg % 2 == 0 and msg < 40:
            await gate.wait()

    async with running(handle, concurrency=100, prefetch=100) as consumer:
        consumer._member.commits.limit = 20
        sender = await producer()
        await sender.send_many(range(40))
        [assigned] = [t for t in consumer._member.partitions.values() if t.place.topic == consumer.queue]
        await eventually(lambda: assigned.metadata_full)
        await eventually(lambda: assigned.paused)
        gate.set()
        await eventually(lambda: not assigned.metadata_full)
        await sender.send_many(range(40, 60))
        await eventually(lambda: len(seen) == 60)
    assert sorted(seen) == list(range(60))


# --- partitions that go and come --------------------------------------------------------------------


async def test_handlers_at_work_finish_and_are_committed_before_a_partition_goes(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    runs: Counter[int] = Counter()
    gate = asyncio.Event()

    async def handle(msg: int) -> None:
        runs[msg] += 1
        await gate.wait()

    sender = await producer(partitions=2)
    for n in range(100):
        await sender.send(n, partition=n % 2)
    async with running(handle, concurrency=4) as first:
        await eventually(lambda: len(runs) == 4)
        opening = asyncio.create_task(_opened(running, handle))
        await eventually(lambda: first._member.consumer._subscription.reassignment_in_progress)
        await asyncio.sleep(0.2)
        assert len(runs) == 4, "nothing more is begun while the partitions go"
        gate.set()
        async with await opening:
            await eventually(lambda: len(runs) == 100)
    assert set(runs.values()) == {1}


async def test_what_was_not_begun_when_a_partition_goes_is_left_to_its_next_owner(
    producer: MakeProducer, running: Running, queue: str
) -> None:
    history: list[int] = []
    gate = asyncio.Event()

    async def handle(msg: int) -> None:
        history.append(msg)
        if msg == 0:
            await gate.wait()

    await (await producer()).send_many(range(400), key="one")
    async with running(handle, concurrency=4, prefetch=20, ordered_by="key") as first:
        await eventually(lambda: history == [0])
        opening = asyncio.create_task(_opened(running, handle))
        await eventually(lambda: first._member.consumer._subscription.reassignment_in_progress)
        gate.set()
        async with await opening:
            await eventually(lambda: len(history) >= 400)
    assert history == list(range(400)), "in order, and none of them twice"


async def test_a_handler_that_is_late_is_cancelled_and_its_message_comes_again(
    producer: MakeProducer, running: Running, queue: str
) -> None:
    runs: Counter[str] = Counter()
    cancelled: list[str] = []

    async def handle(msg: str) -> None:
        runs[msg] += 1
        if runs[msg] == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(msg)
                raise

    await (await producer()).send("slow")
    async with running(handle, revoke_timeout=0.3):
        await eventually(lambda: runs["slow"] == 1)
        async with running(handle, revoke_timeout=0.3):
            await eventually(lambda: runs["slow"] == 2)
    assert cancelled == ["slow"] and runs["slow"] == 2


async def test_a_static_member_comes_back_without_the_others_noticing(
    producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    sender = await producer(partitions=2)
    async with running(handle) as other:
        async with running(handle, static_id="one"):
            await eventually(lambda: len(other._member.partitions) < 2 + len(DELAY_LEVELS))
        generation = other._member.consumer._coordinator.generation
        await sender.send(0, partition=0)
        await sender.send(1, partition=1)
        async with running(handle, static_id="one"):
            await eventually(lambda: sorted(seen) == [0, 1])
            assert other._member.consumer._coordinator.generation == generation


# --- waiting ----------------------------------------------------------------------------------------


async def test_a_retry_waits_in_its_tier_through_a_restart_and_is_never_early(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    times: list[tuple[float, int]] = []

    async def handle(msg: Message) -> None:
        times.append((time.time(), msg.attempt))
        if msg.attempt == 1:
            raise ValueError("not yet")

    policy = Retry(delay=2.2, jitter=0)
    async with running(handle, retry=policy):
        await (await producer()).send("x", key="k")
        await eventually(lambda: _has(kafka, f"{queue}.retry", 1))
    [record] = await records(kafka, f"{queue}.retry")
    assert (record.partition, record.key) == (2, b"k")  # the tier of two seconds
    async with running(handle, retry=policy):
        await eventually(lambda: len(times) == 2)
    assert [attempt for _, attempt in times] == [1, 2] and times[1][0] - times[0][0] >= 2.2


async def test_a_delayed_message_is_for_every_group_and_for_one_that_comes_later(
    producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: dict[str, float] = {}

    def note(group: str) -> Any:
        async def handle(msg: str) -> None:
            seen[group] = time.time()

        return handle

    sender = await producer()
    async with (
        running(note("billing"), group=f"{queue}-billing"),
        running(note("shipping"), group=f"{queue}-shipping", ordered_by="key"),
    ):
        start = time.time()
        await sender.send("x", delay=0.6)
        await eventually(lambda: len(seen) == 2)
    assert all(at - start >= 0.6 for at in seen.values())
    async with running(note("audit"), group=f"{queue}-audit"):
        await eventually(lambda: "audit" in seen)


async def test_ordered_by_partition_each_partition_is_handled_in_order_and_all_at_once(
    producer: MakeProducer, running: Running
) -> None:
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    at_work: set[int] = set()
    most = 0

    async def handle(msg: int, message: Message) -> None:
        nonlocal most
        assert msg % 3 not in at_work
        at_work.add(msg % 3)
        most = max(most, len(at_work))
        await asyncio.sleep(0.001)
        if msg % 7 == 0 and message.attempt == 1:
            at_work.remove(msg % 3)
            raise ValueError("not yet")
        at_work.remove(msg % 3)
        seen[msg % 3].append(msg)

    sender = await producer(partitions=3)
    for n in range(90):
        await sender.send(n, partition=n % 3)
    async with running(handle, concurrency=8, ordered_by="partition", retry=Retry(delay=0.01)):
        await eventually(lambda: sum(map(len, seen.values())) == 90)
    assert seen == {p: list(range(p, 90, 3)) for p in seen} and most == 3


# --- which topics, and from where -------------------------------------------------------------------


async def test_several_topics_and_those_of_a_pattern(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[tuple[str, str, int]] = []

    async def handle(msg: str, message: Message) -> None:
        seen.append((msg, message.queue, message.attempt))
        if message.attempt == 1 and msg == "twice":
            raise ValueError("not yet")

    names = [queue, f"{queue}-b", f"{queue}-c.x"]
    senders = [await producer(name) for name in names]
    async with running(handle, topics=[names[1]], retry=Retry(delay=0)):
        await senders[0].send("a")
        await senders[1].send("twice")
        await eventually(lambda: len(seen) == 3)
    assert set(seen) == {("a", queue, 1), ("twice", names[1], 1), ("twice", names[1], 2)}
    seen.clear()
    async with running(handle, pattern=rf"{queue}-.*", group=f"{queue}-patterns"):
        await senders[2].send("c")
        await eventually(lambda: ("c", names[2], 1) in seen)
    assert ("a", queue, 1) in seen


async def test_a_new_group_begins_where_it_is_told(producer: MakeProducer, running: Running, queue: str) -> None:
    sender = await producer()
    start = time.time()
    for n in range(10):
        await sender.send(n, timestamp=start + n)

    async def first(**options: Any) -> int:
        seen: list[int] = []

        async def handle(msg: int) -> None:
            seen.append(msg)

        async with running(handle, **options):
            await eventually(lambda: 9 in seen)
        return seen[0]

    assert await first(group=f"{queue}-a", start_offset=4) == 4
    assert await first(group=f"{queue}-b", start_time=start + 6.5) == 7
    assert await first(group=f"{queue}-c") == 0
    again = await KafkaConsumer(queue, url=sender.settings, group=f"{queue}-a", start_offset=0).open()
    assert await again.receive(timeout=0.5) == [], "only a new group is told where to begin"
    await again.close()


@pytest.mark.parametrize("begin", [{"offset": "latest"}, {"start_offset": 1000}])
async def test_a_partition_that_is_added_is_read_from_its_beginning_though_the_group_began_elsewhere(
    kafka: KafkaAddress,
    producer: MakeProducer,
    running: Running,
    queue: str,
    begin: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamtools.drivers.kafka.client.connect.METADATA_AGE", 0.5)
    seen: list[str] = []

    async def handle(msg: str) -> None:
        seen.append(msg)

    sender = await producer()
    await sender.send("old")
    async with running(handle, **begin):
        await sender.send("new")
        await eventually(lambda: _committed(kafka, queue, 2, []))
        async with KafkaAdmin(url=kafka.url) as admin:
            await admin.alter(queue, partitions=2)
        await (await producer()).send("added", partition=1)
        await eventually(lambda: "added" in seen)
    assert seen == ["new", "added"]


async def test_a_topic_that_is_made_later_is_read_by_its_pattern_from_its_first_message(
    producer: MakeProducer, running: Running, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtools.drivers.kafka.client.connect.METADATA_AGE", 0.5)
    seen: list[str] = []

    async def handle(msg: str) -> None:
        seen.append(msg)

    await (await producer(f"{queue}-there")).send("old")
    async with running(handle, pattern=rf"{queue}-.*", offset="latest") as consumer:
        await (await producer(f"{queue}-later")).send_many(["first", "second"])
        await eventually(lambda: len(seen) == 2)
        assert f"{queue}-later" in {partition.topic for partition in consumer._member.partitions}
    assert seen == ["first", "second"]


# --- looking ----------------------------------------------------------------------------------------


async def _opened(running: Running, handler: Any) -> AsyncExitStack:
    stack = AsyncExitStack()
    await stack.enter_async_context(running(handler, concurrency=4))
    return stack


async def _has(address: KafkaAddress, topic: str, number: int) -> bool:
    return len(await records(address, topic)) >= number


async def _committed(address: KafkaAddress, queue: str, offset: int, ahead: list[tuple[int, int]]) -> bool:
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(bootstrap_servers=address.bootstrap)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(queue)
    finally:
        await admin.close()
    for partition, commit in found.items():
        if partition.topic == queue:
            return (commit.offset, decode(commit.offset, commit.metadata)) == (offset, ahead)
    return False


@pytest.mark.parametrize("payload", [{"id": 1}, b"x"])
async def test_a_message_without_metadata_is_handled_without_reading_all_of_it(
    producer: MakeProducer, running: Running, queue: str, payload: Any
) -> None:
    """That takes as long as all else together."""
    kinds: list[type] = []

    async def handle(body: Any) -> None:
        delivery = current.get()
        assert delivery is not None and body == payload
        kinds.append(type(delivery.message))

    await (await producer()).send_many([payload] * 3)
    async with running(handle):
        await eventually(lambda: len(kinds) == 3)
    assert kinds == [Plain] * 3
