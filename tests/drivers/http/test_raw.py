"""Requests that no well-behaved client sends, and some that one does."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer, server
from streamtools.settings import HTTPSettings
from streamtools.verdicts import ACK
from tests.drivers.http.conftest import Gate, Reply, read_reply, request, serving, talk
from tests.faults.waiting import wait_until

CHUNKED = b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


async def echo(msg: Any) -> Any:
    return msg


async def ends(reader: asyncio.StreamReader) -> bool:
    """The peer closes the connection."""
    async with asyncio.timeout(10):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize(
    "data",
    [
        b"not http at all\r\n\r\n",
        b"POST /orders HTTP/9.9\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n1",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nBad Name: x\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
        b"POST /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 300_000 + b"\r\n\r\n",
        b"POST /orders HTTP/1.1\r\nHost: x\r\n" + b"A: x\r\n" * 1500 + b"\r\n",
        CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_400_for_what_is_not_http_and_the_consumer_lives(data: bytes) -> None:
    async with serving(echo) as consumer:
        assert (await talk(consumer, data)).status == 400
        assert (await talk(consumer, request(body=b"{}"))).status == 200


async def test_a_malformed_request_leaves_no_secret_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(echo) as consumer:
        await talk(consumer, b"POST /orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hunter2\x00\r\n\r\n")
        await talk(consumer, request(body=b"{oops", Authorization="Bearer hunter2", Content_Type="application/json"))
    assert "hunter2" not in caplog.text


async def test_a_chunked_body_is_put_together() -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, CHUNKED + b'4\r\n{"a"\r\n4\r\n: 1}\r\n0\r\n\r\n')
    assert reply.json() == {"a": 1}


async def test_400_for_a_body_that_is_not_compressed_as_it_says() -> None:
    async with serving(echo) as consumer:
        assert (await talk(consumer, request(body=b"not gzip", Content_Encoding="gzip"))).status == 400


async def test_408_for_a_body_that_does_not_arrive() -> None:
    async with serving(echo, url=HTTPSettings(timeout=0.2)) as consumer:
        reply = await talk(consumer, b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc")
    assert reply.status == 408


async def test_headers_that_never_end_do_not_keep_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_TIMEOUT", 0.2)
    async with serving(echo) as consumer:
        reader, writer = await asyncio.open_connection(*consumer.address)
        writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\n")
        assert await ends(reader)
        writer.close()


async def test_413_comes_before_a_huge_body_is_sent() -> None:
    async with serving(echo) as consumer:
        head = b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\nExpect: 100-continue\r\n\r\n"
        reply = await talk(consumer, head)
    assert (reply.status, reply.headers["connection"]) == (413, "close")


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async with serving(echo) as consumer:
        reader, writer = await asyncio.open_connection(*consumer.address)
        writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        reply = await read_reply(reader)
        writer.close()
    assert (reply.status, reply.json()) == (200, {})


async def test_pipelined_requests_on_one_connection_are_answered_in_order() -> None:
    async with serving(echo, concurrency=4) as consumer:
        reader, writer = await asyncio.open_connection(*consumer.address)
        writer.write(b"".join(request(body=str(n).encode(), Connection="keep-alive") for n in range(50)))
        replies = [await read_reply(reader) for _ in range(50)]
        writer.close()
    assert [reply.json() for reply in replies] == list(range(50))


async def test_http_1_0_and_a_whole_url_as_the_target_are_understood() -> None:
    async with serving(echo) as consumer:
        old = await talk(consumer, b"POST /orders HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        whole = await talk(consumer, request(path="http://elsewhere/orders?x=1", body=b"{}"))
    assert (old.status, whole.status) == (200, 200)


@pytest.mark.parametrize(
    ("queue", "path"),
    [("a b", "/a%20b"), ("ü", "/%C3%BC"), ("a/b", "/a/b"), ("a/b", "/a%2Fb"), ("a?b", "/a%3Fb"), ("/", "//")],
)
async def test_a_path_is_the_queues_name_percent_encoded(queue: str, path: str) -> None:
    async with serving(echo, queue) as consumer:
        assert (await talk(consumer, request(path=path, body=b"{}"))).status == 200


async def test_more_requests_than_may_wait_are_told_to_come_again(gate: Gate) -> None:
    # Given one in the handler, and one that waits in the mailbox
    async with serving(gate, prefetch=1) as consumer:
        first = asyncio.create_task(talk(consumer, request(body=b"{}")))
        await wait_until(lambda: gate.entered == 1)
        second = asyncio.create_task(talk(consumer, request(body=b"{}")))
        await wait_until(lambda: len(consumer._requests._waiting) == 1)  # type: ignore[union-attr]
        # When a third comes
        third = await talk(consumer, request(body=b"{}", ce_attempt="4"))
        # Then it is refused at once, and keeps its attempt
        assert (third.status, third.headers["retry-after"], third.headers["ce-attempt"]) == (503, "1", "4")
        gate.open.set()
        assert [(await first).status, (await second).status] == [200, 200]


async def test_a_client_that_leaves_does_not_stop_its_handler(gate: Gate) -> None:
    async with serving(gate, retry=None) as consumer:
        _, writer = await asyncio.open_connection(*consumer.address)
        writer.write(request(body=b"{}"))
        await wait_until(lambda: gate.entered == 1)
        writer.close()
        await writer.wait_closed()
        gate.open.set()
        await wait_until(lambda: consumer._loop is not None and consumer._loop.settled == 1)
        assert (await talk(consumer, request(body=b"{}"))).status == 200


async def test_a_request_whose_client_left_before_its_turn_is_not_handled() -> None:
    async with HTTPConsumer("orders", port=0, prefetch=2) as consumer:
        leaving = [await _asked(consumer) for _ in range(2)]
        await wait_until(lambda: len(consumer._requests._waiting) == 2)  # type: ignore[union-attr]
        for writer in leaving:
            writer.close()
        await wait_until(lambda: all(call.gone for call in consumer._requests._waiting))  # type: ignore[union-attr]
        staying = asyncio.create_task(talk(consumer, request(body=b'"staying"')))
        (delivery,) = await consumer.receive(2, timeout=5)
        await delivery.ack()
        assert delivery.message.body == b'"staying"'
        assert isinstance(await staying, Reply)


async def _asked(consumer: HTTPConsumer) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(*consumer.address)
    writer.write(request(body=b'"leaving"'))
    return writer


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with HTTPConsumer("orders", port=0) as consumer:
        for _ in range(20):
            asking = asyncio.create_task(talk(consumer, request(body=b"{}")))
            waiting = asyncio.create_task(consumer._receive(1))
            await wait_until(lambda: bool(consumer._requests._unanswered), poll=0)  # type: ignore[union-attr]
            waiting.cancel()
            result = (await asyncio.gather(waiting, return_exceptions=True))[0]
            batch = await consumer._receive(1) if isinstance(result, asyncio.CancelledError) else result
            await consumer._puller.settle(batch[0], ACK)
            assert (await asking).status == 202
