"""Which address holds, and that no secret is ever shown."""

from __future__ import annotations

import logging
import traceback
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given

from streamtools import (
    ADMINS,
    CONSUMER_LOOPS,
    PRODUCERS,
    AsyncIOSettings,
    ConfigurationError,
    ConnectError,
    Consumer,
    ConsumerFactory,
    HandleMsgs,
    HTTPSettings,
    KafkaSettings,
    Producer,
    QueueAdmin,
    RabbitMQSettings,
    SQLiteSettings,
    StreamToolsError,
)
from streamtools.settings import worker_number
from tests.brokers.processes import free_ports
from tests.core import strategies

SECRET = "p@ss/w:%?#[hunter2"
CODED = quote(SECRET, safe="")
PARTS = ("hunter2", "p@ss", "p%40ss", CODED)


def hides(text: object) -> bool:
    return not any(part in str(text) for part in PARTS)


# --- which address holds ------------------------------------------------------------------------


def test_the_url_holds_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTOOLS_URL", "amqp://general/a")
    monkeypatch.setenv("RMQ_HOST", "own")
    monkeypatch.setenv("RMQ_VHOST", "own")
    assert RabbitMQSettings.resolve("amqp://given/b").addresses == [("given", 5672)]
    assert RabbitMQSettings.resolve("amqp://given/b").vhost == "b"
    assert RabbitMQSettings.resolve(None).addresses == [("general", 5672)]


def test_then_the_general_variable_if_it_is_the_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTOOLS_URL", "http://elsewhere:1234")
    monkeypatch.setenv("RMQ_HOST", "own:5673")
    assert RabbitMQSettings.resolve(None).addresses == [("own", 5673)]
    assert HTTPSettings.resolve(None).address == ("elsewhere", 1234)


def test_then_the_protocols_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOST": "h", "PORT": "1", "USER": "u", "PASS": SECRET, "VHOST": "v/x"}.items():
        monkeypatch.setenv(f"RMQ_{name}", value)
    settings = RabbitMQSettings.resolve(None)
    assert (settings.addresses, settings.username, settings.vhost) == ([("h", 1)], "u", "v/x")
    assert settings.password.get_secret_value() == SECRET
    monkeypatch.setenv("HTTP_HOST", "web:81")
    assert HTTPSettings.resolve(None).address == ("web", 81)


def test_and_at_last_the_defaults() -> None:
    settings = RabbitMQSettings.resolve(None)
    assert (settings.addresses, settings.username, settings.vhost) == ([("localhost", 5672)], "guest", "/")
    assert settings.password.get_secret_value() == "guest"
    assert RabbitMQSettings.from_url("amqps://").addresses == [("localhost", 5671)]
    assert HTTPSettings.resolve(None).address == ("127.0.0.1", 9000)
    assert SQLiteSettings.resolve(None).path == "streamtools.db"
    assert AsyncIOSettings.resolve(None).name == ""


