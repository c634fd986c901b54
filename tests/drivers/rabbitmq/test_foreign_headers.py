"""What other programs put beside a body, on the real broker: it costs the message itself at most."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from urllib.parse import urlsplit

import pytest
from aiormq.abc import AbstractChannel
from pamqp.commands import Basic

from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.amqp.connection import open_connection
from streamtools.drivers.rabbitmq.looking.copy_channel import CopyChannel
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.settings import RabbitMQSettings
from tests.drivers.rabbitmq.test_fields import entry, header, nested, sized, text
from tests.faults.waiting import wait_until

pytestmark = pytest.mark.rabbitmq

#: Publishes (content header, body) as they are.
Publish = Callable[[Sequence[tuple[bytes, bytes]]], Awaitable[None]]

ENTRIES: dict[str, list[bytes]] = {
    "a time of before 1970": [entry(b"when", b"T" + (-86400).to_bytes(8, signed=True)), entry(b"a", text("b"))],
    "a nested time of before 1970": [entry(b"in", sized(b"F", entry(b"t", b"T" + b"\xff" * 8)))],
    "a thousand arrays": [entry(b"deep", nested(1000))],
    "an expiry in milliseconds": [entry(b"streamtools-expirytime", text("1700000000000"))],
    "a delivery count of seven": [entry(b"x-delivery-count", b"I\x00\x00\x00\x07")],
    "a delivery count of a broker's": [entry(b"x-delivery-count", b"l" + (7).to_bytes(8))],
    "counts and markers of elsewhere": [
        entry(b"x-acquired-count", b"l" + (9).to_bytes(8)), entry(b"x-first-death-queue", text("orders")),
        entry(b"x-death", text("no list")), entry(b"streamtools-attempt", text("1")),
    ],
    "a name of no UTF-8": [entry(b"\xff" * 100, text("x"))],
    "a name of 255 bytes": [entry(b"n" * 255, text("x"))],
    "130,500 bytes of headers": [entry(b"large", text(b"v" * 130_500))],
    "5,000 headers": [entry(b"h%d" % number, text("v" * 10)) for number in range(5000)],
    "values of no UTF-8": [entry(b"v", text(b"\xff\xfe"))],
}  # fmt: skip
#: Each with an id and a type that are no UTF-8.
STRANGE: dict[str, bytes] = {
    kind: header(*entries, id=b"\xff%d" % number, type=b"\xed\xa0\x80")
    for number, (kind, entries) in enumerate(ENTRIES.items())
}


@pytest.fixture
async def publish(url: str) -> AsyncIterator[Publish]:
    connection = await open_connection(RabbitMQSettings.from_url(url), "another program")
    channel = await CopyChannel.open(connection)

    async def publish_(messages: Sequence[tuple[bytes, bytes]]) -> None:
        await channel.publish([("", b"orders", data, body) for data, body in messages], 10)
        assert channel.error is None
        assert channel.unroutable == 0

    yield publish_
    await connection.close()


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_a_failing_message_goes_to_the_error_queue_with_its_body_and_holds_up_nothing(
    url: str, publish: Publish, queue_type: str
) -> None:
    handled: list[bytes] = []
    consumer = RabbitMQConsumer("orders", url=url, queue_type=queue_type, retry=Retry(retries=1, delay=0.1))

    @consumer()
    async def handle(message: Message) -> None:
        handled.append(message.body or b"")
        if message.body != b"plain":
            raise ValueError("no")

    plain = (b"\0\0", b"plain")
    async with consumer, RabbitMQAdmin(url=url) as admin:
        loop = asyncio.create_task(handle())
        for kind, data in STRANGE.items():
            await publish([(data, kind.encode()), plain])

        async def all_failed() -> bool:
            return (await admin.stats("error")).ready == len(STRANGE)

        await wait_until(all_failed)
        failed = await admin.peek("error", 100)
        loop.cancel()
        await asyncio.wait({loop})

    assert {message.body for message in failed} == {kind.encode() for kind in STRANGE}
    assert {message.error.queue for message in failed if message.error} == {"orders"}
    assert {message.error.attempts for message in failed if message.error} == {2}
    assert handled.count(b"plain") == len(STRANGE)


async def test_plain_text_without_a_content_type_is_text_and_gzip_is_undone(
    url: str, foreign: AbstractChannel
) -> None:
    texts: list[str] = []
    consumer = RabbitMQConsumer("orders", url=url, retry=Retry(retries=0))

    @consumer()
    async def handle(msg: str) -> None:
        texts.append(msg)

    sent = [b"hello", b"200", b"[1]", b'"quoted"', "größe".encode()]
    async with consumer:
        loop = asyncio.create_task(handle())
        for body in sent:
            await foreign.basic_publish(body, routing_key="orders")
        packed = Basic.Properties(content_encoding="gzip")
        await foreign.basic_publish(gzip.compress(b"packed"), routing_key="orders", properties=packed)
        await wait_until(lambda: len(texts) == 6)
        loop.cancel()
        await asyncio.wait({loop})
    assert texts == ["hello", "200", "[1]", "quoted", "größe", "packed"]


@pytest.mark.parametrize("delay", [0, 0.1])
async def test_retries_the_error_queue_and_a_redrive_keep_the_priority(
    url: str, foreign: AbstractChannel, delay: float
) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-max-priority": 10})
    properties = Basic.Properties(priority=7, message_id="urgent", user_id=urlsplit(url).username)
    await foreign.basic_publish(b"x", routing_key="orders", properties=properties)
    consumer = RabbitMQConsumer("orders", url=url, declare="passive", retry=Retry(retries=1, delay=delay, jitter=0))
    attempts: list[int] = []

    @consumer()
    async def handle(message: Message) -> None:
        attempts.append(message.attempt)
        raise ValueError("no")

    async with RabbitMQProducer("error", url=url), RabbitMQAdmin(url=url) as admin:
        loop = asyncio.create_task(handle())

        async def has_failed() -> bool:
            return (await admin.stats("error")).ready == 1

        await wait_until(has_failed)
        consumer.stop()
        await loop
        assert attempts == [1, 2]
        assert await admin.move("error", failed_in=["orders"]) == 1
        got = await foreign.basic_get("orders", no_ack=True)
        assert (got.body, got.header.properties.priority, got.header.properties.user_id) == (b"x", 7, None)


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_a_copied_count_is_not_believed_when_the_message_comes_again(
    url: str, publish: Publish, queue_type: str
) -> None:
    first = RabbitMQConsumer("orders", url=url, queue_type=queue_type)
    async with first:
        await publish([(STRANGE["a delivery count of a broker's"], b"1")])
        [delivery] = await first.receive(timeout=10)
        assert delivery.redeliveries == 0

    async with RabbitMQConsumer("orders", url=url, queue_type=queue_type) as second:
        [delivery] = await second.receive(timeout=10)
        assert delivery.redeliveries == 1
        await delivery.ack()


async def test_what_others_wrote_is_looked_at_and_stays(url: str, foreign: AbstractChannel, publish: Publish) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-queue-type": "quorum"})
    await publish([(data, kind.encode()) for kind, data in STRANGE.items()])

    async with RabbitMQAdmin(url=url) as admin:
        for _ in range(25):
            seen = await admin.peek("orders", 100)
            assert [message.body for message in seen] == [kind.encode() for kind in STRANGE]
            assert all(message.headers for message in seen if message.body == b"a thousand arrays")
