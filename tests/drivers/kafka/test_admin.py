"""What an operator sees and does, checked with Kafka's own command-line tools."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest
from aiokafka import TopicPartition

from streamtools import ConfigurationError, ConnectError, QueueAdmin, QueueError
from streamtools.drivers.kafka import KafkaAdmin, KafkaProducer
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress, hosts
from tests.brokers.kafka.node import KafkaCluster, KafkaNode
from tests.drivers.kafka.conftest import MakeProducer, Tool, member, records, shown

pytestmark = pytest.mark.real_kafka("what its admin and its own tools say")


# --- topics -------------------------------------------------------------------------------------


async def test_a_topic_is_made_as_asked_listed_and_deleted(
    admin: QueueAdmin, tool: Tool, queue: str, kafka: KafkaAddress
) -> None:
    await admin.create(queue, partitions=3, replication=1)
    text = await tool("kafka-topics", "--describe", "--topic", queue)
    assert re.search(r"PartitionCount: 3\s+ReplicationFactor: 1", text)
    [info] = [info for info in await admin.list() if info.name == queue]
    assert (info.ready, info.delayed, info.consumers) == (0, 0, 0)
    await admin.delete(queue)
    assert queue not in (await tool("kafka-topics", "--list")).split()
    assert queue not in [info.name for info in await admin.list()]


async def test_kafkas_own_topics_are_not_listed(admin: QueueAdmin, queue: str) -> None:
    await admin.create(queue)
    await admin.seek(queue, "end")
    assert [info.name for info in await admin.list() if info.name.startswith("__")] == []


async def test_making_a_topic_again_with_another_number_of_partitions_is_an_error(
    admin: QueueAdmin, queue: str
) -> None:
    await admin.create(queue, partitions=2)
    await admin.create(queue, partitions=2)
    await admin.create(queue)
    with pytest.raises(QueueError, match=f"partitions=2, not 3.*queues alter {queue} --partitions"):
        await admin.create(queue, partitions=3)
    with pytest.raises(QueueError, match="replication=1, not 2"):
        await admin.create(queue, replication=2)


async def test_more_copies_than_brokers_is_an_error_and_makes_nothing(admin: QueueAdmin, queue: str) -> None:
    with pytest.raises(QueueError, match=queue):
        await admin.create(queue, replication=3)
    with pytest.raises(QueueError, match=queue):
        await admin.stats(queue)


async def test_looking_makes_no_topic(admin: QueueAdmin, tool: Tool, queue: str) -> None:
    for question in (admin.stats, admin.peek, admin.groups, admin.describe, admin.purge, admin.delete, admin.move):
        with pytest.raises(QueueError, match=f"no topic '{queue}'"):
            await question(queue)
    with pytest.raises(QueueError, match=queue):
        await admin.alter(queue, partitions=2)
    with pytest.raises(QueueError, match=queue):
        await admin.seek(queue, "beginning")
    assert queue not in (await tool("kafka-topics", "--list")).split()


async def test_a_queue_goes_with_its_retry_topics_and_no_other(admin: QueueAdmin, queue: str) -> None:
    others = [f"{queue}-2", f"{queue}.retrying", f"{queue}.error"]
    for name in (queue, f"{queue}.retry", f"{queue}.retry.billing", *others):
        await admin.create(name)
    await admin.delete(queue)
    assert [info.name for info in await admin.list() if info.name.startswith(queue)] == sorted(others)


async def test_what_waits_for_its_retry_is_shown_with_its_queue(
    admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    await (await producer()).send("now")
    for group in ("", ".billing"):
        retries = await producer(f"{queue}.retry{group}", partitions=3)
        await retries.send("at once", partition=0)
        await retries.send_many(["later", "later"], partition=2)
    info = await admin.stats(queue)
    assert (info.ready, info.delayed) == (2, 2)
    shown = {info.name: (info.ready, info.delayed) for info in await admin.list() if info.name.startswith(queue)}
    assert shown == {queue: (2, 2), f"{queue}.retry.billing": (1, 2)}


async def test_stats_count_messages_and_not_the_ends_of_transactions(
    admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(partitions=2)
    for number in range(5):
        async with sender.transaction():
            await sender.send_many([number, number], partition=number % 2)
        with pytest.raises(ZeroDivisionError):
            async with sender.transaction():
                await sender.send("aborted", partition=0)
                raise ZeroDivisionError
    await sender.send("plain", partition=1)

    async def ready() -> int:
        return (await admin.stats(queue)).ready

    await eventually(lambda: _is(ready, 11), "no marker is counted, as soon as the last one is written")
    await admin.seek(queue, 1, partition=0)
    assert await ready() == 10
    await admin.seek(queue, "end")
    assert await ready() == 0


async def test_stats_count_large_messages_and_not_the_ends_of_transactions(
    admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(partitions=1)
    for number in range(12):
        async with sender.transaction():
            await sender.send(str(number) * 40_000)
    await eventually(lambda: _is(lambda: _ready(admin, queue), 12), "they come in several portions")


async def _ready(admin: QueueAdmin, queue: str) -> int:
    return (await admin.stats(queue)).ready


async def _is(number: Callable[[], Awaitable[int]], wanted: int) -> bool:
    return await number() == wanted


async def test_the_retries_of_another_group_are_those_that_it_has_not_read(
    admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    retries, group = f"{queue}.retry.g-{queue}", f"g-{queue}"
    await (await producer(retries, partitions=1)).send_many(["done", "waits", "waits"])
    await admin.seek(retries, 1, group=group)
    assert (await admin.stats(retries)).ready == 2
    assert [message.body for message in await admin.peek(retries)] == [b"waits", b"waits"]


async def test_the_age_of_the_oldest_is_that_of_what_the_group_does_next(
    admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    sender, now = await producer(partitions=2), time.time()
    assert (await admin.stats(queue)).oldest is None
    for partition, age in ((0, 900), (0, 100), (1, 500)):
        await sender.send("x", partition=partition, timestamp=now - age)

    async def age() -> int:
        return round((await admin.stats(queue)).oldest or 0, -2)

    assert await age() == 900
    await admin.seek(queue, 1, partition=0)
    assert await age() == 500
    async with sender.transaction():
        await sender.send("y", partition=1, timestamp=now - 300)
    await admin.seek(queue, 1, partition=1)

    async def is_300() -> bool:  # the broker writes a transaction's markers when its end has been answered
        return await age() == 300

    await eventually(is_300, "markers of transactions have no age")
    await admin.seek(queue, "end")
    assert (await admin.stats(queue)).oldest is None


async def test_topics_that_come_and_go_do_not_disturb_a_list(
    admin: QueueAdmin, kafka: KafkaAddress, queue: str
) -> None:
    await admin.create(queue)

    async def come_and_go(number: int) -> None:
        async with KafkaAdmin(url=kafka.url) as other:
            for _ in range(10):
                await other.create(f"{queue}-{number}", partitions=3)
                await other.delete(f"{queue}-{number}")

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        work = [group.create_task(come_and_go(number)) for number in range(3)]
        while not all(task.done() for task in work):
            assert queue in [info.name for info in await admin.list()]


# --- partitions and retention -------------------------------------------------------------------


async def test_partitions_are_added_and_never_taken_away(admin: QueueAdmin, tool: Tool, queue: str) -> None:
    await admin.create(queue, partitions=2)
    await admin.alter(queue, partitions=5)
    await admin.alter(queue, partitions=5)
    assert "PartitionCount: 5" in await tool("kafka-topics", "--describe", "--topic", queue)
    with pytest.raises(QueueError, match="5 partitions, and Kafka takes none away"):
        await admin.alter(queue, partitions=4, retention=60)
    assert "retention.ms" not in await tool("kafka-topics", "--describe", "--topic", queue)


async def test_retention_changes_and_every_other_setting_stays(admin: QueueAdmin, tool: Tool, queue: str) -> None:
    kept = ["--config", "max.message.bytes=3000", "--config", "segment.bytes=1048576"]
    await tool("kafka-topics", "--create", "--topic", queue, "--partitions", "1", *kept)
    await admin.alter(queue, retention=3600)
    await admin.alter(queue, retention_bytes=1_000_000)
    assert await settings(tool, queue) == {
        "max.message.bytes": "3000",
        "segment.bytes": "1048576",
        "retention.ms": "3600000",
        "retention.bytes": "1000000",
    }
    await admin.alter(queue, retention=math.inf, retention_bytes=math.inf)
    assert (await settings(tool, queue))["retention.ms"] == (await settings(tool, queue))["retention.bytes"] == "-1"
    found = await admin.describe(queue)
    assert (found.partitions, found.replication, found.retention, found.retention_bytes) == (1, 1, math.inf, math.inf)


async def settings(tool: Tool, topic: str) -> dict[str, str]:
    """The topic's own settings, as kafka-topics shows them."""
    text = (await tool("kafka-topics", "--describe", "--topic", topic)).splitlines()[0]
    pairs = text.partition("Configs: ")[2].split(",")
    return {n: v for n, _, v in (pair.strip().partition("=") for pair in pairs) if n != "min.insync.replicas"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"partitions": 0},
        {"partitions": True},
        {"retention": -1},
        {"retention_bytes": 0},
        {"retention_bytes": 1.5},
    ],
)
async def test_a_change_that_cannot_be_is_refused_before_anything_is_asked(
    admin: QueueAdmin, queue: str, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await admin.alter(queue, **change)
    assert not isinstance(caught.value, QueueError)


# --- purge --------------------------------------------------------------------------------------


async def test_purge_empties_this_topic_at_once_and_no_other(
    admin: QueueAdmin, filled: Any, producer: MakeProducer, tool: Tool, kafka: KafkaAddress, queue: str
) -> None:
    await filled(10, partitions=2)
    await (await producer(f"{queue}-2")).send("stays")
    assert await admin.purge(queue) == 10
    earliest = await tool("kafka-get-offsets", "--topic", queue, "--time", "earliest")
    assert earliest.split() == [f"{queue}:0:5", f"{queue}:1:5"]
    assert (await admin.stats(queue)).ready == 0
    assert await admin.peek(queue) == []
    assert await records(kafka, queue) == []
    assert [record.value for record in await records(kafka, f"{queue}-2")] == [b"stays"]
    await (await producer()).send("next", partition=1)
    assert [record.value for record in await records(kafka, queue)] == [b"next"]


async def test_purge_counts_what_was_still_to_be_read(admin: QueueAdmin, filled: Any, queue: str) -> None:
    await filled(10)
    await admin.seek(queue, 4)
    assert await admin.purge(queue) == 6
    assert await admin.purge(queue) == 0


async def test_a_topic_that_may_not_be_purged_says_so(
    admin: QueueAdmin, tool: Tool, producer: MakeProducer, queue: str
) -> None:
    await tool("kafka-topics", "--create", "--topic", queue, "--config", "cleanup.policy=compact")
    await (await producer()).send("kept", key="k")
    with pytest.raises(QueueError, match="refuses"):
        await admin.purge(queue)


# --- lag ----------------------------------------------------------------------------------------


async def test_lag_is_what_kafkas_own_tool_says_and_looking_moves_nothing(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(20, partitions=2)
    first, second = TopicPartition(queue, 0), TopicPartition(queue, 1)
    async with member(kafka, "billing-" + queue, queue) as consumer:
        await consumer.getmany(timeout_ms=10_000)
        await consumer.commit({first: 7, second: 2})
        [group] = await admin.groups(queue)
        told = await shown(kafka, group.name, queue)
        assert {p.partition: (p.committed, p.end, p.lag) for p in group.partitions} == told
        assert told == {0: (7, 10, 3), 1: (2, 10, 8)}
        assert (group.lag, group.members, group.state) == (11, 1, "stable")
        assert {p.member for p in group.partitions} == {"other"}
    await admin.peek(queue)
    await admin.stats(queue)
    assert await shown(kafka, group.name, queue) == told
    [group] = await admin.groups(queue)
    assert (group.lag, group.members, group.state) == (11, 0, "empty")


async def test_what_is_gone_is_no_lag(admin: QueueAdmin, filled: Any, queue: str, tool: Tool, tmp_path: Any) -> None:
    await filled(10)
    await admin.seek(queue, 2)
    file = tmp_path / "offsets.json"
    file.write_text(f'{{"version": 1, "partitions": [{{"topic": "{queue}", "partition": 0, "offset": 7}}]}}')
    await tool("kafka-delete-records", "--offset-json-file", str(file))
    [group] = await admin.groups(queue)
    assert (group.partitions[0].begin, group.partitions[0].committed, group.lag) == (7, 2, 3)
    assert (await admin.stats(queue)).ready == 3


async def test_a_group_that_reads_something_else_is_not_shown(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str
) -> None:
    await filled(1)
    await admin.create(f"{queue}-2")
    await admin.seek(f"{queue}-2", "end", group=f"other-{queue}")
    assert await admin.groups(queue) == []


# --- seek ---------------------------------------------------------------------------------------


async def test_a_group_goes_where_it_is_told(admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str) -> None:
    await filled(20, partitions=2)
    group = f"billing-{queue}"
    assert (await admin.seek(queue, "end", group=group)).lag == 0
    assert await shown(kafka, group, queue) == {0: (10, 10, 0), 1: (10, 10, 0)}
    assert (await admin.seek(queue, 4, group=group, partition=1)).lag == 6
    assert await shown(kafka, group, queue) == {0: (10, 10, 0), 1: (4, 10, 6)}
    assert (await admin.seek(queue, "beginning", group=group)).lag == 20
    assert await shown(kafka, group, queue) == {0: (0, 10, 10), 1: (0, 10, 10)}
    async with member(kafka, group, queue) as consumer:
        found = await consumer.getmany(timeout_ms=10_000)
        assert {batch[0].offset for batch in found.values()} == {0}


async def test_a_group_goes_to_a_time(
    admin: QueueAdmin, producer: MakeProducer, kafka: KafkaAddress, queue: str
) -> None:
    sender = await producer()
    hour = time.time() - 3600
    for minute in range(5):
        await sender.send(str(minute), timestamp=hour + 60 * minute)
    for at, offset in ((hour - 1, 0), (hour + 120, 2), (hour + 121, 3), (hour + 9000, 5)):
        await admin.seek(queue, datetime.fromtimestamp(at, UTC))
        assert (await shown(kafka, queue, queue))[0][0] == offset


async def test_a_group_at_work_is_not_moved(admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str) -> None:
    await filled(10)
    async with member(kafka, queue, queue) as consumer:
        await consumer.getmany(timeout_ms=10_000)
        await consumer.commit({TopicPartition(queue, 0): 3})
        with pytest.raises(QueueError, match=f"group '{queue}'.* has consumers.*Stop them"):
            await admin.seek(queue, "end")
        assert await shown(kafka, queue, queue) == {0: (3, 10, 7)}
    assert (await admin.seek(queue, "end")).lag == 0


@pytest.mark.parametrize(
    ("to", "partition", "says"),
    [(11, 0, "not to 11"), (-1, 0, "not to -1"), (3, None, "which one"), ("beginning", 2, "no 2")],
)
async def test_a_place_that_is_none_moves_nothing(
    admin: QueueAdmin, filled: Any, kafka: KafkaAddress, queue: str, to: Any, partition: int | None, says: str
) -> None:
    await filled(20, partitions=2)
    await admin.seek(queue, "end")
    with pytest.raises(ConfigurationError, match=says):
        await admin.seek(queue, to, partition=partition)
    assert await shown(kafka, queue, queue) == {0: (10, 10, 0), 1: (10, 10, 0)}


@pytest.mark.parametrize("to", ["start", True, 1.5, datetime(2026, 1, 1)])
async def test_a_place_must_be_said_clearly(admin: QueueAdmin, queue: str, to: Any) -> None:
    with pytest.raises(ConfigurationError, match="seek to"):
        await admin.seek(queue, to)


# --- connections --------------------------------------------------------------------------------


async def test_a_wrong_host_is_one_clear_error() -> None:
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:1 cannot be reached"):
        await KafkaAdmin(url="kafka://127.0.0.1:1").open()


async def test_an_admin_that_is_not_open_says_so(queue: str) -> None:
    with pytest.raises(ConnectError, match="is not open"):
        await KafkaAdmin(url="kafka://127.0.0.1:1").stats(queue)


async def test_an_admin_outlives_its_broker(own_kafka: KafkaNode, queue: str) -> None:
    async with KafkaAdmin(url=own_kafka.url) as admin:
        await admin.create(queue)
        await asyncio.to_thread(own_kafka.restart, force=True)
        assert (await admin.stats(queue)).ready == 0
        await admin.alter(queue, partitions=2)
        assert (await admin.seek(queue, "end")).lag == 0


@pytest.mark.parametrize("sasl", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_an_admin_logs_in_over_tls(kafka: KafkaAddress, queue: str, sasl: str) -> None:
    if kafka.sasl_tls_url is None:
        pytest.skip("this Kafka has no listener for logins over TLS")
    user = f"{kafka.username}:{quote(str(kafka.password), safe='')}"
    url = f"kafkas://{user}@{hosts(kafka.sasl_tls_url)}/?sasl={sasl}&cafile={kafka.ca}"
    async with KafkaAdmin(url=url) as admin:
        await admin.create(queue)
        assert (await admin.stats(queue)).ready == 0


@pytest.mark.slow
async def test_what_one_broker_has_made_the_others_know(kafka_cluster: KafkaCluster, queue: str) -> None:
    async with AsyncExitStack() as stack:
        admins = [await stack.enter_async_context(KafkaAdmin(url=node.url)) for node in kafka_cluster.nodes]
        for number in range(20):
            name = f"{queue}-{number}"
            maker, *others = admins[number % 3 :] + admins[: number % 3]
            await maker.create(name, partitions=2, replication=3)
            for other in others:
                assert (await other.stats(name)).ready == 0
            await maker.delete(name)
            for other in others:
                assert name not in [info.name for info in await other.list()]


@pytest.mark.slow
async def test_an_admin_goes_on_when_a_partitions_leader_is_killed(kafka_cluster: KafkaCluster, queue: str) -> None:
    async with KafkaAdmin(url=kafka_cluster.url) as admin, KafkaProducer(queue, url=kafka_cluster.url) as producer:
        await producer.send_many(["x"] * 10)
        leader = await asyncio.to_thread(kafka_cluster.leader, queue)
        await asyncio.to_thread(leader.kill)
        # The cluster takes some seconds to notice; each request waits for it, as long as its time limit.
        assert (await admin.seek(queue, 4)).lag == 6
        assert (await admin.stats(queue)).ready == 6
        assert [message.body for message in await admin.peek(queue, 1)] == [b"x"]
        assert await admin.purge(queue) == 6
        await admin.alter(queue, partitions=2, retention=3600)
        found = await admin.describe(queue)
        assert (found.partitions, found.replication, found.retention) == (2, 3, 3600)


async def test_looking_200_times_changes_nothing_and_disturbs_nobody(
    kafka: KafkaAddress, admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    await admin.create(queue, partitions=3)
    await (await producer()).send_many([str(n) for n in range(60)])
    async with member(kafka, f"{queue}.other", queue) as other:
        found = await other.getmany(timeout_ms=5000, max_records=10)
        await other.commit()
        generation = other._coordinator.generation
        before = await admin.groups(queue)
        first = [message.body for message in await admin.peek(queue, limit=100)]
        for _ in range(199):
            assert [message.body for message in await admin.peek(queue, limit=100)] == first
        assert (await admin.stats(queue)).ready == len(first) == 60
        assert found and await admin.groups(queue) == before and other._coordinator.generation == generation
    assert [group.name for group in before] == [f"{queue}.other"]
    assert len(await records(kafka, queue)) == 60
