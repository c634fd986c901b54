"""What a connection may hold and how long it may take; who loses first when there are too many."""

from __future__ import annotations

import asyncio
import gc
import ssl
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer, connections
from streamtools.drivers.http.connections import Connections, Counted
from streamtools.settings import HTTPSettings
from tests.drivers.http.conftest import Gate, read_reply, request, serving, talk
from tests.drivers.http.test_raw import CHUNKED, echo, ends
from tests.drivers.http.test_tls import files  # noqa: F401 - a fixture
from tests.faults.waiting import wait_until

HEAD = b"POST /orders HTTP/1.1\r\nHost: x\r\n"


def port_of(consumer: HTTPConsumer) -> Connections:
    assert consumer._server is not None
    return consumer._server._connections


async def opened(consumer: HTTPConsumer, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*consumer.address)
    writer.write(data)
    return reader, writer


@pytest.mark.parametrize("name", [b"ce-id", b"ce-type", b"ce-errortraceback", b"ce-unknown", b"X-A", b"Cookie"])
async def test_every_header_counts_towards_their_limit(name: bytes) -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, HEAD + name + b": " + b"x" * 70_000 + b"\r\nContent-Length: 2\r\n\r\n{}")
        assert reply.status == 431
        packed = b"streamtools-headers: a%20b=" + b"x" * 70_000
        assert (await talk(consumer, HEAD + packed + b"\r\nContent-Length: 2\r\n\r\n{}")).status == 431


@pytest.mark.parametrize("header", [b"x" * 190_000, b"x" * 100, b""])
async def test_a_head_without_end_is_refused_before_much_of_it_is_held(header: bytes) -> None:
    async with serving(echo) as consumer:
        reader, writer = await opened(consumer, HEAD)
        try:
            for number in range(5000):
                writer.write(b"X-%d: %b\r\n" % (number, header))
                await writer.drain()
                assert port_of(consumer).held < 2 * connections.HEAD_LIMIT
        except ConnectionError:
            pass
        with suppress(ConnectionError):  # the answer may be lost with what its sender has still on the way
            reply = await read_reply(reader)
            assert reply.status in (400, 431)  # the number of headers, or their size
        writer.close()
        await wait_until(lambda: len(port_of(consumer)) == 0 and port_of(consumer).held == 0)


async def test_a_head_that_drips_ends_in_time_with_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)
    monkeypatch.setattr(connections, "CHECK_INTERVAL", 0.1)
    async with serving(echo) as consumer:
        reader, writer = await opened(consumer)

        async def drip() -> None:
            for byte in HEAD + b"X: " + b"x" * 1000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        reply = await read_reply(reader)
        assert (reply.status, reply.headers["connection"], await ends(reader)) == (408, "close", True)
        dripping.cancel()
        silent, other = await opened(consumer)
        assert await ends(silent)  # without a word: nothing was asked
        other.close()
        writer.close()


