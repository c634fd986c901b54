"""The proxy itself: what it claims to do to a connection, it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    except ConnectionError:
        pass  # the proxy reset us, as asked
    finally:
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with server, Proxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def connect(proxy: Proxy) -> Streams:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def ask(streams: Streams, text: bytes = b"hello\n") -> bytes:
    reader, writer = streams
    writer.write(text)
    await writer.drain()
    async with asyncio.timeout(5):
        return await reader.readline()


async def close(*all_streams: Streams) -> None:
    for _, writer in all_streams:
        writer.close()


async def test_it_forwards_both_ways(proxy: Proxy) -> None:
    streams = await connect(proxy)
    assert await ask(streams) == b"hello\n"
    assert (proxy.connections, proxy.accepted) == (1, 1)
    await close(streams)
    await wait_until(lambda: proxy.connections == 0)


async def test_it_carries_large_bodies_whole(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    lines = [bytes([65 + n % 26]) * 9_999 + b"\n" for n in range(300)]

    async def send() -> None:
        for line in lines:
            writer.write(line)
            await writer.drain()

    sending = asyncio.create_task(send())
    assert [await reader.readline() for _ in lines] == lines
    await sending
    writer.close()


async def test_latency_delays_each_direction(proxy: Proxy) -> None:
    streams = await connect(proxy)
    await ask(streams)
    proxy.latency = 0.1
    started = time.monotonic()
    await ask(streams)
    assert time.monotonic() - started >= 0.2
    await close(streams)


async def test_hang_keeps_the_connection_and_forwards_later(proxy: Proxy) -> None:
    reader, writer = streams = await connect(proxy)
    await ask(streams)
    proxy.hang()
    writer.write(b"waiting\n")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(answer := asyncio.create_task(reader.readline())), 0.1)
    assert not reader.at_eof()
    proxy.flow()
    assert await answer == b"waiting\n"
    await close(streams)


async def test_a_new_connection_hangs_too(proxy: Proxy) -> None:
    proxy.hang()
    streams = await connect(proxy)
    await wait_until(lambda: proxy.accepted == 1)
    assert proxy.connections == 0
    proxy.flow()
    assert await ask(streams) == b"hello\n"
    await close(streams)


async def test_cut_ends_a_connection_in_order_and_takes_new_ones(proxy: Proxy) -> None:
    reader, writer = streams = await connect(proxy)
    await ask(streams)
    await proxy.cut()
    assert await reader.read() == b""
    writer.close()
    again = await connect(proxy)
    assert await ask(again) == b"hello\n"
    await close(again)


async def test_reset_breaks_a_connection_off_and_takes_new_ones(proxy: Proxy) -> None:
    reader, writer = streams = await connect(proxy)
    await ask(streams)
    await proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    again = await connect(proxy)
    assert await ask(again) == b"hello\n"
    await close(again)


async def test_down_refuses_and_restore_listens_on_the_same_port(proxy: Proxy) -> None:
    port = proxy.port
    reader, writer = streams = await connect(proxy)
    await ask(streams)
    await proxy.down()
    await proxy.down()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    with pytest.raises(ConnectionRefusedError):
        await connect(proxy)
    await proxy.restore()
    await proxy.restore()
    assert proxy.port == port
    again = await connect(proxy)
    assert await ask(again) == b"hello\n"
    writer.close()
    await close(again)


async def test_down_ends_a_hanging_connection(proxy: Proxy) -> None:
    reader, writer = streams = await connect(proxy)
    await ask(streams)
    proxy.hang()
    writer.write(b"never\n")
    await writer.drain()
    await proxy.down()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_target_that_refuses_closes_the_client() -> None:
    async with Proxy("127.0.0.1", 1) as proxy:
        reader, writer = await connect(proxy)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_cut_does_not_wait_for_a_peer_that_reads_nothing(proxy: Proxy) -> None:
    reader, writer = await connect(proxy)
    sent: list[int] = []
    flood = asyncio.create_task(_flood(writer, sent))
    await _comes_to_a_stop(sent)
    async with asyncio.timeout(10):
        await proxy.cut()
        await flood
    writer.close()


async def _flood(writer: asyncio.StreamWriter, sent: list[int]) -> None:
    with suppress(ConnectionError):
        while True:
            writer.write(b"x" * 9_999 + b"\n")
            await writer.drain()
            sent.append(1)


async def _comes_to_a_stop(sent: list[int]) -> None:
    """Every buffer on the way is full."""
    seen = -1
    while seen != len(sent):
        seen = len(sent)
        await asyncio.sleep(0.1)


async def test_wait_until_names_what_did_not_come_true() -> None:
    def never() -> bool:
        return False

    with pytest.raises(TimeoutError, match="never"):
        await wait_until(never, timeout=0.05)
