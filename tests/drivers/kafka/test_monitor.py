"""What an operator sees of an outage: one line when it begins, one when it is over, and an endpoint that says so."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import NotLeaderForPartitionError, TopicAuthorizationFailedError

from streamtools import ConsumerFactory, ConsumerRunner, Producer, QueueAdmin
from streamtools.drivers.kafka.client.monitor import METADATA_INTERVAL, ConnectionMonitor, Repeated, quieten
from streamtools.settings import KafkaSettings
from streamtools.testing import eventually
from tests.brokers.kafka.node import KafkaNode

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


async def test_an_outage_is_told_once_and_the_service_is_not_ready_meanwhile(
    own_kafka: KafkaNode, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    consumers, seen = ConsumerFactory(url=own_kafka.url), []

    @consumers.route(queue)
    async def handle(msg: int) -> None:
        seen.append(msg)

    runner = ConsumerRunner(consumers)
    async with runner, Producer(queue, url=own_kafka.url, send_timeout=120) as producer:
        await producer.send(1)
        await eventually(lambda: seen == [1], timeout=60)
        await asyncio.to_thread(own_kafka.kill)
        await eventually(lambda: [loop.state for loop in runner.health().loops] == ["reconnecting"], timeout=60)
        assert runner.health().live
        sending = asyncio.create_task(producer.send(2))
        await asyncio.to_thread(own_kafka.start)
        await sending
        await eventually(lambda: seen == [1, 2], timeout=60)
        await eventually(lambda: runner.health().ready, timeout=60)
    ours = [r.getMessage() for r in caplog.records if r.name == "streamtools" and f"Group {queue}" in r.getMessage()]
    assert [("cannot be reached any more" in line, "is reached again" in line) for line in ours] == [
        (True, False),
        (False, True),
    ]
    theirs = [
        r.getMessage() for r in caplog.records if r.name.startswith("aiokafka") and r.levelno >= logging.WARNING
    ]
    assert len(theirs) == len(set(theirs))


async def test_a_topic_that_is_deleted_under_a_handler_is_told_by_name_and_read_from_its_beginning_when_it_is_back(
    own_kafka: KafkaNode, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    consumers, seen, deleted = ConsumerFactory(url=own_kafka.url), [], asyncio.Event()

    @consumers.route(queue)
    async def handle(msg: int) -> None:
        seen.append(msg)
        await deleted.wait()

    async with ConsumerRunner(consumers):
        async with Producer(queue, url=own_kafka.url) as producer:
            await producer.send(1)
            await eventually(lambda: seen == [1], timeout=60)
        async with QueueAdmin(url=own_kafka.url) as admin:
            await admin.delete(queue)
            deleted.set()  # it can be committed no more; the library would try until the topic is back
            await eventually(lambda: f"'{queue}' at {own_kafka.url[:-1]} was deleted" in caplog.text, timeout=60)
        async with Producer(queue, url=own_kafka.url) as producer:
            await producer.send(2)
        await eventually(lambda: seen == [1, 2], timeout=120)


async def test_a_client_that_asks_for_topics_over_and_over_is_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    pauses: list[float] = []

    async def ask(cluster: Any, topics: Any) -> bool:
        asked.append(topics)
        return True

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    client = SimpleNamespace(_get_conn=None, _metadata_update=ask, _conns={}, bootstrap=None, coordinator_lookup=None)
    ConnectionMonitor(client, "Group orders", KafkaSettings())
    monkeypatch.setattr("streamtools.drivers.kafka.client.monitor.time.monotonic", lambda: 100.0)
    monkeypatch.setattr("streamtools.drivers.kafka.client.monitor.asyncio.sleep", sleep)
    for topic in ("a", "b", "c"):
        await client._metadata_update(None, topic)

    assert asked == ["a", "b", "c"]
    assert pauses[0] <= 0
    assert pauses[1:] == [pytest.approx(METADATA_INTERVAL)] * 2


def test_a_line_of_the_library_passes_once_a_minute_and_says_how_often_it_was_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("streamtools.drivers.kafka.client.monitor.time.monotonic", lambda: now)
    repeated = Repeated()

    def log(text: str) -> str | None:
        record = logging.LogRecord("aiokafka", logging.ERROR, __file__, 1, "Unable connect to %s", (text,), None)
        return record.getMessage() if repeated.filter(record) else None

    assert [log("node 1"), log("node 1"), log("node 2"), log("node 1")] == [
        "Unable connect to node 1",
        None,
        "Unable connect to node 2",
        None,
    ]
    now = 160.0
    assert log("node 1") == "Unable connect to node 1 (2 times more in the last 60 s)"
    assert log("node 1") is None


def test_a_new_topic_whose_leader_is_not_there_yet_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    library = logging.getLogger("aiokafka.consumer.fetcher")
    library.error("Failed fetch offsets from %s: %s", 1, NotLeaderForPartitionError("p"))
    library.error("Failed fetch offsets from %s: %s", 1, TopicAuthorizationFailedError("q"))
    assert [record.name for record in caplog.records] == ["aiokafka.consumer.fetcher"]
    assert "AuthorizationFailed" in caplog.text
