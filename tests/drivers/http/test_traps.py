"""A producer's peer answers with whatever it likes: what is read of it is bounded, in size and in time."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache

import pytest

from streamtools.drivers.http import HTTPProducer
from streamtools.errors import ConnectionLost, ResponseError, SendError
from streamtools.settings import HTTPSettings

MIB = 1024 * 1024
Answer = Callable[[asyncio.StreamWriter], AsyncIterator[bytes]]


def whole(head: bytes, body: bytes = b"") -> list[bytes]:
    return [b"HTTP/1.1 " + head + b"\r\nContent-Length: %d\r\n\r\n" % len(body), body]


@asynccontextmanager
async def trap(first: list[bytes], then: bytes = b"", pause: float = 0) -> AsyncIterator[tuple[int, list[int]]]:
    """A port that answers with `first`, and then with `then` for ever; and how many bytes of it were taken."""
    taken: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(0)
        await reader.readuntil(b"\r\n\r\n")
        try:
            for part in first:
                writer.write(part)
            while then:
                await writer.drain()
                taken[-1] += len(then)
                writer.write(then)
                await asyncio.sleep(pause)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], taken


async def send(port: int, **settings: float) -> SendError:
    """The error that a send ends with."""
    url = HTTPSettings(host="127.0.0.1", port=port, **settings)
    async with HTTPProducer("orders", url=url, send_timeout=5) as producer:
        with pytest.raises(SendError) as caught:
            await producer.send({}, id="1")
    return caught.value


@cache
def bomb() -> bytes:
    """400 MiB of zeros in 400 kB."""
    return gzip.compress(b"\0" * (400 * MIB), 9)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "gzip, gzip"])
async def test_an_answer_that_is_huge_once_decompressed_is_a_clear_error(encoding: str) -> None:
    body = gzip.compress(bomb()) if "," in encoding else bomb()
    async with trap(whole(b"200 OK\r\nContent-Encoding: " + encoding.encode(), body)) as (port, _):
        start = time.thread_time()
        error = await send(port)
        assert time.thread_time() - start < 1  # of computing; all of it takes several
    assert ("over 16777216 bytes (max_answer=)" in str(error), error.unknown) == (True, ("1",))


@pytest.mark.parametrize(
    "head", [b"Transfer-Encoding: chunked", b"Connection: close", b"Content-Length: 99999999999"]
)
async def test_a_body_without_end_is_read_up_to_the_limit(head: bytes) -> None:
    part = b"10000\r\n" + b"x" * 65536 + b"\r\n" if b"chunked" in head else b"x" * 65536
    async with trap([b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n"], part) as (port, taken):
        assert "max_answer=" in str(await send(port, max_answer=MIB))
        assert max(taken) < 16 * MIB


async def test_a_body_that_comes_byte_by_byte_ends_with_the_time_for_one_answer() -> None:
    async with trap([b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"], b"x", 0.01) as (port, _):
        assert "not answered in time" in str(await send(port, timeout=0.5))


@pytest.mark.parametrize(
    "then",
    [b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 9000 + b"\r\n\r\n"]
    + [b"X-A: " + b"a" * 1000 + b"\r\n", b"a" * 65536, b"\r\n" * 1000],
)
async def test_headers_without_end_are_bounded(then: bytes) -> None:
    first = [] if then.startswith((b"HTTP", b"\r")) else [b"HTTP/1.1 200 OK\r\n"]
    async with trap(first, then) as (port, _):
        start = time.perf_counter()
        assert isinstance(await send(port, timeout=0.5), SendError)
        assert time.perf_counter() - start < 30


@pytest.mark.parametrize("status", [b"500 No", b"404 No", b"400 No", b"101 Switching Protocols", b"999 No"])
async def test_an_error_whose_body_is_huge_or_broken_is_the_same_error_without_it(status: bytes) -> None:
    for body in (bomb(), b"no gzip"):
        head = status + b"\r\nContent-Encoding: gzip"
        async with trap(whole(head, body)) as (port, _):
            error = await send(port, timeout=1)
        assert not isinstance(error, ResponseError) or error.body == b""


async def test_an_answer_that_is_not_encoded_as_it_says_was_an_answer_all_the_same() -> None:
    async with trap(whole(b"200 OK\r\nContent-Encoding: gzip", b"no gzip")) as (port, _):
        error = await send(port)
    assert ("so the message was accepted" in str(error), error.unknown) == (True, ("1",))


async def test_an_answer_with_a_transfer_encoding_that_no_one_asked_for_is_a_clear_error() -> None:
    body = gzip.compress(b'{"a":1}')
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with trap([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + chunks]) as (port, _):
        error = await send(port)
    assert ("Transfer-Encoding is 'gzip, chunked'" in str(error), error.unknown) == (True, ("1",))


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_answer_is_decompressed(encoding: str) -> None:
    body = (gzip if encoding == "gzip" else zlib).compress(b'{"a":1}')
    async with trap(whole(b"200 OK\r\nContent-Encoding: " + encoding.encode(), body)) as (port, _):
        async with HTTPProducer("orders", port=port) as producer:
            assert (await producer.send({})).json() == {"a": 1}


@pytest.mark.parametrize(
    "where", ["http://127.0.0.1:1/a", "file:///etc/passwd", "gopher://x/", "//other/", "\x1b[31m", "a" * 10_000]
)
async def test_no_redirect_is_followed_and_its_address_cannot_steer_a_terminal(where: str) -> None:
    head = b"302 Found\r\nLocation: " + where.encode() + b"?token=hunter2"
    async with trap(whole(head)) as (port, taken):
        error = await send(port)
        assert len(taken) == 1
    assert isinstance(error, ResponseError | ConnectionLost | SendError)
    assert ("\x1b" in str(error), "hunter2" in str(error), len(str(error)) < 500) == (False, False, True)


async def test_what_a_peer_says_of_an_error_cannot_forge_a_line_of_the_log() -> None:
    async with trap(whole(b"400 Bad", "no\n2026-01-01 INFO all is well \x1b[2J \u202e".encode())) as (port, _):
        text = str(await send(port))
    assert text.isprintable(), text


@pytest.mark.parametrize("when", ["9" * 60_000, "-1", "nan", "1e9", "Fri, 31 Dec 9999 23:59:59 GMT", "\xff", "inf"])
async def test_no_time_to_come_again_holds_a_message_longer_than_its_sender_waits(when: str) -> None:
    head = b"503 No\r\nRetry-After: " + when.encode("latin-1")
    async with trap(whole(head + b"\r\nce-attempt: " + b"9" * 500)) as (port, _):
        url = HTTPSettings(host="127.0.0.1", port=port)
        async with HTTPProducer("orders", url=url, send_timeout=1) as producer:
            start = time.perf_counter()
            with pytest.raises(SendError):
                await producer.send({})
            assert time.perf_counter() - start < 30