@pytest.mark.parametrize(
    "endless", [b"x", b"x\r\n1\r\n" * 100, b"0\r\nX: " + b"y" * 1000], ids=["extension", "chunks", "trailer"]
)
async def test_a_body_that_is_mostly_no_body_is_cut_off(endless: bytes) -> None:
    async with serving(echo) as consumer:
        reader, writer = await opened(consumer, CHUNKED + (b"1;a=" if endless == b"x" else b"1\r\n"))
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 50 * 2**20:
                writer.write(endless * (65536 // len(endless)))
                await writer.drain()
                sent += 65536
        writer.close()
        assert port_of(consumer).held < 4 * 2**20
        assert (await talk(consumer, request(body=b"{}"))).status == 200


async def test_the_slowest_connection_goes_when_there_are_too_many_and_none_that_is_at_work(gate: Gate) -> None:
    async with serving(gate, url=HTTPSettings(max_connections=16), concurrency=4) as consumer:
        working = [await opened(consumer, request(body=b"{}")) for _ in range(4)]
        await wait_until(lambda: gate.entered == 4)
        slow = [await opened(consumer, HEAD) for _ in range(12)]
        await wait_until(lambda: len(port_of(consumer)) == 16)
        reader, writer = await opened(consumer, request("OPTIONS"))
        assert (await read_reply(reader)).status == 204
        assert (await read_reply(slow[0][0])).status == 408
        gate.open.set()
        assert [(await read_reply(each)).status for each, _ in working] == [200] * 4
        for _, each in (*working, *slow, (reader, writer)):
            each.close()


async def test_an_idle_connection_that_was_of_use_outlives_those_that_were_not() -> None:
    async with serving(echo, url=HTTPSettings(max_connections=16)) as consumer:
        good, writer = await opened(consumer, request(body=b"1", Connection="keep-alive"))
        assert (await read_reply(good)).status == 200
        bad = [await opened(consumer) for _ in range(40)]
        writer.write(request(body=b"2"))
        assert (await read_reply(good)).body == b"2"
        for _, each in (*bad, (good, writer)):
            each.close()


async def test_bodies_that_stand_still_go_before_one_that_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNFINISHED", 4 * 2**20)
    async with serving(echo) as consumer:
        head = HEAD + b"Content-Length: 1048576\r\n\r\n"
        slow = [await opened(consumer, head + b"x" * 900_000) for _ in range(12)]
        await wait_until(lambda: port_of(consumer)._ended > 6)
        for _ in range(5):
            body = b'"' + b"y" * 1_000_000 + b'"'
            async with asyncio.timeout(20):  # those that stand still have 30 s
                assert (await talk(consumer, request(body=body, Content_Type="application/json"))).status == 200
        assert port_of(consumer).held <= 4 * 2**20
        for _, each in slow:
            each.close()
        await wait_until(lambda: len(port_of(consumer)) == 0 and port_of(consumer).held == 0)


async def test_an_answer_that_nobody_reads_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_GRACE_TIMEOUT", 0.2)
    monkeypatch.setattr(connections, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(connections, "UNREAD", 200 * 2**20)

    async def large(msg: Any) -> str:
        return "x" * 30_000_000

    async with serving(large, concurrency=4) as consumer:
        deaf = [await asyncio.open_connection(*consumer.address, limit=1024) for _ in range(3)]
        for _, writer in deaf:
            writer.write(request(body=b"{}", Connection="keep-alive"))
        await wait_until(lambda: sum(each.unsent > 0 for each in port_of(consumer)._all) == 3)
        await wait_until(lambda: len(port_of(consumer)) == 0)
        for _, writer in deaf:
            writer.close()
        assert len((await talk(consumer, request(body=b"{}"))).body) == 30_000_000


async def test_unread_answers_hold_no_more_than_their_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD", 20 * 2**20)

    async def large(msg: Any) -> str:
        return "x" * 10_000_000

    async with serving(large, concurrency=4) as consumer:
        deaf = [await asyncio.open_connection(*consumer.address, limit=1024) for _ in range(8)]
        for _, writer in deaf:
            writer.write(request(body=b"{}"))
            await asyncio.sleep(0)
        await wait_until(lambda: port_of(consumer)._ended >= 4)
        assert sum(each.unsent for each in port_of(consumer)._all) <= 30 * 2**20
        for _, writer in deaf:
            writer.close()


async def test_handshakes_that_never_end_count_as_connections(files: dict[str, Any]) -> None:  # noqa: F811
    async with serving(echo, url=HTTPSettings(tls=True, max_connections=16, **files)) as consumer:
        mute = [await opened(consumer, b"\x16\x03\x01") for _ in range(64)]
        trusting = ssl.create_default_context(cafile=files["certfile"])
        reader, writer = await asyncio.open_connection(*consumer.address, ssl=trusting)
        writer.write(request(body=b"{}"))
        assert (await read_reply(reader)).status == 200
        assert len(port_of(consumer)) <= 16
        for _, each in (*mute, (reader, writer)):
            each.close()
        await wait_until(lambda: len(port_of(consumer)) == 0)


async def test_the_peer_with_the_most_connections_loses_first() -> None:
    class Fake(Counted):
        ended = False

        def abort(self) -> None:
            self.ended = True

    limits = Connections(100)

    def join(peer: str) -> Fake:
        fake = Fake(limits)
        fake.peer = peer
        limits.add(fake)
        return fake

    modest = [join("10.0.0.1") for _ in range(5)]
    greedy = [join("10.0.0.2") for _ in range(500)]
    assert not any(each.ended for each in modest)
    assert sum(not each.ended for each in greedy) <= 95
    assert (greedy[0].ended, greedy[-1].ended) == (True, False)
    limits.close()


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("2001:db8:1:2:3::1", 5, 0, 0), "2001:db8:1:2::/64"),
        (("::ffff:10.0.0.1", 5, 0, 0), "::ffff:10.0.0.1"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        ("/run/socket", ""),
        (None, ""),
    ],
)
def test_a_peer_is_an_address_or_the_network_of_an_ipv6_host(name: object, peer: str) -> None:
    assert connections.peer_of(name) == peer


async def test_a_client_that_asks_to_go_on_and_leaves_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(echo) as consumer:
        for _ in range(50):
            _, writer = await opened(consumer, HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            writer.transport.abort()
        for _ in range(50):
            _, writer = await opened(consumer, HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nabc")
            writer.write_eof()
            writer.close()
        assert (await talk(consumer, request(body=b"{}"))).status == 200
    assert not [record for record in caplog.records if record.exc_info]


async def test_what_a_refused_body_held_is_free_at_once() -> None:
    with counted() as held:
        async with serving(echo, url=HTTPSettings(max_connections=8)) as consumer:
            slow = [
                await opened(consumer, HEAD + b"Content-Length: 1048576\r\n\r\n" + b"x" * 900_000) for _ in range(60)
            ]
            await wait_until(lambda: len(port_of(consumer)) <= 8)
            await wait_until(lambda: held() <= 12_000_000)
            for _, writer in slow:
                writer.close()


async def test_an_idle_connection_keeps_neither_its_last_answer_nor_a_large_head() -> None:
    async def large(msg: Any) -> str:
        return "x" * 900_000

    with counted() as held:
        async with serving(large) as consumer:
            idle = [await opened(consumer, request(body=b"{}", Connection="keep-alive")) for _ in range(30)]
            for reader, _ in idle:
                assert (await read_reply(reader)).status == 200
            await wait_until(lambda: held() <= 4_000_000)
            reader, writer = await opened(consumer, request(body=b"{}", Connection="keep-alive", X_A="a" * 20_000))
            assert (await read_reply(reader)).headers["connection"] == "close"
            for _, each in (*idle, (reader, writer)):
                each.close()


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How many bytes are held that were not before; what only the collector of cycles would free counts as held."""
    gc.collect()
    gc.disable()
    tracemalloc.start(1)
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
