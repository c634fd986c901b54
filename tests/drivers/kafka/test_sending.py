"""One producing client for all who send, and first messages to many topics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiokafka.partitioner import murmur2

from streamtools import KafkaSettings, Message, QueueAdmin, QueueError, Retry
from streamtools.consumer import BoundHandler
from streamtools.drivers.kafka import KafkaConsumer, KafkaProducer
from streamtools.drivers.kafka.brokers.topics import Topic, Topics, topics_at
from streamtools.drivers.kafka.producing import publisher
from streamtools.drivers.kafka.producing.record import records_of
from streamtools.drivers.kafka.producing.sender import _PUBLISHERS, Sender
from streamtools.errors import Closed, SendError
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, records

pytestmark = pytest.mark.real_kafka("making topics")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The producing clients that were made."""
    found: list[Any] = []
    original = publisher.AIOKafkaProducer

    def make(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(publisher, "AIOKafkaProducer", make)
    return found


async def test_producers_and_the_retries_of_consumers_share_one_client_and_the_last_closes_it(
    kafka: KafkaAddress, queue: str, made: list[Any]
) -> None:
    producers = [KafkaProducer(f"{queue}.{n % 3}", url=kafka.url) for n in range(50)]
    consumers = [
        KafkaConsumer(f"{queue}.{n}", url=kafka.url, error_queue=f"{queue}.error", retry=Retry(retries=0))
        for n in range(3)
    ]

    async def fail(msg: int) -> None:
        raise ValueError("never")

    tasks = [asyncio.create_task(consumer.run(BoundHandler(consumer, fail))) for consumer in consumers]
    await asyncio.gather(*(producer.open() for producer in producers))
    await asyncio.gather(*(producer.send(n) for n, producer in enumerate(producers)))

    async def all_failed() -> bool:
        return len(await records(kafka, f"{queue}.error")) == 50

    await eventually(all_failed, timeout=60)
    for consumer in consumers:
        consumer.stop(10)
    await asyncio.gather(*tasks)
    for producer in producers[1:]:
        await producer.close()
    assert len(made) == 1
    await producers[0].send("still open")
    await producers[0].close()
    assert _PUBLISHERS._shelf(asyncio.get_running_loop()) == {} and made[0]._closed


async def test_another_client_id_and_other_settings_have_a_client_of_their_own(
    kafka: KafkaAddress, producer: MakeProducer, made: list[Any]
) -> None:
    settings = KafkaSettings.from_url(kafka.url)
    for options in ({}, {"client_id": "shop"}, {"url": settings.model_copy(update={"max_message": 5000})}, {}):
        await producer(**options)
    assert [one.client._client_id for one in made] == ["streamtools", "shop", "streamtools"]


async def test_what_one_has_closed_fails_and_the_others_go_on(kafka: KafkaAddress, queue: str) -> None:
    settings = KafkaSettings.from_url(kafka.url)
    one, two = Sender(settings, None), Sender(settings, None)
    async with AsyncExitStack() as stack:
        for sender in (one, two):
            stack.push_async_callback(sender.close)
            topics = await sender.open()
        await topics.declare([Topic(name=queue, partitions=1)], True)
        confirmed = asyncio.Event()
        producer = one._lease.value._producer  # type: ignore[union-attr]
        send = producer.send_batch

        async def slow(*args: Any, **kwargs: Any) -> Any:
            await confirmed.wait()
            return await send(*args, **kwargs)

        producer.send_batch = slow
        first = asyncio.create_task(one.publish(records_of([Message(body=b"1", queue=queue, id="1")] * 1000)))
        second = asyncio.create_task(two.publish(records_of([Message(body=b"2", queue=queue, id="2")] * 1000)))
        await eventually(lambda: one._pending and two._pending)
        await one.close()
        with pytest.raises(Closed):
            await first
        confirmed.set()
        await second
        with pytest.raises(Closed):
            await one.publish(records_of([Message(body=b"1", queue=queue, id="1")]))
    assert sum(record.value == b"2" for record in await records(kafka, queue)) == 1000


def test_one_event_loop_after_another_sends(kafka: KafkaAddress, queue: str) -> None:
    sender = KafkaProducer(queue, url=kafka.url)

    async def use(number: int) -> int | None:
        async with sender:
            offset: int | None = (await sender.send(number)).offset  # type: ignore[attr-defined]
            return offset

    assert [asyncio.run(use(number)) for number in range(3)] == [0, 1, 2]


# --- first messages to many topics ----------------------------------------------------------------


@pytest.fixture
async def many(kafka: KafkaAddress, admin: QueueAdmin) -> AsyncIterator[list[str]]:
    """Topics that are new."""
    names = [f"many-{secrets.token_hex(4)}.{n}" for n in range(300)]
    async with topics_at(KafkaSettings.from_url(kafka.url), "test") as topics:
        await topics.declare([Topic(name=name, partitions=1) for name in names], True)
    yield names
    for name in names:
        await admin._cluster.delete_topic(name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["each at once", "one after the other", "in one batch"])
async def test_first_messages_to_hundreds_of_topics_wait_for_answers_alone(
    producer: MakeProducer, many: list[str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = await producer(declare=False)
    batch = [Message(body=b"x", queue=name, id=name) for name in many]
    pauses: list[float] = []
    pause = asyncio.sleep

    async def counted(delay: float, result: Any = None) -> Any:
        pauses.append(delay)
        return await pause(delay, result)

    monkeypatch.setattr(asyncio, "sleep", counted)
    if how == "each at once":
        await asyncio.gather(*(sender.send_messages([message]) for message in batch))
    elif how == "in one batch":
        await sender.send_messages(batch)
    else:
        for message in batch:
            await sender.send_messages([message])
    assert sum(pauses) < 5  # 15 s at 50 ms each


async def test_nobody_waits_for_anothers_missing_topic(
    producer: MakeProducer, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = await producer()
    await sender.send("first")
    sender._sender._lease.value.partitions.forget(queue)
    found = asyncio.Event()
    cluster = sender._sender._lease.value._producer.client
    send = cluster.send

    async def slow(node: Any, request: Any, **options: Any) -> Any:
        if getattr(request, "_topics", None) == [f"{queue}.missing"]:
            await found.wait()
        return await send(node, request, **options)

    monkeypatch.setattr(cluster, "send", slow)
    waiting = asyncio.create_task(sender.send_messages([Message(body=b"x", queue=f"{queue}.missing", id="1")]))
    await eventually(lambda: sender._sender._lease.value.partitions._looking)
    async with asyncio.timeout(5):
        await sender.send("second")
    assert not waiting.done()
    found.set()
    with pytest.raises((QueueError, SendError), match="There is no topic"):
        await waiting


# --- a topic that goes ----------------------------------------------------------------------------


async def partitions(kafka: KafkaAddress, topic: str) -> int | None:
    """How many it has; None where there is no such topic."""
    async with topics_at(KafkaSettings.from_url(kafka.url), "test") as topics:
        return (await topics.find([topic])).get(topic)


async def test_a_topic_that_is_deleted_in_use_is_named_and_nobody_brings_it_back(
    kafka: KafkaAddress, admin: QueueAdmin, producer: MakeProducer, queue: str
) -> None:
    await admin.create(queue, partitions=4)
    sender, other = await producer(declare=False, send_timeout=90), await producer(f"{queue}.other", declare=False)
    await admin.create(other.queue)
    await sender.send("before")
    await admin.delete(queue)
    begun = time.monotonic()
    ends = await asyncio.gather(*(sender.send(n) for n in range(20)), return_exceptions=True)
    for end in ends:
        assert isinstance(end, SendError) and len(end.refused) == 1 and end.unknown == ()
        assert f"'{queue}' was deleted" in str(end) and "--partitions 4" in str(end)
    assert time.monotonic() - begun < 60
    await other.send("goes on")
    client = sender._sender._lease.value._producer.client
    client._topics.add(queue)
    await client.force_metadata_update()
    assert await partitions(kafka, queue) is None
    with pytest.raises(SendError, match="There is no topic"):
        await sender.send("still")
    await admin.create(queue, partitions=2)
    await sender.send("after")


async def test_a_producer_makes_its_own_topic_again_as_it_was(
    kafka: KafkaAddress, admin: QueueAdmin, producer: MakeProducer, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await admin.create(queue, partitions=4)
    sender = await producer()
    await sender.send("before")
    await admin.delete(queue)
    await asyncio.gather(*(sender.send(n, key=f"{n}") for n in range(100)))
    assert await partitions(kafka, queue) == 4
    assert sorted(int(record.value) for record in await records(kafka, queue)) == list(range(100))
    assert "was deleted while it was in use" in caplog.text and "partitions=4" in caplog.text


@pytest.mark.parametrize("declare", [True, False])
async def test_a_topic_that_is_made_anew_with_fewer_partitions_takes_all_that_is_sent(
    kafka: KafkaAddress,
    admin: QueueAdmin,
    producer: MakeProducer,
    queue: str,
    caplog: pytest.LogCaptureFixture,
    declare: bool,
) -> None:
    await admin.create(queue, partitions=4)
    sender = await producer(declare=declare)
    await sender.send_many([str(n) for n in range(40)])
    await admin.delete(queue)
    await admin.create(queue, partitions=2)
    async with asyncio.timeout(20):
        ends = await asyncio.gather(
            *(sender.send(n, key=f"{n}") for n in range(100)),
            *(sender.send(-1, partition=partition) for partition in (1, 3)),
            return_exceptions=True,
        )
    assert [end for end in ends[:-1] if isinstance(end, Exception)] == []
    assert isinstance(ends[-1], SendError) and "partitions 0 to 1 and no 3" in str(ends[-1])
    found = await records(kafka, queue)
    assert sorted(int(record.value) for record in found) == [-1, *range(100)]
    for record in found:
        if record.key is not None:
            assert record.partition == int(murmur2(record.key) & 0x7FFFFFFF) % 2, "as whoever sends anew has it"
    assert "made anew while messages were sent" in caplog.text and "Exception in callback" not in caplog.text
    await sender.send(100, key="a")


async def test_a_partition_that_is_not_known_is_asked_for_once_for_all_who_send_to_it(
    producer: MakeProducer, admin: QueueAdmin, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = await producer()
    await sender.send("old")
    await admin.alter(queue, partitions=2)
    asked, glance = [], Topics.glance

    async def count(self: Topics, names: Iterable[str]) -> Any:
        asked.append(list(names))
        return await glance(self, asked[-1])

    monkeypatch.setattr(Topics, "glance", count)
    await asyncio.gather(*(sender.send(str(n), partition=1) for n in range(20)))
    assert asked == [[queue]]
    await sender.send("known", partition=1)
    assert asked == [[queue]]
    with pytest.raises(SendError, match="partitions 0 to 1 and no 2"):
        await sender.send_many(["a", "b"], partition=2)
    assert asked == [[queue]] * 3  # of one broker, and of all
