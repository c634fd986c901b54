"""Consumers on real ports, and requests written by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer, HTTPProducer
from streamtools.retry import Retry

#: Retries that cost no time.
QUICK = Retry(retries=2, delay=0, jitter=0)


@dataclass
class Reply:
    """An answer, read from a socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@asynccontextmanager
async def serving(
    handler: Callable[..., Any], queue: str = "orders", *, grace: float = 5, **options: Any
) -> AsyncIterator[HTTPConsumer]:
    """A consumer whose loop runs, on a free port if none is given."""
    consumer = HTTPConsumer(queue, **{"port": 0, **options})
    bound = consumer()(handler)
    started = asyncio.Event()
    task = asyncio.create_task(consumer.run(bound, on_started=started.set))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    try:
        yield consumer
    finally:
        consumer.stop(grace)
        await asyncio.wait_for(task, 20)


def producer_to(consumer: HTTPConsumer, **options: Any) -> HTTPProducer:
    """A producer for what the consumer takes."""
    return HTTPProducer(consumer.queue, port=consumer.address[1], method=consumer.options.method, **options)


def request(method: str = "POST", path: str = "/orders", body: bytes = b"", **headers: str) -> bytes:
    """A request as it stands on the wire; its connection is closed after the answer."""
    lines = {"Host": "test", "Connection": "close", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def talk(consumer: HTTPConsumer, data: bytes) -> Reply:
    """Send bytes on a connection of its own; the first answer."""
    reader, writer = await asyncio.open_connection(*consumer.address)
    try:
        writer.write(data)
        return await read_reply(reader)
    finally:
        writer.close()


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """One answer off a connection."""
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Reply(int(status.split()[1]), headers, body)


class Gate:
    """A handler that waits until it is let through."""

    def __init__(self) -> None:
        self.entered = 0
        self.open = asyncio.Event()

    async def __call__(self, msg: Any) -> str:
        self.entered += 1
        await self.open.wait()
        return "through"


@pytest.fixture
def gate() -> Gate:
    return Gate()
