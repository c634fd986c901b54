"""Journeys of messages, by protocol: each moves a number of them, and says when its cost is to be measured."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from streamtools import Bus, Command, Consumer, Producer

PAYLOAD = {"id": 1, "customer": "Ada"}
BATCH = 100


class Meter(Protocol):
    """Measures from `start` to `stop`."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


#: Moves so many messages at a URL.
Journey = Callable[[str, int, Meter], Coroutine[Any, Any, None]]


class Place(Command, to="bus"):
    """A command for the bus."""

    id: int


def _queue() -> str:
    """A name that nobody else uses: brokers are shared."""
    return f"budget-{secrets.token_hex(6)}"


# --- with a broker ------------------------------------------------------------------------------------


async def send(url: str, number: int, meter: Meter) -> None:
    """One after the other."""
    async with Producer(_queue(), url=url) as producer:
        meter.start()
        for _ in range(number):
            await producer.send(PAYLOAD)
        meter.stop()


async def send_many(url: str, number: int, meter: Meter) -> None:
    """A hundred at once."""
    async with Producer(_queue(), url=url) as producer:
        meter.start()
        for _ in range(number // BATCH):
            await producer.send_many([PAYLOAD] * BATCH)
        meter.stop()


async def handle(url: str, number: int, meter: Meter, *, concurrency: int = 1) -> None:
    """By a handler, from a full queue."""
    queue, left = _queue(), number
    async with Producer(queue, url=url) as producer:
        await producer.send_many([PAYLOAD] * number)
    consumer = Consumer(queue, url=url, concurrency=concurrency, error_queue=f"{queue}.error")

    @consumer()
    async def count(order: dict[str, Any]) -> None:
        nonlocal left
        if left == number:
            meter.start()
        left -= 1
        if not left:
            consumer.stop()

    await count()
    meter.stop()


async def receive(url: str, number: int, meter: Meter) -> None:
    """By hand, a hundred at once, each acknowledged."""
    queue = _queue()
    async with Producer(queue, url=url) as producer, Consumer(queue, url=url, prefetch=BATCH) as consumer:
        await producer.send_many([PAYLOAD] * number)
        meter.start()
        while number:
            deliveries = await consumer.receive(BATCH, timeout=30)
            await consumer.ack_many(deliveries)
            number -= len(deliveries)
        meter.stop()


async def send_commands(url: str, number: int, meter: Meter) -> None:
    """By a bus, one after the other."""
    async with Producer("bus", url=url), Bus("bus", url=url) as bus:
        meter.start()
        for _ in range(number):
            await bus.send(Place(id=1))
        meter.stop()


async def handle_commands(url: str, number: int, meter: Meter) -> None:
    """By a bus, from a full queue."""
    bus, left, done = Bus("bus", url=url), number, asyncio.Event()

    @bus.handler
    async def place(command: Place) -> None:
        nonlocal left
        if left == number:
            meter.start()
        left -= 1
        if not left:
            done.set()

    await bus.open()
    await bus.consumer.open()
    for _ in range(number):
        await bus.send(Place(id=1))
    await bus.start()
    await done.wait()
    await bus.stop()
    meter.stop()


async def request(url: str, number: int, meter: Meter) -> None:
    """By a bus to another one, which replies; one after the other."""
    service = Bus("bus", url=url)

    @service.handler
    async def place(command: Place) -> dict[str, int]:
        return {"id": command.id}

    async with service, Bus(None, url=url) as client:
        await client.request(Place(id=0), timeout=60)
        meter.start()
        for n in range(number):
            assert await client.request(Place(id=n), timeout=60) == {"id": n}
        meter.stop()


# --- over HTTP ----------------------------------------------------------------------------------------
# What is at the other end is another process, and no library's: it costs nothing here.

BODY = b'{"id":1,"customer":"Ada"}'
REQUEST = (
    b"POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(BODY), BODY)
)
DONE = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def _in_a_process(work: Callable[[], None]) -> Iterator[None]:
    """A copy of this process does the work, and ends with the block."""
    if not (pid := os.fork()):
        sys.setprofile(None)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def post(_: str, number: int, meter: Meter) -> None:
    """To a server that answers at once, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                client, _ = listener.accept()
                seen = b""
                while data := client.recv(65536):
                    seen += data
                    if seen.endswith(b"}"):
                        client.sendall(DONE)
                        seen = b""

        with _in_a_process(answer):
            async with Producer("orders", url=f"http://127.0.0.1:{listener.getsockname()[1]}") as producer:
                meter.start()
                for _n in range(number):
                    await producer.send(PAYLOAD)
                meter.stop()


async def handle_posts(_: str, number: int, meter: Meter) -> None:
    """From a client with one connection, one after the other."""
    consumer, left = Consumer("orders", url="http://127.0.0.1:0"), number

    @consumer()
    async def count(order: dict[str, Any]) -> None:
        nonlocal left
        if left == number:
            meter.start()
        left -= 1
        if not left:
            meter.stop()
            consumer.stop()

    await consumer.open()

    def ask() -> None:
        with socket.create_connection(consumer.address) as server:
            for _ in range(number):
                server.sendall(REQUEST)
                seen = b""
                while not seen.endswith(b"\r\n\r\n"):
                    seen += server.recv(65536)

    with _in_a_process(ask):
        await count()


# --- all of them --------------------------------------------------------------------------------------

#: By protocol and name.
JOURNEYS: dict[str, dict[str, Journey]] = {
    "asyncio": {
        "send": send,
        "send_many": send_many,
        "handle": handle,
        "handle with 8 workers": partial(handle, concurrency=8),
        "send a command": send_commands,
        "handle a command": handle_commands,
        "request": request,
    },
    "sqlite": {"send": send, "send_many": send_many, "receive": receive, "handle": handle},
    "http": {"send": post, "handle": handle_posts},
    "rabbitmq": {"send": send, "send_many": send_many, "handle": handle, "request": request},
    "kafka": {"send": send, "send_many": send_many, "receive": receive, "handle": handle},
}
