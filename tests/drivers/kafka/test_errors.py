"""What can go wrong has a clear error each, nothing is lost by it, and the consumer lives."""

from __future__ import annotations

import asyncio

import pytest

from streamtools import ConnectError, KafkaSettings, Message, QueueError, Retry, SendError
from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.tools import group_rows, kafka_tool
from tests.drivers.kafka.conftest import MakeProducer, Running, known, records

pytestmark = pytest.mark.real_kafka("making topics")


async def make(address: KafkaAddress, topic: str, *, largest: int) -> None:
    """A topic that takes no larger batch than this."""
    arguments = ["--create", "--topic", topic, "--partitions", "1", "--config", f"max.message.bytes={largest}"]
    await asyncio.to_thread(kafka_tool, address.bootstrap, "kafka-topics", *arguments)
    await known(address, topic)


async def alter(address: KafkaAddress, topic: str, setting: str) -> None:
    """One more setting of a topic."""
    arguments = ["--alter", "--entity-type", "topics", "--entity-name", topic, "--add-config", setting]
    await asyncio.to_thread(kafka_tool, address.bootstrap, "kafka-configs", *arguments)


async def test_a_consumer_that_cannot_reach_kafka_says_which_host_and_why(queue: str) -> None:
    for url, why in (
        ("kafka://127.0.0.1:1", r"127.0.0.1:1 cannot be reached"),
        ("kafka://no.such.host.invalid", "no address"),
    ):
        with pytest.raises(ConnectError, match=why):
            await KafkaConsumer(queue, url=url, connect_timeout=0.2).open()


async def test_a_consumer_with_a_wrong_password_says_so_at_once_and_shows_no_password(
    kafka: KafkaAddress, queue: str
) -> None:
    if kafka.sasl_url is None:
        pytest.skip("this Kafka has no listeners with users")
    host = kafka.sasl_url.partition("://")[2].rstrip("/")
    settings = KafkaSettings(host=host, username=kafka.username, password="secret-no", sasl="SCRAM-SHA-256")
    with pytest.raises(ConnectError, match="refuses the user 'tester'") as caught:
        await KafkaConsumer(queue, url=settings).open()
    assert caught.value.permanent and "secret-no" not in f"{caught.value}{caught.value.__cause__}"


async def test_an_unknown_topic_with_creation_off_is_named_and_never_made(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(declare=False)
    with pytest.raises(SendError, match=f"no topic '{queue}'.*streamtools queues create {queue}"):
        await sender.send(1)
    with pytest.raises(QueueError, match=f"no topic '{queue}'"):
        await KafkaConsumer(queue, url=kafka.url, declare=False).open()
    assert queue not in await asyncio.to_thread(kafka_tool, kafka.bootstrap, "kafka-topics", "--list")


async def test_a_message_over_the_brokers_limit_is_refused_by_name_and_the_others_are_held(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[str] = []

    async def handle(msg: str) -> None:
        seen.append(msg)

    await make(kafka, queue, largest=3000)
    sender = await producer()
    async with running(handle):
        await sender.send("before")
        with pytest.raises(SendError, match=r"MESSAGE_TOO_LARGE.*max\.message\.bytes") as caught:
            await sender.send("x" * 4000, id="big")
        await sender.send("behind")
        await eventually(lambda: len(seen) == 2)
    assert caught.value.refused == ("big",) and seen == ["before", "behind"]


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_a_message_as_large_as_may_be_is_retried_rejected_and_redriven_with_all_that_is_said_of_it(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, exactly_once: bool
) -> None:
    runs: list[int] = []

    async def handle(msg: bytes, message: Message) -> None:
        runs.append(message.attempt)
        if len(runs) < 3:
            raise ValueError("never " * 1000)

    options = {"retry": Retry(retries=1, delay=0.01), "exactly_once": exactly_once}
    body = b"x" * (1024 * 1024 - 200)
    async with KafkaAdmin(url=kafka.url) as admin, running(handle, **options):
        await (await producer()).send(body)
        await eventually(lambda: _holds(kafka, f"{queue}.error", body))
        assert await admin.move(f"{queue}.error") == 1
        await eventually(lambda: runs == [1, 2, 1])


async def test_a_rejected_message_that_its_error_topic_does_not_take_stays_until_it_does(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    async def handle(msg: str) -> None:
        if len(msg) > 100:
            raise ValueError("never")
        seen.append(msg)

    await make(kafka, f"{queue}.error", largest=1000)
    sender = await producer()
    async with running(handle, retry=Retry(retries=0), concurrency=2):
        await sender.send("x" * 2000)
        await sender.send_many(["a", "b", "c"])
        await eventually(lambda: seen == ["a", "b", "c"], "the consumer lives")
        await eventually(lambda: "max.message.bytes" in caplog.text, "the log says why")
        assert await records(kafka, f"{queue}.error") == []
        await alter(kafka, f"{queue}.error", "max.message.bytes=100000")
        await eventually(lambda: _holds(kafka, f"{queue}.error", b"x" * 2000), "it is moved after all")
    assert await _lag(kafka, queue) == 0


async def test_a_rejected_message_that_could_not_be_moved_comes_again_after_a_restart(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[int] = []

    async def handle(msg: str) -> None:
        seen.append(len(msg))
        if len(msg) > 100:
            raise ValueError("never")

    await make(kafka, f"{queue}.error", largest=1000)
    sender = await producer()
    async with running(handle, retry=Retry(retries=0), grace=0.1):
        await sender.send("x" * 2000)
        await sender.send("a")
        await eventually(lambda: seen == [2000, 1])
    await alter(kafka, f"{queue}.error", "max.message.bytes=100000")
    async with running(handle, retry=Retry(retries=0)):
        await eventually(lambda: _holds(kafka, f"{queue}.error", b"x" * 2000))
    assert seen == [2000, 1, 2000], "only what could not be moved is handled again"
    assert await _lag(kafka, queue) == 0


async def _holds(address: KafkaAddress, topic: str, body: bytes) -> bool:
    return [record.value for record in await records(address, topic)] == [body]


async def _lag(address: KafkaAddress, queue: str) -> int:
    """What Kafka's own tool says of the group that is named as its queue."""
    rows = await asyncio.to_thread(group_rows, address.bootstrap, queue, queue)
    return sum(lag or 0 for _, _, lag in rows.values())
