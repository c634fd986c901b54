"""The least that a user must be allowed, as docs/protocols/kafka.md tells it: with just these all works."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from streamtools import ConnectError, Reject, Retry, SendError
from streamtools.consumer import BoundHandler
from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer, KafkaProducer
from streamtools.testing import eventually
from tests.brokers.kafka.node import KafkaNode
from tests.drivers.kafka.conftest import records

pytestmark = [pytest.mark.real_kafka("permissions"), pytest.mark.slow]


#: Gives the user a right: what it is on, its name, and the operations.
Allow = Callable[..., None]


@pytest.fixture
def allow(strict: KafkaNode) -> Allow:
    admin = AdminClient({"bootstrap.servers": strict.address.bootstrap})

    def allow(kind: str, name: str, *operations: str) -> None:
        on = ResourceType[kind.upper().replace("-", "_")], name, ResourcePatternType.LITERAL
        given = [
            AclBinding(*on, "User:tester", "*", AclOperation[operation.upper()], AclPermissionType.ALLOW)
            for operation in operations
        ]
        for answer in admin.create_acls(given).values():
            answer.result(30)

    return allow


@pytest.fixture
def url(strict: KafkaNode) -> str:
    address = strict.address
    assert address.sasl_url is not None and address.username is not None and address.password is not None
    user = f"{quote(address.username, safe='')}:{quote(address.password, safe='')}"
    return address.sasl_url.replace("kafka://", f"kafka://{user}@")


async def made(strict: KafkaNode, *topics: str) -> None:
    async with KafkaAdmin(url=strict.url) as admin:
        for topic in topics:
            await admin.create(topic, partitions=2)


async def test_sending_wants_write_on_the_topic_and_its_refusal_names_it(
    strict: KafkaNode, allow: Allow, url: str, queue: str
) -> None:
    await made(strict, queue, f"{queue}.other")
    await asyncio.to_thread(allow, "topic", queue, "Write")
    async with KafkaProducer(queue, url=url, declare=False) as producer:
        await producer.send("x")
        async with KafkaProducer(f"{queue}.other", url=url, declare=False) as other:
            ends = await asyncio.gather(other.send("no"), producer.send("y"), return_exceptions=True)
    assert isinstance(ends[0], SendError) and "TOPIC_AUTHORIZATION_FAILED" in str(ends[0])
    assert sorted(record.value for record in await records(strict.address, queue)) == [b"x", b"y"]


async def test_handling_wants_read_on_topic_and_group_and_write_where_copies_go(
    strict: KafkaNode, allow: Allow, url: str, queue: str
) -> None:
    await made(strict, queue, f"{queue}.error", f"{queue}.retry")
    await asyncio.to_thread(allow, "topic", queue, "Read")
    await asyncio.to_thread(allow, "topic", f"{queue}.retry", "Read", "Write")
    await asyncio.to_thread(allow, "topic", f"{queue}.error", "Write")
    await asyncio.to_thread(allow, "group", queue, "Read")
    runs: list[str] = []

    async def handle(msg: str) -> None:
        runs.append(msg)
        if len(runs) == 1:
            raise ConnectionError("once more")
        raise Reject("never")

    consumer = KafkaConsumer(queue, url=url, declare=False, error_queue="{queue}.error", retry=Retry(delay=0.05))
    task = asyncio.create_task(consumer.run(BoundHandler(consumer, handle)))
    async with KafkaProducer(queue, url=strict.url, declare=False) as producer:
        await producer.send("x")

    async def rejected() -> Any:
        return await records(strict.address, f"{queue}.error")

    await eventually(rejected, timeout=60)
    consumer.stop(10)
    await task
    assert runs == ["x", "x"]


async def test_a_transaction_wants_write_on_its_id_and_says_so(
    strict: KafkaNode, allow: Allow, url: str, queue: str
) -> None:
    await made(strict, queue)
    await asyncio.to_thread(allow, "topic", queue, "Write")
    async with KafkaProducer(queue, url=url, declare=False) as producer:
        with pytest.raises(ConnectError, match="TRANSACTIONAL_ID_AUTHORIZATION_FAILED") as caught:
            async with producer.transaction():
                await producer.send("no")
        assert caught.value.permanent
        await asyncio.to_thread(allow, "transactional-id", "*", "Write")
        async with producer.transaction():
            await producer.send("x")
    assert [r.value for r in await records(strict.address, queue, committed=True)] == [b"x"]


async def test_in_a_transaction_a_topic_that_may_not_be_written_to_is_named_too(
    strict: KafkaNode, allow: Allow, url: str, queue: str
) -> None:
    await made(strict, queue, f"{queue}.other")
    await asyncio.to_thread(allow, "topic", queue, "Write")
    await asyncio.to_thread(allow, "topic", f"{queue}.other", "Describe")
    await asyncio.to_thread(allow, "transactional-id", "*", "Write")
    async with KafkaProducer(queue, url=url, declare=False) as producer:
        other = KafkaProducer(f"{queue}.other", url=url, declare=False)
        async with other, asyncio.timeout(15):
            with pytest.raises(SendError, match="TOPIC_AUTHORIZATION_FAILED") as caught:
                async with producer.transaction():
                    await producer.send("x", id="1")
                    await other.send("no", id="2")
            assert caught.value.refused == ("2",)
            async with producer.transaction():
                await producer.send("y")
    assert [r.value for r in await records(strict.address, queue, committed=True)] == [b"y"]


@pytest.mark.parametrize("known", [True, False], ids=["described", "hidden"])
@pytest.mark.parametrize("bad", [{13}, {0, 29}, set(range(10, 20))], ids=["one", "first and last", "ten"])
async def test_exactly_once_a_handler_that_sends_where_it_may_not_fails_alone(
    strict: KafkaNode, allow: Allow, url: str, queue: str, bad: set[int], known: bool
) -> None:
    out, shut = f"{queue}.out", f"{queue}.shut"
    await made(strict, queue, f"{queue}.error", f"{queue}.retry", out, shut)
    await allowed_exactly_once(allow, queue, out)
    if known:
        await asyncio.to_thread(allow, "topic", shut, "Describe")
    runs: Counter[int] = Counter()
    async with KafkaProducer(out, url=url, declare=False) as good, KafkaProducer(shut, url=url, declare=False) as no:

        async def handle(msg: int) -> None:
            runs[msg] += 1
            await good.send(b"%d" % msg + b" " * 40_000)  # of several batches
            if msg in bad:
                await no.send(msg)

        async with KafkaProducer(queue, url=strict.url, declare=False) as sender:
            await sender.send_many(range(30), partition=0)
        consumer = KafkaConsumer(
            queue, url=url, declare=False, error_queue="{queue}.error", exactly_once=True, concurrency=30
        )
        task = asyncio.create_task(consumer.run(BoundHandler(consumer, handle)))

        async def is_done() -> bool:
            return await has(strict, out, 30 - len(bad)) and await has(strict, f"{queue}.error", len(bad))

        await eventually(is_done, timeout=60)
        async with KafkaProducer(queue, url=strict.url, declare=False) as sender:
            await sender.send_many(range(30, 35), partition=0)  # in transactions of the same id
        await eventually(lambda: has(strict, out, 35 - len(bad)), timeout=60)
        consumer.stop(10)
        await task
    outputs = [int(r.value) for r in await records(strict.address, out, committed=True)]
    assert sorted(outputs) == [n for n in range(35) if n not in bad]
    errors = await records(strict.address, f"{queue}.error", committed=True)
    assert sorted(int(r.value) for r in errors) == sorted(bad)
    for error in errors:
        told = dict(error.headers)["ce_errormessage"]
        assert b"TOPIC_AUTHORIZATION_FAILED" in told and shut.encode() in told
    assert set(runs.values()) == {1}


async def allowed_exactly_once(allow: Allow, queue: str, *outputs: str) -> None:
    """What docs/protocols/kafka.md says that a consumer with exactly_once=True needs."""
    await asyncio.to_thread(allow, "topic", queue, "Read")
    await asyncio.to_thread(allow, "topic", f"{queue}.retry", "Read", "Write")
    for topic in (f"{queue}.error", *outputs):
        await asyncio.to_thread(allow, "topic", topic, "Write")
    await asyncio.to_thread(allow, "group", queue, "Read")
    await asyncio.to_thread(allow, "transactional-id", "*", "Write")


async def has(strict: KafkaNode, topic: str, number: int) -> bool:
    return len(await records(strict.address, topic, committed=True)) >= number