@pytest.mark.parametrize(
    ("url", "protocol"),
    [("amqp://h", "rabbitmq"), ("amqps://h", "rabbitmq"), ("http://h", "http"), ("https://h", "http")]
    + [("sqlite:///x.db", "sqlite"), ("asyncio://", "asyncio"), (None, "sqlite")],
)
def test_the_url_picks_the_protocol(url: str | None, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Producer("orders", url=url).protocol == Consumer("orders", url=url).protocol == protocol
    if url is not None:
        monkeypatch.setenv("STREAMTOOLS_URL", url)
        assert Producer("orders").protocol == Consumer("orders").protocol == protocol


def test_a_settings_object_stands_for_a_url() -> None:
    settings = RabbitMQSettings(host="h", username="u", password=SECRET, vhost="v")  # type: ignore[arg-type]
    producer = Producer("orders", url=settings)
    assert (producer.protocol, producer.settings) == ("rabbitmq", settings)
    with pytest.raises(ConfigurationError, match="SQLiteSettings"):
        PRODUCERS["sqlite"]("orders", url=settings)


@given(strategies.text, strategies.text)
def test_user_and_password_of_any_text_survive_a_url(user: str, password: str) -> None:
    url = f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@host"
    settings = RabbitMQSettings.from_url(url)
    assert (settings.username, settings.password.get_secret_value()) == (user, password)


def test_the_query_sets_the_further_fields() -> None:
    settings = RabbitMQSettings.from_url("amqps://a:1,b/v%2Fx?cafile=/ca.pem&heartbeat=5&verify=false")
    assert settings.addresses == [("a", 1), ("b", 5671)]
    assert (settings.vhost, settings.cafile, settings.heartbeat, settings.verify) == ("v/x", "/ca.pem", 5, False)
    assert AsyncIOSettings.from_url("asyncio://name?maxsize=5").maxsize == 5
    with pytest.raises(ConfigurationError, match="Did you mean 'heartbeat'"):
        RabbitMQSettings.from_url("amqp://a?heartbeats=5")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///orders.db", "orders.db"),
        ("sqlite:////var/lib/o.db", "/var/lib/o.db"),
        ("sqlite://", "streamtools.db"),
    ]
    + [("sqlite:///a%20b.db", "a b.db")],
)
def test_three_slashes_are_relative_and_four_absolute(url: str, path: str) -> None:
    assert SQLiteSettings.from_url(url).path == path


# --- no secret is shown -------------------------------------------------------------------------

UNREADABLE = [
    "amqp://user:hunter2@host:port/v",
    "amqp://user:hun/ter2hunter2@host/v",
    "amqp://user:hunter2@[::1/v",
    "amqp://user:hunter2@host:99999/v",
    "amqp://user:hunter2@host?nonsense=hunter2",
    "amqp://user:hunter2@host?heartbeat=hunter2",
    "amqp://user:hunter2@host?port=hunter2",
    "amqp:user:hunter2@host",
    "http://user:hunter2@host",
    "http://host:hunter2/",
    "sqlite://user:hunter2@host/x",
    "kafka://user:hunter2@host",
    "nonsense://user:hunter2@host",
    "user:hunter2@host",
    "hunter2",
    # What is special and not percent-encoded, behind a password's beginning that could be a port.
    "amqp://user:12/hunter2@host/v",
    "amqp://user:12?hunter2@host/v",
    "amqp://user:a?hunter2=1@host/v",
    "amqp://user:12#hunter2@host/v",
]


@pytest.mark.parametrize("url", UNREADABLE)
@pytest.mark.parametrize("kind", [Producer, Consumer, QueueAdmin, "variable"])
def test_an_error_about_a_url_never_quotes_it(url: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        if kind == "variable":
            monkeypatch.setenv("STREAMTOOLS_URL", url)
            made: Any = Producer("orders")
        else:
            made = kind(url=url) if kind is QueueAdmin else kind("orders", url=url)
        made.settings.safe_url  # a URL may also be fine for one of them
    except StreamToolsError as error:
        text = "".join(traceback.format_exception(error))
        # Lines of code, which a traceback quotes, are ours.
        assert "hunter2" not in "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    else:
        assert "hunter2" not in repr(made)


@pytest.mark.parametrize("name", ["RMQ_PORT", "RMQ_HEARTBEAT", "RMQ_TLS"])
def test_an_error_about_a_variable_names_its_field_and_not_its_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "hunter2")
    with pytest.raises(ConfigurationError, match=name.removeprefix("RMQ_").lower()) as caught:
        RabbitMQSettings.from_environment()
    assert hides("".join(traceback.format_exception(caught.value)))


