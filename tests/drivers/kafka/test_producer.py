"""What the producer promises, seen by the client library and by Kafka's own tools."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from typing import Any

import pytest

from streamtools import ConfigurationError, ConnectError, KafkaSettings, Message, QueueError, SendError
from streamtools.drivers.kafka import KafkaAdmin, KafkaProducer
from streamtools.drivers.kafka.brokers.cluster import TopicState
from streamtools.drivers.kafka.brokers.topics import Topic, Topics, topics_at
from streamtools.drivers.kafka.producer import KafkaReceipt
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.tools import kafka_tool
from tests.drivers.kafka.conftest import MakeProducer, known, records

pytestmark = pytest.mark.real_kafka("making topics")

LIMIT = {"max.message.bytes": "3000"}


async def limited(address: KafkaAddress, topic: str) -> None:
    arguments = ["--create", "--topic", topic, "--partitions", "1", "--config", "max.message.bytes=3000"]
    await asyncio.to_thread(kafka_tool, address.bootstrap, "kafka-topics", *arguments)
    await known(address, topic)


async def test_a_record_is_what_any_client_would_expect(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(client_id="shop")
    before = time.time()
    receipt = await sender.send({"id": 1}, key="k/1", type="orders.Placed", headers={"tenant": "ä", "ce_id": "mine"})
    [record] = await records(kafka, queue)
    assert (record.key, record.value) == (b"k/1", b'{"id":1}')
    assert before - 1 <= record.timestamp / 1000 <= time.time()
    assert dict(record.headers) == {
        "ce_specversion": b"1.0",
        "ce_id": receipt.id.encode(),
        "ce_type": b"orders.Placed",
        "ce_source": b"shop",
        "content-type": b"application/json",
        "tenant": "ä".encode(),
        "streamtools-user-ce_id": b"mine",
    }
    assert receipt == KafkaReceipt(id=receipt.id, queue=queue, partition=record.partition, offset=record.offset)


async def test_key_partition_and_timestamp_decide_where_and_when(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(partitions=4)
    an_hour_ago = int(time.time()) - 3600  # what is older than a week may be deleted at once (log.retention.hours)
    await sender.send("chosen", partition=2, timestamp=an_hour_ago + 0.5)
    by_key = {(await sender.send(n, key="same")).partition for n in range(5)}
    assert len(by_key) == 1
    [chosen] = [r for r in await records(kafka, queue) if r.value == b"chosen"]
    assert (chosen.partition, chosen.timestamp) == (2, an_hour_ago * 1000 + 500)
    with pytest.raises(SendError, match="partitions 0 to 3 and no 4") as caught:
        await sender.send("nowhere", partition=4)
    assert len(caught.value.refused) == 1
    with pytest.raises(ConfigurationError, match="milliseconds"):
        await sender.send(1, timestamp=1_600_000_000_500)


async def test_the_topic_is_made_as_asked(kafka: KafkaAddress, producer: MakeProducer, queue: str) -> None:
    await producer(partitions=3)
    settings = KafkaSettings(host=kafka.bootstrap, partitions=2)
    await producer(f"{queue}-2", url=settings)
    for topic, partitions in ((queue, 3), (f"{queue}-2", 2)):
        told = await asyncio.to_thread(kafka_tool, kafka.bootstrap, "kafka-topics", "--describe", "--topic", topic)
        assert f"Topic: {topic}\t" in told and f"PartitionCount: {partitions}\t" in told


async def test_a_missing_topic_is_never_made_when_creation_is_off(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(declare=False)
    with pytest.raises(SendError, match=rf"no topic '{queue}'.*streamtools queues create {queue}") as caught:
        await sender.send(1, id="x")
    assert caught.value.refused == ("x",)
    with pytest.raises(QueueError, match="declare=True"):
        await producer(declare="passive")
    assert queue not in await asyncio.to_thread(kafka_tool, kafka.bootstrap, "kafka-topics", "--list")


async def test_a_producer_at_work_uses_partitions_that_are_added(
    kafka: KafkaAddress, producer: MakeProducer, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtools.drivers.kafka.client.connect.METADATA_AGE", 0.3)
    monkeypatch.setattr("streamtools.drivers.kafka.producing.partitions.RECOUNT_INTERVAL", 0.0)
    sender = await producer(partitions=1)
    await sender.send("x", key="k")
    async with KafkaAdmin(url=kafka.url) as admin:
        await admin.alter(queue, partitions=6)

    async def where(sender: KafkaProducer) -> list[int | None]:
        return [(await sender.send("x", key=f"k-{n}")).partition for n in range(12)]

    async def agree() -> bool:
        return await where(sender) == await where(await producer())

    await eventually(agree)
    assert len(set(await where(sender))) > 1


async def test_send_many_keeps_the_order_and_names_what_was_refused(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    await limited(kafka, queue)
    sender = await producer()
    bodies = [b"%d" % n if n % 5 else b"x" * 4000 for n in range(40)]
    batch = [Message(body=body, queue=queue, id=f"{n}") for n, body in enumerate(bodies)]
    with pytest.raises(SendError, match="MESSAGE_TOO_LARGE") as caught:
        await sender.send_messages(batch)
    assert set(caught.value.refused) == {f"{n}" for n in range(0, 40, 5)} and not caught.value.unknown
    assert [r.value for r in await records(kafka, queue)] == [b"%d" % n for n in range(40) if n % 5]


async def test_what_the_broker_refuses_disturbs_no_other_send(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    await limited(kafka, queue)
    sender = await producer()

    async def send(n: int) -> object:
        return await sender.send(b"x" * 4000 if n % 10 == 0 else b"%d" % n)

    ends = await asyncio.gather(*(send(n) for n in range(100)), return_exceptions=True)
    assert [n for n, end in enumerate(ends) if isinstance(end, SendError)] == list(range(0, 100, 10))
    assert {r.value for r in await records(kafka, queue)} == {b"%d" % n for n in range(100) if n % 10}
    assert (await sender.send("after")).offset == 90


@pytest.mark.real_kafka("compacted topics")
async def test_a_compacted_topic_refuses_what_has_no_key_at_once(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    """It was sent again and again, each time by a new producer, until `send_timeout` was over."""
    settings = KafkaSettings.from_url(kafka.url)
    async with topics_at(settings, "test") as topics:
        await topics.declare([Topic(name=queue, partitions=1, config={"cleanup.policy": "compact"})], True)
    sender = await producer()
    with pytest.raises(SendError, match=r"wants a key: send\(key=") as caught:
        await sender.send("nameless", id="1")
    assert caught.value.refused == ("1",)
    await sender.send("named", key="a")


#: What one message of many can be refused for: the topic's settings, and the message.
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "INVALID_RECORD": ({"cleanup.policy": "compact"}, {"key": None}),
    "MESSAGE_TOO_LARGE": ({"max.message.bytes": "2000"}, {"payload": "x" * 3000}),
    "INVALID_TIMESTAMP": ({"message.timestamp.before.max.ms": "60000"}, {"timestamp": 1000.0}),
}


@pytest.mark.real_kafka("settings of topics")
@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("bad", [[0], [57], [99], [3, 4, 50], [*range(0, 100, 9)]])
async def test_one_refused_message_costs_none_of_its_neighbours(
    kafka: KafkaAddress, producer: MakeProducer, queue: str, reason: str, bad: list[int]
) -> None:
    config, changes = REFUSED[reason]
    async with topics_at(KafkaSettings.from_url(kafka.url), "test") as topics:
        await topics.declare([Topic(name=queue, partitions=1, config=config)], True)
    sender = await producer()

    async def send(number: int) -> None:
        options: dict[str, Any] = {"payload": f"{number}", "key": "k", "id": f"{number}"}
        await sender.send(**options | (changes if number in bad else {}))

    ends = await asyncio.gather(*map(send, range(100)), return_exceptions=True)
    failed = {n: end for n, end in enumerate(ends) if end is not None}
    assert sorted(failed) == bad
    for number, error in failed.items():
        assert isinstance(error, SendError) and error.refused == (f"{number}",) and reason in str(error)
    found = [int(record.value) for record in await records(kafka, queue)]
    assert sorted(found) == [n for n in range(100) if n not in bad]
    assert (await sender.send("after", key="k")).offset == 100 - len(bad)


@pytest.mark.real_kafka("settings of topics")
async def test_of_a_batch_that_is_sent_at_once_just_the_refused_ones_are_named_and_the_order_holds(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    async with topics_at(KafkaSettings.from_url(kafka.url), "test") as topics:
        await topics.declare([Topic(name=queue, partitions=1, config={"max.message.bytes": "2000"})], True)
    sender = await producer()
    payloads = ["x" * 3000 if n in (7, 300, 301, 999) else f"{n}" for n in range(1000)]
    with pytest.raises(SendError, match="4 messages refused") as caught:
        await sender.send_many(payloads)
    assert len(caught.value.refused) == len(caught.value.unfit) == 4 and caught.value.unknown == ()
    expected = [n for n in range(1000) if n not in (7, 300, 301, 999)]
    assert [int(record.value) for record in await records(kafka, queue)] == expected


async def test_what_the_library_cannot_write_is_refused_alone(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(partitions=1)
    good = [Message(body=b"%d" % n, queue=queue, id=f"{n}") for n in range(10)]
    good[4] = good[4].replace(headers={"name \udcff": "x"})
    with pytest.raises(SendError, match="cannot be written") as caught:
        await sender.send_messages(good)
    assert caught.value.refused == caught.value.unfit == ("4",)
    assert [int(record.value) for record in await records(kafka, queue)] == [n for n in range(10) if n != 4]


NEVER = [math.nan, math.inf, -math.inf, 1e12, -1e300]


@pytest.mark.parametrize("field", ["time", "deliver_at", "expires_at"])
async def test_a_time_that_cannot_be_written_costs_its_message_alone(
    kafka: KafkaAddress, producer: MakeProducer, queue: str, field: str
) -> None:
    sender = await producer(partitions=1)
    batch = [Message(body=b"%d" % n, queue=queue, id=f"{n}") for n in range(10)]
    for number, never in enumerate(NEVER):
        batch[2 * number] = batch[2 * number].replace(**{field: never})
    with pytest.raises(SendError, match=f"{field}=nan is no time of the years 1 to 9999") as caught:
        await sender.send_messages(batch)
    assert caught.value.refused == caught.value.unfit == ("0", "2", "4", "6", "8")
    assert [int(record.value) for record in await records(kafka, queue)] == [1, 3, 5, 7, 9]


async def test_thousands_of_first_sends_at_once_ask_for_the_topic_once(
    producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    glance = Topics.glance

    async def counted(topics: Topics, names: Iterable[str]) -> dict[str, TopicState]:
        names = list(names)
        asked.extend(names)
        return await glance(topics, names)

    sender = await producer()
    monkeypatch.setattr(Topics, "glance", counted)
    receipts = await asyncio.gather(*(sender.send(n) for n in range(5000)))
    assert len(receipts) == 5000 and asked == [sender.queue]


async def test_a_message_over_the_clients_own_limit_never_leaves(producer: MakeProducer) -> None:
    sender = await producer()
    with pytest.raises(SendError, match="max_message=1048576") as caught:
        await sender.send(b"x" * 1_100_000, id="big")
    assert caught.value.refused == ("big",)
    await sender.send("next")


async def test_without_waiting_the_receipt_can_be_awaited(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer()
    receipts = [await sender.send(n, wait=False) for n in range(100)]
    confirmed = [await receipt for receipt in receipts]
    assert [r.offset for r in confirmed] == list(range(100))
    assert [r.id for r in confirmed] == [r.id for r in receipts]
    assert await confirmed[0] is confirmed[0]


async def test_flush_and_close_wait_for_what_is_under_way(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    sender = await producer(method="async")
    for n in range(200):
        await sender.send(n)
    await sender.flush()
    assert len(await records(kafka, queue)) == 200
    for n in range(200):
        await sender.send(n)
    await sender.close()
    assert len(await records(kafka, queue)) == 400


async def test_flush_names_what_failed(kafka: KafkaAddress, producer: MakeProducer, queue: str) -> None:
    await limited(kafka, queue)
    sender = await producer()
    receipt = await sender.send(b"x" * 4000, wait=False, id="big")
    await sender.send(b"small", wait=False)
    with pytest.raises(SendError) as caught:
        await sender.flush()
    assert caught.value.refused == ("big",)
    with pytest.raises(SendError, match="too large"):
        await receipt
    await sender.flush()


async def test_a_method_of_another_protocol_means_nothing_here(producer: MakeProducer) -> None:
    sender = await producer(method="POST")
    assert isinstance(await sender.send(1, method="PUT"), KafkaReceipt)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_users_and_tls(kafka: KafkaAddress, producer: MakeProducer, queue: str, mechanism: str) -> None:
    if kafka.sasl_url is None or kafka.sasl_tls_url is None:
        pytest.skip("this Kafka has no listeners with users")
    for url, tls in ((kafka.sasl_url, False), (kafka.sasl_tls_url, True)):
        settings = KafkaSettings(
            host=url.partition("://")[2].rstrip("/"), username=kafka.username, password=kafka.password,
            sasl=mechanism, tls=tls, cafile=kafka.ca,
        )  # fmt: skip
        assert (await (await producer(url=settings)).send(1)).id
        wrong = settings.model_copy(update={"password": KafkaSettings(password="secret-no").password})
        with pytest.raises(ConnectError, match=f"refuses the user 'tester'.*{mechanism}") as caught:
            await producer(url=wrong)
        assert caught.value.permanent and "secret-no" not in str(caught.value)


async def test_what_cannot_be_reached_says_why(kafka: KafkaAddress, producer: MakeProducer) -> None:
    with pytest.raises(ConnectError, match=r"127.0.0.1:1 cannot be reached"):
        await producer(url="kafka://127.0.0.1:1", send_timeout=3)
    with pytest.raises(ConnectError, match="has no address"):
        await producer(url="kafka://no.such.host.invalid", send_timeout=3)
    if kafka.sasl_url is not None:
        with pytest.raises(ConnectError, match=r"closed the connection.*kafka://user:password@host"):
            await producer(url=kafka.sasl_url, send_timeout=3)
    if kafka.tls_url is not None:
        with pytest.raises(ConnectError, match="if it wants TLS write kafkas://"):
            await producer(url=kafka.tls_url, send_timeout=3)
        host = kafka.tls_url.partition("://")[2].rstrip("/")
        with pytest.raises(ConnectError, match="certificate that cannot be verified") as caught:
            await producer(url=KafkaSettings(host=host, tls=True))
        assert caught.value.permanent
        await producer(url=KafkaSettings(host=host, tls=True, cafile=kafka.ca))
        with pytest.raises(ConnectError, match="of its TLS listener"):
            await producer(url=KafkaSettings(host=kafka.bootstrap, tls=True), send_timeout=3)


async def test_names_that_kafka_does_not_take_are_refused_at_once() -> None:
    for name in ("a/b", "ä", "a b", ".", "..", "x" * 250):
        with pytest.raises(ConfigurationError):
            KafkaProducer(name, url="kafka://h")
