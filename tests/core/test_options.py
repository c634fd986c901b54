"""Options: one protocol's are quietly ignored by another; no protocol's are an error."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from streamtools import CONSUMER_LOOPS, PRODUCERS, ConfigurationError, Consumer, Producer
from streamtools.protocols import QUEUE_OPTIONS, SEND_OPTIONS

#: Options of protocols that are planned: accepted now, so that code written for them runs here.
PLANNED_QUEUE = {"partitions", "replication", "static_id", "consumer_group", "auto_ack", "exactly_once"}
PLANNED_SEND = {"partition", "timestamp", "wait"}


def test_the_tables_hold_what_the_drivers_declare() -> None:
    queue: set[str] = set()
    send: set[str] = set()
    for name in PRODUCERS:
        queue |= set(PRODUCERS[name].options_class.model_fields) | set(
            CONSUMER_LOOPS[name].options_class.model_fields
        )
        send |= set(PRODUCERS[name].send_options_class.model_fields)
    assert queue | PLANNED_QUEUE == QUEUE_OPTIONS
    assert send | PLANNED_SEND == SEND_OPTIONS


@pytest.mark.parametrize("kind", [Producer, Consumer])
@pytest.mark.parametrize("url", ["asyncio://", "sqlite://", "http://h", "amqp://h"])
def test_an_option_that_no_protocol_knows_is_a_type_error_with_the_near_ones(kind: Any, url: str) -> None:
    with pytest.raises(TypeError, match="'durabel'.*Did you mean 'durable'"):
        kind("orders", url=url, durabel=True)
    with pytest.raises(TypeError, match="Did you mean 'url'"):
        kind("orders", urll=url) if url == "asyncio://" else kind("orders", url=url, urll=1)


def test_what_the_constructor_takes_is_told_to_who_gives_it_to_the_decorator() -> None:
    consumer = Consumer("orders", url="asyncio://")
    with pytest.raises(TypeError, match=r"takes 'offset' only where it is made: write offset=... there"):
        consumer(offset="latest")


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        (
            "http://h",
            {"method": "FETCH"},
            "HTTPConsumer of 'orders': method: 'FETCH' is not one of GET, POST, PUT, PATCH, DELETE.",
        ),
        (
            "amqp://h",
            {"queue_type": "quorum", "durable": False},
            "RabbitMQConsumer of 'orders': a quorum queue is durable, not exclusive, and not deleted by itself",
        ),
        (
            "amqp://h",
            {"error_declare": "passiv"},
            "RabbitMQConsumer of 'orders': error_declare: error_declare='passiv' is not one of True, False,",
        ),
    ],
)
def test_an_option_of_a_wrong_value_is_one_plain_sentence(url: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Consumer("orders", url=url, **options)
    assert str(caught.value).startswith(text)


async def test_a_send_option_that_no_protocol_knows_is_a_type_error() -> None:
    async with Producer("orders", url="asyncio://") as producer:
        with pytest.raises(TypeError, match="Did you mean 'delay'"):
            await producer.send(1, delays=5)
        with pytest.raises(TypeError, match="Did you mean 'endpoint'"):
            await producer.send(1, endpont="x")


async def test_another_protocols_options_are_ignored_with_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamtools")
    async with Producer("orders", url="asyncio://", queue_type="quorum", durable=True) as producer:
        for _ in range(3):
            await producer.send(1, method="GET", endpoint="http://h/x", header_tag="SSI")
    consumer = Consumer("orders", url="asyncio://", method="GET", partitions=3)
    consumer(max_body=5)(lambda msg: None)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "AsyncIOProducer ignores queue_type, durable: options of another protocol.",
        "AsyncIOProducer ignores method, endpoint, header_tag: options of another protocol.",
        "AsyncIOConsumer ignores method, partitions: options of another protocol.",
        "AsyncIOConsumer ignores max_body: options of another protocol.",
    ]


@pytest.mark.parametrize(
    ("url", "options"),
    [("http://h", {"method": "FETCH"}), ("http://h", {"max_body": -1}), ("amqp://h", {"queue_type": "other"})],
)
def test_a_value_that_does_not_fit_is_a_clear_error(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Consumer("orders", url=url, **options)


@pytest.mark.parametrize("protocol", ["asyncio", "sqlite", "http", "rabbitmq"])
def test_host_and_port_are_accepted_everywhere(protocol: str) -> None:
    PRODUCERS[protocol]("orders", host="127.0.0.1", port=9001)
    CONSUMER_LOOPS[protocol]("orders", host="127.0.0.1", port=9001)


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\x00", "\ud800", None, 5, b"orders"])
@pytest.mark.parametrize("url", ["asyncio://", "sqlite://", "http://h", "amqp://h"])
def test_a_name_that_cannot_be_used_is_a_clear_error_at_once(name: Any, url: str) -> None:
    for kind in (Producer, Consumer):
        with pytest.raises(ConfigurationError):
            kind(name, url=url)


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"prefetch": 0}, {"max_deliveries": 0}, {"ack": "never"}, {"ordered_by": "size"}]
    + [{"error_queue": ""}],
)
def test_a_consumer_that_cannot_work_is_a_clear_error_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Consumer("orders", url="asyncio://", **wrong)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({"a": 1}, TypeError),
        ({1: "a"}, TypeError),
        ({"": "x"}, ConfigurationError),
        ({"a": "\ud800"}, ConfigurationError),
    ]
    + [({"Streamtools-Id": "x"}, ConfigurationError), ({"a": "x" * 70_000}, ConfigurationError)],
)
async def test_headers_that_no_wire_carries_are_refused_before_anything_is_sent(
    headers: dict[Any, Any], error: type[Exception]
) -> None:
    async with Producer("orders", url="asyncio://") as producer:
        with pytest.raises(error):
            await producer.send(1, headers=headers)
        for wrong in ({"delay": -1}, {"delay": float("nan")}, {"ttl": float("inf")}, {"ttl": -1}):
            with pytest.raises(ConfigurationError):
                await producer.send(1, **wrong)
