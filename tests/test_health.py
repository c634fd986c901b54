"""Health endpoints: what a supervisor of processes sees."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from streamtools import ConsumerFactory, ConsumerRunner, Producer
from streamtools.errors import ConfigurationError, ConnectError
from streamtools.observability import port as health_port
from streamtools.observability.health import HealthReport, HealthServer, LoopHealth
from streamtools.validation.tokens import is_loopback
from tests.faults.waiting import wait_until


def loop(state: str, **fields: Any) -> LoopHealth:
    return LoopHealth(queue="orders", protocol="http", state=state, **fields)


async def get(port: int, path: str) -> tuple[int, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    status = int(head.split()[1])
    return status, json.loads(body) if status in (200, 503) else None


@pytest.mark.parametrize(
    ("states", "live", "ready"),
    [
        (["running"], True, True),
        (["running", "running"], True, True),
        (["running", "starting"], True, False),
        (["running", "reconnecting"], True, False),
        (["restarting"], True, False),
        (["draining"], True, False),
        (["running", "dead"], False, False),
        ([], True, False),
    ],
)
async def test_live_while_no_loop_is_dead_and_ready_when_all_are_running(
    states: list[str], live: bool, ready: bool
) -> None:
    report = HealthReport(loops=[loop(state) for state in states])
    server = HealthServer("127.0.0.1", 0, lambda: report)
    await server.start()
    try:
        statuses = [(await get(server.port, path))[0] for path in ("/health/live", "/health/ready", "/health", "/")]
    finally:
        await server.stop()
    assert statuses == [200 if live else 503, 200 if ready else 503, 200, 404]


async def test_the_report_tells_of_every_loop() -> None:
    report = HealthReport(loops=[loop("running", progress=1.5, restarts=2, in_flight=3), loop("dead")])
    server = HealthServer("127.0.0.1", 0, lambda: report)
    await server.start()
    _, body = await get(server.port, "/health")
    await server.stop()
    common = {"queue": "orders", "protocol": "http"}
    running = {"state": "running", "progress": 1.5, "restarts": 2, "in_flight": 3}
    dead = {"state": "dead", "progress": None, "restarts": 0, "in_flight": 0}
    assert body == {"live": False, "ready": False, "loops": [common | running, common | dead]}


async def test_stop_does_not_wait_for_idle_connections_and_may_be_repeated() -> None:
    server = HealthServer("127.0.0.1", 0, HealthReport)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    async with asyncio.timeout(10):
        await server.stop()
        await server.stop()
    writer.close()


async def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = HealthServer("127.0.0.1", taken.getsockname()[1], HealthReport)
        with pytest.raises(ConnectError, match="Choose another health_port"):
            await server.start()
    await server.stop()


async def test_no_other_library_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    server = HealthServer("127.0.0.1", 0, HealthReport)
    await server.start()
    assert (await get(server.port, "/health"))[0] == 200
    await server.stop()


async def test_a_runner_is_ready_while_it_runs_and_not_while_it_drains() -> None:
    # Given a runner with a handler that waits
    consumers = ConsumerFactory(url="asyncio://")
    entered, leave = asyncio.Event(), asyncio.Event()

    @consumers.route("orders")
    async def handler(msg: Any) -> None:
        entered.set()
        await leave.wait()

    runner = ConsumerRunner(consumers, health_port=0)
    async with runner:
        assert runner._health is not None
        port = runner._health.port
        # Then it is ready, and says what it does
        assert (await get(port, "/health/ready"))[0] == 200
        async with Producer("orders", url="asyncio://") as producer:
            await producer.send(1)
        await entered.wait()
        _, report = await get(port, "/health")
        assert report["loops"][0]["in_flight"] == 1
        # When it is told to stop, it is alive and not ready
        runner.stop()
        await wait_until(lambda: not runner.health().ready)
        assert (await get(port, "/health/live"))[0] == 200
        assert (await get(port, "/health/ready"))[0] == 503
        leave.set()


async def ask(port: int, *lines: str) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "".join(f"{line}\r\n" for line in lines)
    writer.write(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{head}\r\n".encode())
    body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")[2]
    writer.close()
    return json.loads(body)


TOKEN = "0123456789abcdefgh"


@pytest.mark.parametrize("proxied", ["X-Forwarded-For: 10.0.0.1", "Forwarded: for=10.0.0.1", "X-Real-IP: 10.0.0.1"])
async def test_a_stranger_learns_only_whether_the_service_is_live_and_ready(
    monkeypatch: pytest.MonkeyPatch, proxied: str
) -> None:
    monkeypatch.setenv("HTTP_TOKENS", TOKEN)
    server = HealthServer("127.0.0.1", 0, lambda: HealthReport(loops=[loop("running")]))
    await server.start()
    try:
        assert await ask(server.port, proxied) == {"live": True, "ready": True}
        assert await ask(server.port, proxied, f"Authorization: Bearer {TOKEN}x") == {"live": True, "ready": True}
        assert (await ask(server.port, proxied, f"Authorization: Bearer {TOKEN}"))["loops"][0]["queue"] == "orders"
        assert (await ask(server.port))["loops"][0]["queue"] == "orders"
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("lines", "sees"),
    [
        (["Host: 127.0.0.1:8080"], True),
        (["Host: LOCALHOST:8080"], True),
        (["Host: [::1]:8080"], True),
        (["Host: [::1]"], True),
        (["Host: localhost", "Sec-Fetch-Site: none"], True),
        (["Host: evil.example"], False),
        (["Host: 127.0.0.1.evil.example:80"], False),
        (["Host: localhost.evil.example"], False),
        (["Host: localhost."], False),
        (["Host: "], False),
        (["Host: 127.0.0.1", "Origin: http://evil.example"], False),
        (["Host: 127.0.0.1", "Sec-Fetch-Site: cross-site"], False),
        (["Host: 127.0.0.1", "Sec-Fetch-Site: same-origin"], False),
        (["Host: 127.0.0.1", "Referer: http://evil.example/"], False),
    ],
)
async def test_a_web_page_in_a_browser_of_this_machine_is_a_stranger(
    strangers: HealthServer, lines: list[str], sees: bool
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", strangers.port)
    writer.write("\r\n".join(["GET /health HTTP/1.1", *lines, "Connection: close", "", ""]).encode())
    body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")[2]
    writer.close()
    assert ("loops" in json.loads(body)) is sees


@pytest.fixture
async def strangers() -> AsyncIterator[HealthServer]:
    server = HealthServer("127.0.0.1", 0, lambda: HealthReport(loops=[loop("running")]))
    await server.start()
    yield server
    await server.stop()


async def test_connections_that_say_nothing_do_not_keep_out_who_asks(strangers: HealthServer) -> None:
    number = 3 * health_port.CONNECTIONS
    silent = [await asyncio.open_connection("127.0.0.1", strangers.port) for _ in range(number)]
    silent[-1][1].write(b"GET /health HTTP/1.1\r\nHost: ")
    assert (await get(strangers.port, "/health/live"))[0] == 200
    assert len(strangers._server._open) <= health_port.CONNECTIONS
    for reader, _ in silent[: health_port.CONNECTIONS]:
        assert await asyncio.wait_for(reader.read(), 10) == b""  # the oldest were ended
    silent[-1][1].write(b"x\r\n\r\n")
    assert (await asyncio.wait_for(silent[-1][0].read(), 10)).startswith(b"HTTP/1.1 200")
    for _, writer in silent:
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [b"G\x1b[31mT /x HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", b"\n\x1b\r\n"]
    + [b"POST /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"],
)
async def test_what_strangers_send_is_in_no_log_and_no_answer_names_versions(
    strangers: HealthServer, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = await asyncio.open_connection("127.0.0.1", strangers.port)
    writer.write(sent)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.close()
    assert head.split()[1][:1] == b"4"
    assert b"aiohttp" not in head and b"Python" not in head
    assert caplog.text == ""


async def say(number: int, request: bytes) -> bytes:
    """What is answered to these bytes until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health?x=1 HTTP/1.1\r\n\r\n", 200),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /health/ready HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 200),
        (b"GET /health HTTP/1.1\r\n\xff: \xff\r\nno colon\r\n\r\nGET / HTTP/1.1\r\n\r\n", 200),
        (b"GET /healthy HTTP/1.1\r\n\r\n", 404),
        (b"POST /health HTTP/1.1\r\n\r\n", 405),
        (b"GET /health HTTP/2\r\n\r\n", 400),
        (b"GET  /health HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00" + b"x" * 8192, 431),
        (b"GET /health HTTP/1.1\r\nx: " + b"x" * 8200 + b"\r\n\r\n", 431),
    ],
)
async def test_each_request_has_one_answer_and_then_the_connection_ends(
    strangers: HealthServer, request_: bytes, status: int
) -> None:
    answer = await say(strangers.port, request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"\r\nConnection: close" in head
    assert bool(body) is not request_.startswith(b"HEAD")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
async def test_a_connection_without_a_whole_request_ends(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(health_port, "REQUEST_TIMEOUT", 0.05)
    server = HealthServer("127.0.0.1", 0, HealthReport)
    await server.start()
    assert await say(server.port, sent) == b""
    assert not server._server._open
    await server.stop()


async def test_a_report_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    server = HealthServer("127.0.0.1", 0, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    await server.start()
    assert (await get(server.port, "/health"))[0] == 500
    await server.stop()
    assert "ZeroDivisionError" in caplog.text


async def test_tokens_that_cannot_be_used_are_a_clear_error_that_does_not_show_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_TOKENS", "hunter2")
    with pytest.raises(ConfigurationError, match="HTTP_TOKENS") as caught:
        await HealthServer("127.0.0.1", 0, HealthReport).start()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False)]
    + [("::ffff:10.0.0.1", False), ("localhost", False), ("", False), ("fe80::1", False)],
)
def test_only_addresses_of_this_machine_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
