"""The ways of working that services of before know, on every protocol, by its old name and by variables alone.

What is HTTP's alone stands in tests/drivers/http/test_seed.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from streamtools import CONSUMER_LOOPS, HTTP, PRODUCERS, ConsumerFactory, ConsumerRunner, HandleMsgs, HandlerFactory
from streamtools.errors import ConfigurationError, UnknownProtocol
from streamtools.testing.waiting import TIMEOUT, eventually
from tests.brokers.address import RabbitMQAddress
from tests.drivers.http.test_retries import free_port

#: Old names, and the new one of what had no name before.
TYPES = ["AsyncIOHandler", "sqlite", "RMQIOHandler", "KafkaHandler", "HTTPHandler"]
#: Those that other processes can reach without the consumer's being there.
BROKERED = ["sqlite", "RMQIOHandler", "KafkaHandler"]
ODD_USER, ODD_PASSWORD = "tester@here/%", "p@ss/w:%"


@pytest.fixture
def queue_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The protocol by its name, with nothing but variables to say where it is."""
    name: str = request.param
    match name:
        case "RMQIOHandler":
            address: RabbitMQAddress = request.getfixturevalue("rabbitmq_vhost")
            parts = urlsplit(address.url)
            monkeypatch.setenv("RMQ_HOST", f"{parts.hostname}:{parts.port}")
            monkeypatch.setenv("RMQ_USER", parts.username or "")
            monkeypatch.setenv("RMQ_PASS", parts.password or "")
            monkeypatch.setenv("RMQ_VHOST", parts.path[1:])
        case "KafkaHandler":
            monkeypatch.setenv("KAFKA_HOST", request.getfixturevalue("kafka").bootstrap)
        case "HTTPHandler":
            monkeypatch.setenv("HTTP_HOST", f"127.0.0.1:{free_port()}")
        case "sqlite":
            monkeypatch.setenv("SQLITE_PATH", str(tmp_path / "queues.db"))
    return name


@pytest.fixture
def queue() -> str:
    """A name that no other test uses."""
    return f"queue-{secrets.token_hex(4)}"


everywhere = pytest.mark.parametrize("queue_type", TYPES, indirect=True)


async def stop(loop: asyncio.Task[None]) -> None:
    """The loop runs until it is cancelled."""
    assert not loop.done(), loop.result()
    loop.cancel()
    with suppress(asyncio.CancelledError):
        await loop
    assert loop.cancelled()


@everywhere
async def test_a_producer_and_a_decorated_consumer_by_registry(queue_type: str, queue: str) -> None:
    handled: list[Any] = []
    MyConsumer = CONSUMER_LOOPS[queue_type]
    consumer = MyConsumer(queue)
    await consumer.a_init()

    @consumer()
    async def handler_func(msg: Any) -> str:
        handled.append(msg)
        return "done"

    loop = asyncio.create_task(handler_func())
    MyProducer = PRODUCERS[queue_type]
    producer = MyProducer(queue)
    await producer.a_init()
    await producer.send({"id": 1})
    await producer.send("text")
    await eventually(lambda: len(handled) == 2)
    assert handled == [{"id": 1}, "text"]
    assert await handler_func("plainly called") == "done" and handled[-1] == "plainly called"
    await producer.close()
    await stop(loop)


