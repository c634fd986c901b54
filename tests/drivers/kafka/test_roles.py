"""The users of docs/operate/security.md: with just the rights that stand there, each does its work."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamtools import Bus, Command, Event, Exchange, Retry
from streamtools.consumer import BoundHandler
from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer, KafkaProducer
from streamtools.errors import StreamToolsError
from streamtools.testing import eventually
from tests import rights
from tests.brokers.kafka.node import KafkaNode
from tests.drivers.kafka.conftest import records

pytestmark = [pytest.mark.real_kafka("permissions"), pytest.mark.slow]

SHOP = Exchange("shop")
#: Makes a user as the page says, for the test's queue; its URL.
UrlOf = Callable[[str], Awaitable[str]]


class Sold(Event, name="roles.Sold"):
    """What is published."""

    id: int


class Ask(Command, name="roles.Ask"):
    """What is asked."""

    id: int


@pytest.fixture
def url_of(strict: KafkaNode, queue: str) -> UrlOf:
    names = {
        "site.replies.": f"site-{queue}.replies.",
        "orders": queue,
        "orders.retry": f"{queue}.retry",
        "error": f"{queue}.error",
    }

    async def make(user: str) -> str:
        name = f"{user}-{secrets.token_hex(4)}"
        password = ["--add-config", "SCRAM-SHA-256=[password=little]"]
        calls = [["kafka-configs", "--alter", *password, "--entity-type", "users", "--entity-name", name]]
        for words in rights.kafka(user):
            given = [names.get(word, word) for word in words]
            calls.append(["kafka-acls", "--add", "--allow-principal", f"User:{name}", *given])
        await asyncio.gather(*(asyncio.to_thread(strict.tool, *call) for call in calls))
        host = str(strict.address.sasl_url).removeprefix("kafka://")
        return f"kafka://{name}:little@{host}?sasl=SCRAM-SHA-256"

    return make


@pytest.fixture
async def deployed(strict: KafkaNode, queue: str) -> None:
    async with KafkaAdmin(url=strict.url) as admin:
        for topic in (queue, f"{queue}.retry", f"{queue}.error"):
            await admin.create(topic, partitions=2)
        await admin.bind(queue, "roles.*", SHOP)


async def bodies(strict: KafkaNode, topic: str) -> list[Any]:
    return [record.value for record in await records(strict.address, topic)]


async def test_a_deployer_makes_what_there_is(strict: KafkaNode, url_of: UrlOf, queue: str) -> None:
    async with KafkaAdmin(url=await url_of("deployer")) as admin:
        for topic in (queue, f"{queue}.retry", f"{queue}.error"):
            await admin.create(topic, partitions=2)
        await admin.bind(queue, "deployed.*", SHOP)
    async with KafkaAdmin(url=strict.url) as admin:
        assert {queue, f"{queue}.error"} <= {info.name for info in await admin.list()}


@pytest.mark.usefixtures("deployed")
async def test_a_sender_sends_and_does_no_more(strict: KafkaNode, url_of: UrlOf, queue: str) -> None:
    url = await url_of("sender")
    async with KafkaProducer(queue, url=url, declare=False) as producer:
        await producer.send("x")
    assert await bodies(strict, queue) == [b"x"]
    with pytest.raises(StreamToolsError, match="AUTHORIZATION_FAILED"):
        async with KafkaProducer(f"{queue}.error", url=url, declare=False) as other:
            await other.send("x")


@pytest.mark.usefixtures("deployed")
async def test_a_publisher_publishes_to_who_is_bound(strict: KafkaNode, url_of: UrlOf, queue: str) -> None:
    async with Bus(url=await url_of("publisher")) as bus:
        try:
            await bus.publish(Sold(id=1), exchange=SHOP)
        except StreamToolsError as error:  # queues of the tests before are bound, too, and not ours to write to
            assert queue not in str(error).split("AUTHORIZATION_FAILED")[-1]
    assert len(await bodies(strict, queue)) == 1


@pytest.mark.usefixtures("deployed")
async def test_a_worker_retries_and_rejects(strict: KafkaNode, url_of: UrlOf, queue: str) -> None:
    attempts: list[str] = []

    async def handle(msg: str) -> None:
        attempts.append(msg)
        raise ValueError("never")

    consumer = KafkaConsumer(
        queue,
        url=await url_of("worker"),
        declare=False,
        error_queue="{queue}.error",
        retry=Retry(retries=1, delay=0.05),
    )
    task = asyncio.create_task(consumer.run(BoundHandler(consumer, handle)))
    async with KafkaProducer(queue, url=strict.url, declare=False) as producer:
        await producer.send("x")

    async def rejected() -> Any:
        return await bodies(strict, f"{queue}.error")

    await eventually(rejected, timeout=60)
    consumer.stop(10)
    await task
    assert attempts == ["x", "x"]


@pytest.mark.usefixtures("deployed")
async def test_a_requester_asks_and_a_responder_answers(
    strict: KafkaNode, url_of: UrlOf, queue: str, caplog: Any
) -> None:
    asking, answering = await asyncio.gather(url_of("requester"), url_of("responder"))
    service = Bus(queue, url=answering, declare=False, error_queue="{queue}.error")

    @service.handler
    async def answer(ask: Ask) -> Any:
        return Sold(id=ask.id)

    async with service, Bus(url=asking, client_id=f"site-{queue}", error_queue=f"{queue}.error") as site:
        await service.start()
        reply = await site.request(Ask(id=7), to=queue, timeout=60)
    assert "7" in str(reply)
    assert "AUTHORIZATION_FAILED" not in caplog.text
    async with KafkaAdmin(url=strict.url) as admin:  # the topic for replies is gone
        assert not [info.name for info in await admin.list() if info.name.startswith(f"site-{queue}")]


@pytest.mark.usefixtures("deployed")
async def test_an_operator_lists_looks_and_puts_back(strict: KafkaNode, url_of: UrlOf, queue: str) -> None:
    async with KafkaProducer(f"{queue}.error", url=strict.url, declare=False) as producer:
        await producer.send("x")
    async with KafkaAdmin(url=await url_of("operator")) as admin:
        assert queue in {info.name for info in await admin.list()}
        assert [message.body for message in await admin.peek(f"{queue}.error", 5)] == [b"x"]
        assert await admin.move(f"{queue}.error", queue) == 1
    assert await bodies(strict, queue) == [b"x"]
