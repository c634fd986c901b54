"""What cannot work is one clear error where it is written, on every protocol alike."""

from __future__ import annotations

from typing import Any

import pytest

from streamtools import ConfigurationError, Consumer, ConsumerFactory, ConsumerRunner, Producer, Retry
from streamtools.errors import UnknownProtocol

URLS = ["asyncio://", "sqlite://", "http://h", "amqp://h"]
EVERYONES = [
    {"declare": "passiv"}, {"declare": None}, {"declare": 1}, {"port": "9000"}, {"port": 70000}, {"host": 5},
    {"host": ""},
]  # fmt: skip
PRODUCERS = [{"send_timeout": "30"}, {"send_timeout": -1}, {"send_timeout": None}, {"send_timeout": 0}]
CONSUMERS = [
    {"concurrency": 0}, {"concurrency": "4"}, {"concurrency": 1.5}, {"concurrency": True}, {"prefetch": 0},
    {"prefetch": "a"}, {"max_deliveries": 0}, {"ack": "affter"}, {"ordered_by": "kee"}, {"offset": "earlist"},
    {"connect_timeout": "x"}, {"connect_timeout": -1}, {"retry": 5}, {"middleware": [5]}, {"group": ""}, {"group": 5},
]  # fmt: skip


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("options", EVERYONES + PRODUCERS, ids=str)
def test_a_producer_names_the_parameter_that_cannot_be(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Producer("orders", url=url, **options)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("options", EVERYONES + CONSUMERS, ids=str)
def test_a_consumer_names_the_parameter_that_cannot_be(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Consumer("orders", url=url, **options)


@pytest.mark.parametrize("error_queue", [None, 5, "", "{que}.error"])
def test_an_error_queue_has_a_name(error_queue: Any) -> None:
    with pytest.raises(ConfigurationError, match="queue"):
        Consumer("orders", url="sqlite://", error_queue=error_queue)


@pytest.mark.parametrize("kind", [Producer, Consumer])
def test_a_client_id_is_a_text(kind: Any) -> None:
    with pytest.raises(TypeError, match="client_id=5"):
        kind("orders", url="asyncio://", client_id=5)


@pytest.mark.parametrize(
    "options",
    [{"retries": "5"}, {"retries": 1.5}, {"delay": "1"}, {"backoff": None}, {"max_delay": "x"}, {"jitter": "x"}],
)
def test_a_retry_policy_of_other_types_is_a_configuration_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Retry(**options)


@pytest.mark.parametrize(
    "options",
    [{"port": "x"}, {"health_port": -1}, {"shutdown_timeout": None}, {"restarts": -1}, {"restart_window": "x"}],
)
def test_a_runner_names_the_parameter_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options)).removeprefix("health_")):
        ConsumerRunner(ConsumerFactory(), **options)


@pytest.mark.parametrize("name", ["key", "type", "id", "correlation_id", "reply_to"])
async def test_metadata_is_text_on_every_protocol(name: str) -> None:
    async with Producer("orders", url="asyncio://") as producer:
        with pytest.raises(TypeError, match=rf"{name}=5 is not a str; write {name}=str\(...\)"):
            await producer.send(1, **{name: 5})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"{name}= holds a lone surrogate"):
            await producer.send(1, **{name: "\ud800"})  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["asyncio", "sqlite", "rabbitmq"])
def test_a_url_in_place_of_a_name_is_no_queue(protocol: str) -> None:
    with pytest.raises(ConfigurationError, match="url=") as caught:
        Producer(
            "http://host:9000/orders?token=hunter2", url=f"{protocol}://" if protocol != "rabbitmq" else "amqp://"
        )
    assert "hunter2" not in str(caught.value)


async def test_a_text_that_is_not_unicode_and_headers_that_are_no_mapping_are_type_errors() -> None:
    async with Producer("orders", url="asyncio://") as producer:
        with pytest.raises(TypeError, match="lone surrogate"):
            await producer.send("\ud800")
        with pytest.raises(TypeError, match="mapping"):
            await producer.send(1, headers=["a"])  # type: ignore[arg-type]


def test_what_is_known_is_what_can_be_written() -> None:
    with pytest.raises(TypeError) as caught:
        Producer("orders", url="asyncio://", nonsense=1)
    known = str(caught.value).partition("Known: ")[2].rstrip(".").split(", ")
    assert "send_timeout" in known and not {"self", "options", "kwargs"} & set(known)


def test_an_unknown_scheme_answers_with_schemes() -> None:
    with pytest.raises(
        UnknownProtocol, match=r"No URL begins with ampq://. Did you mean 'amqp'.*amqps.*https.*sqlite"
    ):
        Producer("orders", url="ampq://host")
    with pytest.raises(UnknownProtocol, match="does not begin with a scheme"):
        Producer("orders", url="")
