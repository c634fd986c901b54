"""HTTP: requests that a model is read from and answered with, beside aiohttp by hand and FastAPI.

All three do the same: the body becomes a pydantic model, the handler returns another, and that is the answer. Each
server is a process of its own, on asyncio's event loop, with one worker and no access log; FastAPI runs on uvicorn
with httptools, which is what it is fastest with. The client is the same for all, and is no one's library: it writes
the same bytes to 32 connections that stay open, each with one request under way. The CPU time is that of the server.

    python -m benchmarks.http [rounds]
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from benchmarks.rounds import Contender, compare

REQUESTS = 10_000
WARM_UP = 1_000
CONNECTIONS = 32
GOAL = 0.85


class Line(BaseModel):
    """A line of an order."""

    sku: str
    quantity: int


class Order(BaseModel):
    """What is asked."""

    id: int
    customer: str
    lines: list[Line]
    note: str


class Accepted(BaseModel):
    """What is answered."""

    id: int
    pieces: int


ORDER = Order(id=1, customer="Ada", lines=[Line(sku="A-1", quantity=2), Line(sku="B-2", quantity=1)], note="x" * 128)
ANSWER = b'{"id":1,"pieces":3}'


def accept(order: Order) -> Accepted:
    """What each handler does."""
    return Accepted(id=order.id, pieces=sum(line.quantity for line in order.lines))


# --- servers ------------------------------------------------------------------------------------------


def _listening(port: int) -> None:
    print(port, flush=True)


async def serve_streamtools() -> None:
    from streamtools import Consumer

    consumer = Consumer("orders", url="http://127.0.0.1:0", concurrency=CONNECTIONS)

    @consumer()
    async def handle(order: Order) -> Accepted:
        return accept(order)

    await consumer.open()
    _listening(consumer.address[1])
    await handle()


async def serve_aiohttp() -> None:
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        try:
            order = Order.model_validate_json(await request.read())
        except ValidationError as error:
            return web.Response(status=422, body=error.json().encode(), content_type="application/json")
        accepted = accept(order)
        return web.Response(body=accepted.model_dump_json().encode(), content_type="application/json")

    app = web.Application()
    app.router.add_post("/orders", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    _listening(runner.addresses[0][1])
    await asyncio.Event().wait()


async def serve_fastapi() -> None:
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/orders")
    async def handle(order: Order) -> Accepted:
        return accept(order)

    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http="httptools", loop="asyncio", access_log=False, log_level="error")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    _listening(server.servers[0].sockets[0].getsockname()[1])
    await serving


SERVERS: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    "streamtools": serve_streamtools,
    "FastAPI": serve_fastapi,
    "aiohttp by hand": serve_aiohttp,
}


# --- the client ---------------------------------------------------------------------------------------


def _request(port: int) -> bytes:
    body = ORDER.model_dump_json().encode()
    head = (
        f"POST /orders HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client(asyncio.Protocol):
    """One connection, which asks again when it is answered, while any request is left."""

    def __init__(self, request: bytes, left: Iterator[int]) -> None:
        self._request = request
        self._left = left
        self._seen = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        if next(self._left, None) is None:
            self.done.set_result(None)
            self._transport.close()
        else:
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if self._seen.endswith(ANSWER) and self._seen.startswith(b"HTTP/1.1 200 "):
            self._seen = b""
            self._ask()
        elif len(self._seen) > 10_000:
            self.done.set_exception(RuntimeError(f"not the answer: {self._seen[:500]!r}"))
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"the server ended a connection; it had said {self._seen[:500]!r}"))


async def _load(port: int, requests: int) -> None:
    loop, left, request = asyncio.get_running_loop(), iter(range(requests)), _request(port)
    clients = [
        (await loop.create_connection(lambda: Client(request, left), "127.0.0.1", port))[1]
        for _ in range(CONNECTIONS)
    ]
    async with asyncio.timeout(120):
        await asyncio.gather(*(client.done for client in clients))


# --- rounds -------------------------------------------------------------------------------------------


def _cpu_of(process: int) -> float:
    """CPU seconds that a process has used; its clock's number is made of its id (clock_getcpuclockid)."""
    return time.clock_gettime((~process << 3) | 2)


@contextlib.contextmanager
def _server(name: str) -> Iterator[tuple[int, int]]:
    """The process and the port of a server."""
    command = [sys.executable, "-m", "benchmarks.http", "--serve", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


def _contender(name: str) -> Contender:
    def run() -> tuple[int, float, float]:
        with _server(name) as (process, port):
            asyncio.run(_load(port, WARM_UP))
            wall, cpu = time.perf_counter(), _cpu_of(process)
            asyncio.run(_load(port, REQUESTS))
            return REQUESTS, time.perf_counter() - wall, _cpu_of(process) - cpu

    return Contender(name, run)


def main(arguments: list[str]) -> None:
    """Print the table, and say whether the goal is met."""
    logging.disable(logging.WARNING)
    if arguments[:1] == ["--serve"]:
        return asyncio.run(SERVERS[arguments[1]]())
    rounds = int(arguments[0]) if arguments else 5
    title = f"{REQUESTS:,} requests of {len(ORDER.model_dump_json())} B from {CONNECTIONS} connections"
    ratios = compare(f"HTTP, a model in and a model out: {title}", [*map(_contender, SERVERS)], rounds=rounds)
    print(f"\nGoal {GOAL}x of aiohttp by hand: {ratios['streamtools']:.2f}x.")


if __name__ == "__main__":
    main(sys.argv[1:])