@everywhere
async def test_code_that_knows_http_runs_on_every_protocol(
    queue_type: str, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[Any] = []
    consumer = CONSUMER_LOOPS[queue_type](queue)

    @consumer(method="GET")
    async def handler_func(msg: Any) -> None:
        handled.append(msg)

    loop = asyncio.create_task(handler_func())
    endpoint = (
        f"http://{os.environ.get('HTTP_HOST')}/{queue}" if queue_type == "HTTPHandler" else "http://127.0.0.1/x"
    )
    caplog.set_level(logging.INFO)
    async with PRODUCERS[queue_type](queue) as producer:
        for _ in range(2):
            await producer.send({"a": "1"}, method="GET", endpoint=endpoint, header_tag="SSI")
    await eventually(lambda: len(handled) == 2)
    assert handled == [{"a": "1"}] * 2
    said = [r.getMessage() for r in caplog.records if "ignores" in r.getMessage() and "Producer" in r.getMessage()]
    assert len(said) == (0 if queue_type == "HTTPHandler" else 1)
    await stop(loop)


@everywhere
async def test_a_method_is_a_handler(queue_type: str, queue: str) -> None:
    consumer = CONSUMER_LOOPS[queue_type](queue)

    class Service:
        def __init__(self) -> None:
            self.handled: list[Any] = []

        @consumer()
        async def handle(self, msg: Any) -> None:
            self.handled.append(msg)

    service = Service()
    loop = asyncio.create_task(service.handle())
    async with PRODUCERS[queue_type](queue) as producer:
        await producer.send(1)
        await eventually(lambda: service.handled == [1])
    await service.handle(2)
    assert service.handled == [1, 2]
    await stop(loop)


@everywhere
async def test_a_factory_routes_and_a_runner_takes_its_instances_and_handlers(queue_type: str, queue: str) -> None:
    handled: list[Any] = []
    consumers = ConsumerFactory(queue_type)

    @consumers.route(f"{queue}-1")
    async def id_result_handler(msg: Any) -> None:
        handled.append((1, msg))

    @consumers.route(f"{queue}-2")  # the same name, as the example has it
    async def id_result_handler(msg: Any) -> None:  # noqa: F811
        handled.append((2, msg))

    port = int(os.environ.get("HTTP_HOST", ":9000").rpartition(":")[2])
    app = ConsumerRunner(consumers=consumers.instances, handlers=consumers.handlers, port=port, host="127.0.0.1")
    async with app:
        async with PRODUCERS[queue_type](f"{queue}-1") as one, PRODUCERS[queue_type](f"{queue}-2") as two:
            await one.send("a")
            await two.send("b")
            await eventually(lambda: len(handled) == 2)
    assert sorted(handled) == [(1, "a"), (2, "b")]


SCRIPT = """
import os
from streamtools import ConsumerFactory, ConsumerRunner

PORT, IP = 9000, "127.0.0.1"
consumers = ConsumerFactory(os.environ["QUEUE_TYPE"], port=9000)

@consumers.route(os.environ["QUEUE_NAME"])
async def id_result_handler(msg):
    print("handled", msg, flush=True)

if __name__ == '__main__':
    app = ConsumerRunner(
        consumers=consumers.instances,
        handlers=consumers.handlers,
        port=PORT,
        host=IP,
    )
    app.run()
"""


@pytest.mark.parametrize("queue_type", BROKERED, indirect=True)
async def test_the_script_runs_as_a_process_and_ends_by_sigterm(queue_type: str, queue: str, tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "QUEUE_TYPE": queue_type, "QUEUE_NAME": queue}
    async with PRODUCERS[queue_type](queue) as producer:
        await producer.send("before anyone was there")
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", str(script), env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert service.stdout is not None
        async with asyncio.timeout(TIMEOUT):
            assert await service.stdout.readline() == b"handled before anyone was there\n"
            service.send_signal(signal.SIGTERM)
            assert await service.wait() == 0
    finally:
        if service.returncode is None:
            service.kill()
            await service.wait()


# --- pairs from configuration -------------------------------------------------------------------


def test_a_configuration_mixes_types_and_touches_no_broker() -> None:
    handlers = HandlerFactory(
        {
            "queue_1": {"name": "queue_1", "consumer_loop": "KafkaHandler", "producer": "HTTPHandler"},
            "queue_2": {"name": "queue_2", "consumer_loop": "RMQIOHandler", "producer": "RMQIOHandler"},
        }
    )
    one, two = handlers["queue_1"], handlers["queue_2"]
    assert (one.producer.protocol, one.consumer.protocol) == ("http", "kafka")
    assert (two.producer.protocol, two.consumer.protocol) == ("rabbitmq", "rabbitmq")
    assert {pair.queue_name for pair in handlers.values()} == {one.producer.queue, two.consumer.queue}
    assert handlers.handlers == {"queue_1": one, "queue_2": two} == dict(handlers)


@pytest.mark.parametrize("consumer_loop", TYPES)
@pytest.mark.parametrize("producer", TYPES)
def test_a_pair_is_of_one_protocol_or_has_http_in_front(producer: str, consumer_loop: str) -> None:
    entry = {"queue_1": {"name": "queue_1", "consumer_loop": consumer_loop, "producer": producer}}
    if producer in (consumer_loop, "HTTPHandler"):
        assert HandlerFactory(entry)["queue_1"].producer.protocol == PRODUCERS[producer].protocol
    else:
        with pytest.raises(ConfigurationError, match=r"Queue 'queue_1': .* cannot send to .*HTTPHandler"):
            HandlerFactory(entry)


def test_a_protocol_of_before_that_is_not_here_yet_says_so() -> None:
    for build in (
        lambda: PRODUCERS["SQSHandler"],
        lambda: ConsumerFactory("SQSHandler"),
        lambda: HandlerFactory({"q": {"name": "q", "consumer_loop": "SQSHandler", "producer": "HTTPHandler"}}),
    ):
        with pytest.raises(UnknownProtocol, match="'SQSHandler' is not in this version"):
            build()


@everywhere
async def test_a_pair_works_on_one_queue(queue_type: str, queue: str) -> None:
    pair = HandleMsgs(queue, queue_type)
    assert pair.consumer is pair.consumer_loop and pair.producer is pair.producer
    handled: list[Any] = []

    @pair.consumer()
    async def handler(msg: Any) -> None:
        handled.append(msg)

    await pair.a_init()
    loop = asyncio.create_task(handler())
    await pair.producer.send([1, 2])
    await eventually(lambda: handled == [[1, 2]])
    await stop(loop)
    await pair.close()


@everywhere
async def test_a_runner_runs_the_pairs_of_a_configuration(queue_type: str, queue: str) -> None:
    handlers = HandlerFactory(
        {name: {"name": f"{queue}-{name}", "consumer_loop": queue_type, "producer": queue_type} for name in "ab"}
    )
    handled: list[Any] = []

    @handlers["a"].consumer()
    async def pass_on(msg: Any) -> None:
        await handlers["b"].producer.send(f"{msg}!")

    @handlers["b"].consumer_loop()
    async def take(msg: Any) -> None:
        handled.append(msg)

    async with ConsumerRunner(handlers):
        await handlers["a"].producer.send("hello")
        await eventually(lambda: handled == ["hello!"])


async def test_http_in_front_of_a_broker_is_passed_on_by_a_few_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_HOST", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("SQLITE_PATH", str(tmp_path / "queues.db"))
    pair = HandlerFactory({"q": {"name": "queue_1", "consumer_loop": "sqlite", "producer": "HTTPHandler"}})["q"]
    bridge = ConsumerFactory(HTTP)
    handled: list[Any] = []

    @bridge.route("queue_1")
    async def pass_on(msg: Any) -> None:
        async with PRODUCERS["sqlite"]("queue_1") as producer:
            await producer.send(msg)

    @pair.consumer()
    async def handler(msg: Any) -> None:
        handled.append(msg)

    async with ConsumerRunner(bridge, handler):
        await pair.producer.send({"id": 1})
        await eventually(lambda: handled == [{"id": 1}])
    await pair.close()


# --- variables ----------------------------------------------------------------------------------


async def test_rabbitmqs_user_and_password_may_be_of_any_text(
    rabbitmq_vhost: RabbitMQAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, name = urlsplit(rabbitmq_vhost.url), quote(ODD_USER, safe="")
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    rabbitmq_vhost.manage("PUT", f"users/{name}", {"password": ODD_PASSWORD, "tags": ""})
    try:
        rabbitmq_vhost.manage("PUT", f"permissions{parts.path}/{name}", everything)
        monkeypatch.setenv("RMQ_HOST", f"{parts.hostname}:{parts.port}")
        monkeypatch.setenv("RMQ_USER", ODD_USER)
        monkeypatch.setenv("RMQ_PASS", ODD_PASSWORD)
        monkeypatch.setenv("RMQ_VHOST", parts.path[1:])
        async with (
            PRODUCERS["RMQIOHandler"]("orders") as producer,
            CONSUMER_LOOPS["RMQIOHandler"]("orders") as consumer,
        ):
            await producer.send("hello")
            [delivery] = await consumer.receive(timeout=TIMEOUT)
            await delivery.ack()
            assert ODD_PASSWORD not in f"{producer!r} {consumer!r}"
    finally:
        rabbitmq_vhost.manage("DELETE", f"users/{name}")
