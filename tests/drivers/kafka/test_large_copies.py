"""Copies of messages that are larger than what we send ourselves, and topics that take no copy at all."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamtools import QueueAdmin, Retry
from streamtools.message import Message
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import Running, records

#: Bytes of a body that no producer of ours sends by default.
LARGE = 3_000_000


async def make_topic(kafka: KafkaAddress, name: str, **settings: str) -> None:
    """A topic with these settings, as an operator makes it."""
    client = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await client.start()
    try:
        config = {setting.replace("_", "."): value for setting, value in settings.items()}
        await client.create_topics([NewTopic(name, 1, 1, topic_configs=config)])
    finally:
        await client.close()


async def send(kafka: KafkaAddress, topic: str, *bodies: bytes) -> None:
    """As another program does."""
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, max_request_size=9_000_000) as producer:
        for body in bodies:
            await producer.send_and_wait(topic, body)


class Fails:
    """Handles what begins with "ok", and fails on all else."""

    def __init__(self) -> None:
        self.done: set[bytes] = set()
        self.failed = 0

    async def __call__(self, message: Message) -> None:
        body = message.body or b""
        if not body.startswith(b"ok"):
            self.failed += 1
            raise ValueError("no")
        self.done.add(body)


@pytest.mark.parametrize("exactly_once", [False, True])
@pytest.mark.real_kafka("max.message.bytes")
async def test_what_a_topic_has_held_goes_through_a_retry_to_the_error_queue(
    kafka: KafkaAddress, admin: QueueAdmin, queue: str, running: Running, exactly_once: bool
) -> None:
    await make_topic(kafka, queue, max_message_bytes="8000000")
    handle = Fails()
    options: dict[str, Any] = {"exactly_once": exactly_once, "retry": Retry(retries=1, delay=0.01)}
    async with running(handle, **options):
        await send(kafka, queue, b"B" * LARGE, b"ok")

        async def is_put_aside() -> bool:
            return (await admin.stats(f"{queue}.error")).ready >= 1  # the end of a transaction may count, too

        await eventually(is_put_aside, timeout=30)
        assert handle.failed == 2 and handle.done == {b"ok"}
    assert await admin.move(f"{queue}.error", queue) == 1  # from there back again, which is a copy, too
    assert [len(r.value) for r in await records(kafka, queue, committed=exactly_once)].count(LARGE) == 2


@pytest.mark.real_kafka("max.message.bytes")
async def test_a_producer_of_ours_keeps_to_its_limit(kafka: KafkaAddress, queue: str, producer: Any) -> None:
    await make_topic(kafka, queue, max_message_bytes="8000000")
    with pytest.raises(Exception, match="KAFKA_MAX_MESSAGE"):
        await (await producer()).send(b"B" * LARGE)


@pytest.mark.parametrize("exactly_once", [False, True])
@pytest.mark.parametrize(
    ("settings", "body", "advice"),
    [
        ({"max_message_bytes": "2000"}, b"B" * 5000, "--add-config max.message.bytes="),
        ({"cleanup_policy": "compact"}, b"B", "--add-config cleanup.policy=delete"),
    ],
)
@pytest.mark.real_kafka("max.message.bytes, compaction")
async def test_an_error_queue_that_takes_no_copy_holds_up_no_other_and_the_log_says_what_to_type(
    kafka: KafkaAddress, queue: str, running: Running, caplog: pytest.LogCaptureFixture,
    settings: dict[str, str], body: bytes, advice: str, exactly_once: bool,
) -> None:  # fmt: skip
    await make_topic(kafka, f"{queue}.error", **settings)
    handle = Fails()
    with caplog.at_level(logging.ERROR, "streamtools"):
        async with running(handle, exactly_once=exactly_once, retry=Retry(retries=0), prefetch=2):
            await send(kafka, queue, *[body] * 3, *(b"ok%d" % n for n in range(20)))
            await eventually(lambda: len(handle.done) == 20, timeout=30)
            await eventually(lambda: "is held back" in caplog.text, timeout=30)
    held = [record.getMessage() for record in caplog.records if "is held back" in record.getMessage()]
    assert all(f"--entity-name {queue}.error" in line and advice in line for line in held), held
