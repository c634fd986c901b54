"""What a handler sends, and where its reply goes, over HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamtools import Bus, Command, MessageContext
from streamtools.drivers.http import HTTPConsumer, HTTPProducer
from streamtools.errors import ConfigurationError
from streamtools.message import Message
from streamtools.retry import Retry
from tests.drivers.http.conftest import request, talk
from tests.faults.waiting import wait_until


class QuotePrice(Command):
    pass


@asynccontextmanager
async def running(handler: Any, **options: Any) -> AsyncIterator[HTTPConsumer]:
    """A bus with one handler, on a free port; its consumer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bus = Bus("quotes", url=f"http://127.0.0.1:{port}", **options)
    bus.handler(handler)
    async with bus:
        assert isinstance(bus.consumer, HTTPConsumer)
        yield bus.consumer


def ask(reply_to: str) -> bytes:
    """A request as another service's bus would send it."""
    return request(path="/quotes", body=b"{}", ce_intent="request", ce_replyto=reply_to)


@pytest.fixture
async def peer() -> AsyncIterator[tuple[str, list[str]]]:
    """The address of someone who notes each request line, and takes it."""
    seen: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/any/path?x=1", seen


async def answer_quote(msg: dict[str, Any]) -> dict[str, Any]:
    return {"price": 5}


async def reply_quote(msg: dict[str, Any], context: MessageContext) -> None:
    await context.reply({"price": 6})


async def fail_quote(msg: dict[str, Any]) -> None:
    raise ConnectionError("no route to postgresql://app:S3cret@db")


@pytest.mark.parametrize("kind", [HTTPConsumer, HTTPProducer])
@pytest.mark.parametrize("address", ["orders", "http://127.0.0.1:9312/any/path?x=1", "//h/a", ""])
def test_no_address_is_one_for_a_reply(kind: type[HTTPConsumer] | type[HTTPProducer], address: str) -> None:
    with pytest.raises(ConfigurationError, match="return it from the handler"):
        kind.validate_reply(address)


async def test_a_handler_replies_to_who_waits_on_the_line_although_no_address_is_named() -> None:
    async with running(reply_quote) as consumer:
        reply = await talk(consumer, request(path="/quotes", body=b"{}", ce_intent="request"))
    assert (reply.status, reply.body) == (200, b'{"price":6}')


@pytest.mark.parametrize("kind", ["QuotePrise", "x" * 30_000])
async def test_no_stranger_is_told_which_contracts_there_are(kind: str) -> None:
    async def quote(msg: QuotePrice) -> int:
        return 5

    async with running(quote) as consumer:
        reply = await talk(consumer, request(path="/quotes", body=b"{}", ce_type=kind))
    assert (reply.status, b"QuotePrice" in reply.body, len(reply.body) < 5000) == (422, False, True)


@pytest.mark.parametrize(
    ("handler", "expected"), [(answer_quote, (200, b'{"price":5}')), (reply_quote, (200, b'{"price":6}'))]
)
async def test_a_reply_goes_in_the_answer_and_to_no_address_that_a_request_names(
    handler: Any, expected: Any, peer: tuple[str, list[str]]
) -> None:
    reply_to, seen = peer
    async with running(handler) as consumer:
        reply = await talk(consumer, ask(reply_to))
        assert (reply.status, reply.body) == expected
    assert seen == []


async def test_why_a_request_failed_goes_to_no_address_that_it_names(peer: tuple[str, list[str]]) -> None:
    reply_to, seen = peer
    async with running(fail_quote, retry=Retry(retries=0)) as consumer:
        reply = await talk(consumer, ask(reply_to))
    assert (reply.status, b"S3cret" in reply.body, seen) == (500, False, [])


async def send_elsewhere(msg: dict[str, Any], context: MessageContext) -> None:
    await context.send({}, to="nowhere", type="a")


@pytest.mark.parametrize("handler", [answer_quote, send_elsewhere])
async def test_clients_that_leave_do_not_wedge_the_route(handler: Any) -> None:
    # Given more clients than the consumer has in hand, whose reply address refuses, or whose message's handler sends
    # to a queue that is not there
    async with running(handler, retry=Retry(retries=0)) as consumer:
        loop = consumer._loop
        for _ in range(12):
            leaving = [await asyncio.open_connection(*consumer.address) for _ in range(10)]
            for _, writer in leaving:
                writer.write(ask("http://127.0.0.1:1/refuses"))
                await writer.drain()
            # When they leave
            for _, writer in leaving:
                writer.transport.abort()
        # Then the next one is answered, and all that was in hand is settled
        async with asyncio.timeout(10):
            assert (await talk(consumer, ask(""))).status == (200 if handler is answer_quote else 500)
        await wait_until(lambda: consumer._loop is loop and loop is not None and loop.in_hand == 0)


async def test_a_producer_sends_no_reply_to_an_address() -> None:
    async with HTTPProducer("orders", url="http://127.0.0.1:1") as producer:
        reply = Message(body=b"", queue="http://127.0.0.1:1/a", id="1", intent="reply")
        with pytest.raises(ConfigurationError, match="return it from the handler"):
            await producer.send_messages([reply])