async def test_nothing_made_with_a_secret_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    port = free_ports(1)[0]
    coded = quote(CODED)  # once more, inside a query
    url = f"amqp://user:{CODED}@127.0.0.1:{port}/v?management_url=http://user:{coded}@127.0.0.1:{port}"
    settings = RabbitMQSettings.from_url(url)
    consumers = ConsumerFactory(url=url)

    @consumers.route("orders")
    async def handle(msg: object) -> None: ...

    producer = Producer("orders", url=url, send_timeout=0.2)
    consumer = Consumer("orders", url=url, connect_timeout=0.2)
    pair = HandleMsgs("orders", "rabbitmq", url=url)
    admin = ADMINS["rabbitmq"](url=url)
    made = [settings, settings.safe_url, producer, consumer, admin, consumers, handle, handle.consumer, pair]
    errors = []
    for attempt in (producer.open(), producer.send(1), consumer.open(), consumer.receive(timeout=0), admin.open(),
                    admin.list(), consumer.run(handle)):  # fmt: skip
        try:
            await attempt
        except (ConnectError, StreamToolsError) as error:
            errors.append("".join(traceback.format_exception(error)))
    assert errors
    for thing in made:
        assert hides(repr(thing)) and hides(str(thing)) and hides(f"{thing}")
    for text in (*errors, *(record.getMessage() for record in caplog.records)):
        assert hides(text)


async def test_an_error_about_an_option_shows_no_value_not_even_in_its_cause() -> None:
    async with Producer("orders", url="http://127.0.0.1:9") as producer:
        with pytest.raises(ConfigurationError, match="has a user or a password") as caught:
            await producer.send(1, endpoint="http://user:hunter2@host/")
    assert hides(
        "".join(traceback.format_exception(caught.value)).replace('endpoint="http://user:hunter2@host/"', "")
    )


def test_headers_stay_out_of_a_messages_repr() -> None:
    from streamtools import Delivery, Message

    message = Message(body=b"x", queue="orders", id="1", headers={"Authorization": SECRET})
    assert hides(repr(message)) and hides(repr(Delivery(message)))


@pytest.mark.parametrize("protocol", ["asyncio", "sqlite", "http", "rabbitmq"])
def test_reprs_say_what_and_where(protocol: str) -> None:
    for made in (PRODUCERS[protocol]("orders"), CONSUMER_LOOPS[protocol]("orders")):
        assert "orders" in repr(made) and "://" in repr(made)


def test_a_kafka_url_names_brokers_and_how_to_speak_to_them() -> None:
    settings = KafkaSettings.from_url(f"kafkas://shop:{quote(SECRET, safe='')}@h1:9093,h2/?sasl=SCRAM-SHA-512")
    assert settings.addresses == [("h1", 9093), ("h2", 9092)]
    assert (settings.tls, settings.username, settings.sasl) == (True, "shop", "SCRAM-SHA-512")
    assert settings.password.get_secret_value() == SECRET
    assert settings.safe_url == "kafkas://shop@h1:9093,h2:9092"
    assert hides(repr(settings))
    with pytest.raises(ConfigurationError, match="topic is the queue's name"):
        KafkaSettings.from_url("kafka://h/orders")


def test_kafka_from_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_HOST", "h1:1,h2:2")
    monkeypatch.setenv("KAFKA_PARTITIONS", "6")
    settings = KafkaSettings.from_environment()
    assert (settings.addresses, settings.partitions, settings.username) == ([("h1", 1), ("h2", 2)], 6, None)


def test_a_settings_object_that_cannot_be_is_one_sentence_of_ours_without_the_password() -> None:
    wrong: dict[str, Any] = {"port": "geheim", "pasword": "geheim"}

    with pytest.raises(ConfigurationError) as caught:
        RabbitMQSettings(**wrong)

    text = str(caught.value)
    assert text.startswith("RabbitMQSettings cannot be used: port: Input should be a valid integer")
    assert "it has no 'pasword': Did you mean 'password'?" in text
    assert "geheim" not in text


class TestWorkerNumber:
    @pytest.mark.parametrize(("text", "number"), [("0", 0), ("11", 11), (" 3 ", 3), ("", None)])
    def test_is_what_the_variable_says(self, monkeypatch: pytest.MonkeyPatch, text: str, number: int | None) -> None:
        monkeypatch.setenv("STREAMTOOLS_WORKER", text)

        assert worker_number() == number

    @pytest.mark.parametrize("text", ["-1", "1.5", "first", "\u0661"])
    def test_another_text_is_refused(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("STREAMTOOLS_WORKER", text)

        with pytest.raises(ConfigurationError, match="STREAMTOOLS_WORKER"):
            worker_number()
