"""The HTTP examples of the factory and the runner, from end to end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from streamtools import HTTP, PRODUCERS, ConsumerFactory, ConsumerRunner
from streamtools.compat.handlers import HandlerFactory
from streamtools.errors import ConfigurationError
from tests.drivers.http.conftest import request, talk
from tests.drivers.http.test_retries import free_port
from tests.faults.waiting import wait_until

SCRIPT = """
import sys
from streamtools import HTTP, ConsumerFactory, ConsumerRunner

consumers = ConsumerFactory(HTTP, port=9000)

@consumers.route("queue_1")
async def id_result_handler(msg):
    return {"queue": 1, "msg": msg}

@consumers.route("queue_2")
async def id_result_handler(msg):
    return {"queue": 2, "msg": msg}

if __name__ == '__main__':
    app = ConsumerRunner(
        consumers=consumers.instances,
        handlers=consumers.handlers,
        port=1,
        host="127.0.0.1",
    )
    app.run()
"""


async def test_a_factory_and_a_runner_serve_all_queues_on_one_port() -> None:
    consumers = ConsumerFactory(HTTP, port=0)

    @consumers.route("queue_1")
    async def id_result_handler(msg: Any) -> Any:
        return [1, msg]

    @consumers.route("queue_2")  # the same name, as the example has it
    async def id_result_handler(msg: Any) -> Any:  # noqa: F811
        return [2, msg]

    async with ConsumerRunner(consumers=consumers.instances, handlers=consumers.handlers, host="127.0.0.1"):
        port = consumers.instances[0].address[1]
        async with PRODUCERS[HTTP]("queue_1", port=port) as one, PRODUCERS[HTTP]("queue_2", port=port) as two:
            assert (await one.send({"a": 1})).json() == [1, {"a": 1}]
            assert (await two.send({"a": 1})).json() == [2, {"a": 1}]


async def test_the_runners_host_and_port_hold_where_the_consumers_say_nothing() -> None:
    consumers = ConsumerFactory(HTTP)
    consumers.route("queue_1")(_echo)
    port = free_port()
    async with ConsumerRunner(consumers, port=port, host="127.0.0.1"):
        reply = await talk(consumers.instances[0], request(path="/queue_1", body=b"1"))
        assert (reply.status, consumers.instances[0].address) == (200, ("127.0.0.1", port))


async def _echo(msg: Any) -> Any:
    return msg


async def test_get_and_post_of_one_queue_are_two_routes() -> None:
    consumers = ConsumerFactory(HTTP, port=0)
    consumers.route("q", method="GET")(_echo)
    consumers.route("q")(_echo)
    async with ConsumerRunner(consumers):
        consumer = consumers.instances[0]
        assert (await talk(consumer, request("GET", "/q?a=1"))).json() == {"a": "1"}
        assert (await talk(consumer, request("POST", "/q", b"{}"))).json() == {}


async def test_a_port_that_is_taken_ends_the_runner_with_a_clear_error() -> None:
    consumers = ConsumerFactory(HTTP)
    consumers.route("q")(_echo)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConnectionError, match="Cannot listen on"):
            await ConsumerRunner(consumers, port=taken.getsockname()[1]).serve(signals=False)


async def test_a_pair_from_configuration_calls_its_own_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_HOST", f"127.0.0.1:{free_port()}")
    handlers = HandlerFactory({"q": {"name": "q", "consumer_loop": "HTTPHandler", "producer": "HTTPHandler"}})
    pair = handlers["q"]
    pair.consumer(method="POST")(_echo)
    async with ConsumerRunner(handlers):
        assert (await pair.producer.send([1])).json() == [1]


async def test_an_http_consumer_has_no_groups() -> None:
    with pytest.raises(ConfigurationError, match="no consumer groups"):
        ConsumerFactory(HTTP, group="g").route("q")(_echo).consumer  # noqa: B018


async def test_calls_survive_a_kill_of_the_service(tmp_path: Path) -> None:
    # Given a service under load from four senders
    port = free_port()
    script = tmp_path / "service.py"
    script.write_text(SCRIPT.replace("port=9000", f"port={port}"))
    line = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = await asyncio.create_subprocess_exec(*line, env=environment)
    answered: list[int] = []

    async def send(numbers: range) -> None:
        for number in numbers:
            receipt = await producer.send(number)
            answered.append(receipt.json()["msg"])  # type: ignore[attr-defined]

    try:
        async with PRODUCERS[HTTP]("queue_1", port=port) as producer:
            sending = asyncio.gather(*(send(range(n, 2000, 4)) for n in range(4)))
            await wait_until(lambda: len(answered) > 500)
            # When it is killed, and comes back
            process.kill()
            await process.wait()
            process = await asyncio.create_subprocess_exec(*line, env=environment)
            # Then every call is answered all the same
            await asyncio.wait_for(sending, 60)
    finally:
        process.kill()
        await process.wait()
    assert sorted(answered) == list(range(2000))


async def test_the_seeds_script_runs_as_a_process_and_ends_by_sigterm(tmp_path: Path) -> None:
    port = free_port()
    script = tmp_path / "service.py"
    script.write_text(SCRIPT.replace("port=9000", f"port={port}"))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = await asyncio.create_subprocess_exec(sys.executable, "-W", "error", str(script), env=environment)
    try:
        async with PRODUCERS[HTTP]("queue_2", port=port) as producer:  # waits until the service is up
            assert (await producer.send("x")).json() == {"queue": 2, "msg": "x"}
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
