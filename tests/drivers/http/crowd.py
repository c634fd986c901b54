"""Hostile clients of six kinds, as a process: `python -m tests.drivers.http.crowd PORT NUMBER`.

It ends with its input.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

KIB = b"x" * 1024
#: Seconds until one that was ended comes again.
AGAIN = 0.5
#: Seconds between two bytes of those who drip.
DRIP = 1.0


async def silent(writer: asyncio.StreamWriter) -> None:
    """Says nothing."""
    await asyncio.Event().wait()


async def drip_head(writer: asyncio.StreamWriter) -> None:
    """Sends its head a byte a second."""
    for byte in itertools.chain(b"POST /orders HTTP/1.1\r\nHost: x\r\nX: ", itertools.repeat(120)):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(DRIP)


async def fat_head(writer: asyncio.StreamWriter) -> None:
    """Sends 120 headers of 190 KiB, and no end of them."""
    writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\n")
    for number in range(120):
        for part in (b"X-%d: " % number, *[KIB] * 190, b"\r\n"):
            writer.write(part)
            await writer.drain()
    await asyncio.Event().wait()


async def slow_body(writer: asyncio.StreamWriter) -> None:
    """Sends most of a body at once, and the rest a byte a second."""
    writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n")
    for _ in range(1000):
        writer.write(KIB)
        await writer.drain()
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(DRIP)


async def reads_nothing(writer: asyncio.StreamWriter) -> None:
    """Asks for large answers, and reads none."""
    while True:
        writer.write(b"POST /large HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        await asyncio.sleep(DRIP)


async def no_body(writer: asyncio.StreamWriter) -> None:
    """Sends chunks whose extensions never end, then trailers that never do."""
    writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;a=")
    while True:
        writer.write(KIB)
        await writer.drain()
        await asyncio.sleep(0.01)


KINDS = (silent, drip_head, fat_head, slow_body, reads_nothing, no_body)


async def attack(kind: Callable[[asyncio.StreamWriter], Awaitable[None]], host: str, port: int, start: float) -> None:
    """One of them, again and again."""
    await asyncio.sleep(start)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port, limit=1024)
            ended = asyncio.ensure_future(_ended(reader, kind is reads_nothing))
            doing = asyncio.ensure_future(kind(writer))
            await asyncio.wait({ended, doing}, return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, doing):
                task.cancel()
            writer.transport.abort()
            await asyncio.gather(ended, doing, return_exceptions=True)
        await asyncio.sleep(AGAIN)


async def _ended(reader: asyncio.StreamReader, deaf: bool) -> None:
    while not deaf:
        if not await reader.read(65536):
            return
    await asyncio.Event().wait()


async def main(port: int, number: int) -> None:
    """Until the input ends."""
    tasks = [asyncio.create_task(attack(KINDS[n % len(KINDS)], "127.0.0.1", port, n / number)) for n in range(number)]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
