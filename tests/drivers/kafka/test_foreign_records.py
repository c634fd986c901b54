"""What other programs have written, and what Kafka itself has made of it, as a real Kafka keeps it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka import Producer as Confluent

from streamtools import QueueAdmin, Retry
from streamtools.drivers.kafka import KafkaConsumer
from streamtools.drivers.kafka.records import ORIGIN
from streamtools.message import Message
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.tools import kafka_tool
from tests.drivers.kafka.conftest import MakeProducer, Running, Tool, records, shown
from tests.drivers.kafka.raw import produce_raw

pytestmark = pytest.mark.real_kafka("transactions, compaction, a place to begin")


async def received(kafka: KafkaAddress, topic: str, number: int, **options: Any) -> list[Message]:
    """So many messages, acknowledged; then nothing is left to do for the group."""
    found: list[Message] = []
    async with KafkaConsumer(topic, url=kafka.url, group=f"{topic}-reader", **options) as consumer:
        while len(found) < number:
            batch = await consumer.receive(7, timeout=30)
            assert batch, f"{len(found)} of {number} have come"
            found += [delivery.message for delivery in batch]
            await consumer.ack_many(batch)
        async with asyncio.timeout(30):
            while any(lag for _, _, lag in (await shown(kafka, f"{topic}-reader", topic)).values()):
                assert not await consumer.receive(1, timeout=0.1)
    return found


def offset_of(message: Message) -> int:
    """Of one without an id of its own."""
    return int(message.id.rsplit("-", 1)[-1])


async def test_what_kafkas_console_producer_sends_is_text_and_a_number_for_who_wants_that(
    kafka: KafkaAddress, admin: QueueAdmin, queue: str, running: Running
) -> None:
    await admin.create(queue)
    lines = ["hello", "200", "[1]", '"quoted"', "größe"]
    await asyncio.to_thread(
        kafka_tool, kafka.bootstrap, "kafka-console-producer", "--topic", queue, stdin="\n".join(lines) + "\n"
    )
    texts: list[str] = []
    anything: list[int | str] = []

    async def text(msg: str) -> None:
        texts.append(msg)

    async def number(msg: int | str) -> None:
        anything.append(msg)

    async with running(text, group=f"{queue}-texts"), running(number, group=f"{queue}-numbers"):
        await eventually(lambda: len(texts) == len(anything) == 5)
    assert texts == ["hello", "200", "[1]", "quoted", "größe"]
    assert anything == ["hello", 200, "[1]", "quoted", "größe"]


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
    assert dict(headers.headers) == {"nothing": "", "bytes": r"\xff"}
    assert (offset_of(nothing), nothing.content_type) == (4, None)
    assert (odd.id, odd.content_type) == (r"\xff", "text/plain")


#: What no client library writes: names of any bytes, and times of any size.
ODD: list[tuple[bytes, bytes | None]] = [
    (b"\xff\xfename", b"\xff"), (b"twice", b"1"), (b"twice", b"\xf0"), (b"null", None),
    (b"ce_expirytime", b"9999-12-31T23:59:59.9999999Z"), (b"ce_time", b"nan"), (b"ce_deliverytime", b"-1e300"),
    (b"content-type", b"text/plain"),
]  # fmt: skip


async def any_times(tool: Tool, topic: str) -> None:
    """A topic that takes any timestamp, and keeps what is as old as it says."""
    options = ["--config", f"message.timestamp.after.max.ms={2**63 - 1}", "--config", "retention.ms=-1"]
    await tool("kafka-topics", "--create", "--topic", topic, "--partitions", "1", *options)


async def test_a_record_with_header_names_of_any_bytes_costs_itself_alone(
    kafka: KafkaAddress, tool: Tool, running: Running, queue: str
) -> None:
    await any_times(tool, queue)
    now = 1_764_489_600_000
    rows = [(b"k", b"%d" % n, ODD if n == 1 else [], now * 1000 if n == 1 else now) for n in range(3)]
    await produce_raw(kafka, queue, rows)
    seen: list[tuple[bytes, int]] = []

    async def handle(body: bytes, message: Message) -> None:
        seen.append((body, message.attempt))
        if body == b"1":
            assert message.headers[r"\xff\xfename"] == r"\xff" and message.headers["twice"] == r"1, \xf0"
            raise ConnectionError("not for this one")

    async with running(handle, retry=Retry(retries=1, delay=0.1)) as consumer:
        await eventually(lambda: sorted(seen) == [(b"0", 1), (b"1", 1), (b"1", 2), (b"2", 1)])
        assert consumer.connected
        async with asyncio.timeout(30):
            while any(lag for _, _, lag in (await shown(kafka, queue, queue)).values()):
                await asyncio.sleep(0.1)
    [failed] = await records(kafka, f"{queue}.error")
    assert (failed.key, failed.value) == (b"k", b"1")
    headers = [h for h in failed.headers if h[0] in (r"\xff\xfename", "twice", "null")]
    assert headers == [(r"\xff\xfename", b"\xff"), ("twice", b"1"), ("twice", b"\xf0"), ("null", None)]


@pytest.mark.parametrize("number", [b"9" * 5000, "\u0663".encode() * 30, b"-1", b"1_0", b""])
async def test_a_place_that_a_copy_cannot_come_from_costs_its_record_alone(
    kafka: KafkaAddress, admin: QueueAdmin, running: Running, queue: str, number: bytes
) -> None:
    await admin.create(queue, partitions=1)
    place = [(name, b"0") for name in ORIGIN[:2]] + [(ORIGIN[2], number)]
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap) as other:
        for n in range(3):
            await other.send_and_wait(queue, b"%d" % n, headers=place if n == 1 else [])

    async def handle(body: bytes) -> None:
        raise ConnectionError("not for this one")

    async with running(handle, retry=Retry(retries=1, delay=0.1)):
        async with asyncio.timeout(30):
            while len(failed := await records(kafka, f"{queue}.error")) < 3:
                await asyncio.sleep(0.1)
    assert sorted(record.value for record in failed) == [b"0", b"1", b"2"]
    assert {dict(record.headers)[ORIGIN[2]] for record in failed} == {b"0", b"1", b"2"}
    assert await admin.move(f"{queue}.error", queue) == 3


async def test_operators_look_at_it_and_move_it_too(
    kafka: KafkaAddress, tool: Tool, admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    await any_times(tool, queue)
    rows = [(b"\xff", b"%d" % n, ODD if n in (0, 3) else [], n) for n in range(5)]
    await produce_raw(kafka, queue, rows)
    assert (await admin.stats(queue)).ready == 5
    seen = [message.body for message in await admin.peek(queue, limit=10)]
    assert seen == [b"%d" % n for n in range(5)]
    await admin.create(f"{queue}.2", partitions=1)
    assert await admin.move(queue, f"{queue}.2") == 5
    moved = await records(kafka, f"{queue}.2")
    assert [(record.key, record.value) for record in moved] == [(b"\xff", b"%d" % n) for n in range(5)]
    assert [h for h in moved[3].headers if h[0] == "twice"] == [("twice", b"1"), ("twice", b"\xf0")]


@pytest.mark.parametrize("exactly", [False, True])
async def test_a_tombstone_stays_one_on_every_way(
    kafka: KafkaAddress, admin: QueueAdmin, producer: MakeProducer, running: Running, queue: str, exactly: bool
) -> None:
    sender = await producer()
    await sender.send(None, key="k", tombstone=True)
    await sender.send(None, key=b"\x00\x00\x00*", tombstone=True)
    seen: list[tuple[int | None, str | bytes | None, int]] = []

    async def handle(payload: int | None, message: Message) -> None:
        seen.append((payload, message.key, message.attempt))
        raise ConnectionError("not yet")

    async with running(handle, retry=Retry(retries=1, delay=0.1), exactly_once=exactly):
        await eventually(lambda: len(seen) == 4, timeout=60)
    keys = ["k", b"\x00\x00\x00*"]
    assert sorted(seen, key=repr) == sorted(((None, key, n) for key in keys for n in (1, 2)), key=repr)
    for topic in (f"{queue}.retry", f"{queue}.error"):
        rows = [(row.key, row.value) for row in await records(kafka, topic, committed=True)]
        assert sorted(rows) == [(b"\x00\x00\x00*", None), (b"k", None)]
    assert await admin.move(f"{queue}.error", f"{queue}") == 2
    rows = [(row.key, row.value) for row in await records(kafka, queue)]
    assert sorted(rows) == [(b"\x00\x00\x00*", None)] * 2 + [(b"k", None)] * 2


async def test_a_compacted_topic_takes_a_tombstone_and_keys_of_any_bytes_go_where_other_clients_put_them(
    kafka: KafkaAddress, tool: Tool, producer: MakeProducer, queue: str
) -> None:
    await tool(
        "kafka-topics", "--create", "--topic", queue, "--partitions", "7", "--config", "cleanup.policy=compact"
    )
    sender = await producer()
    keys: list[str | bytes] = ["ä", b"\x00\x00\x00*", b"\x00\x00\x00\xc8", b"\xff\xfe", b""]
    for key in keys:
        await sender.send(None, key=key, tombstone=True)
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap) as other:
        for key in keys:
            await other.send_and_wait(queue, None, key=key.encode() if isinstance(key, str) else key)
    found = await records(kafka, queue)
    places: dict[bytes, set[int]] = {}
    for record in found:
        assert record.value is None
        places.setdefault(record.key, set()).add(record.partition)
    assert len(found) == 10 and all(len(partitions) == 1 for partitions in places.values())


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
