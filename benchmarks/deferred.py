"""Deferred messages: how late they come, and what the process that waits for them uses of a CPU.

Another process defers 10,000 messages of random delays up to 20 s, so the one that is measured only waits and
handles: 500 messages a second that come one by one, to a handler which notes the time. In-process there is no other
process: it defers first, and is measured from then on.

The raw twins do the same by hand: a timer for each message on the event loop; `sqlite3` in one thread, which looks
for what is due as often as ours does; aio-pika, with an acknowledgement for each message, behind the same queue.

    python -m benchmarks.deferred                  # all; a RabbitMQ of its own
    python -m benchmarks.deferred sqlite asyncio   # only these
    STREAMTOOLS_TEST_RABBITMQ_URL=amqp://... python -m benchmarks.deferred
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import resource
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import aio_pika

from streamtools import Bus, Command
from tests.brokers.rabbitmq import RabbitMQNode

MESSAGES = 10_000
#: Seconds of the longest delay.
LONGEST = 20.0
#: Tasks that defer at once.
TASKS = 200
#: Seconds of waiting while nothing is due.
QUIET = 5.0
#: Seconds between looks for what is due, of the twin on `sqlite3`.
LOOK = 0.1
PROTOCOLS = ("asyncio", "sqlite", "rabbitmq")


class Due(Command, to="deferred"):
    """A deferred message: when it is due, in seconds since the epoch, and which run it belongs to."""

    at: float
    run: str


class Late:
    """Seconds that each message of a run came late; done with the last."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.seconds: list[float] = []
        self.done = asyncio.Event()

    def due(self, at: float) -> Due:
        """A message to defer."""
        return Due(at=at, run=self.run)

    def note(self, due: Due) -> None:
        """Count a message, unless it is the first, or another run's."""
        if due.at and due.run == self.run:
            self.seconds.append(time.time() - due.at)
        if len(self.seconds) == MESSAGES:
            self.done.set()


class Usage:
    """Per cent of one CPU that this process takes from now on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._used = resource.getrusage(resource.RUSAGE_SELF)

    def percent(self) -> tuple[float, float]:
        """In its own code, and in the system's on its behalf."""
        used, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - self._began
        user, system = used.ru_utime - self._used.ru_utime, used.ru_stime - self._used.ru_stime
        return user / wall * 100, system / wall * 100


Waiting = Callable[[str, Late], AbstractAsyncContextManager[None]]
Sending = Callable[[str, Late], AbstractAsyncContextManager[Callable[[], Awaitable[None]]]]


def _delay() -> float:
    return random.uniform(0, LONGEST)


# --- streamtools ----------------------------------------------------------------------------------------


@asynccontextmanager
async def wait_by_bus(url: str, late: Late) -> AsyncIterator[None]:
    """A bus that handles them."""
    bus = Bus("deferred", url=url)

    @bus.handler
    async def handle(due: Due) -> None:
        late.note(due)

    async with bus:
        yield


@asynccontextmanager
async def send_by_bus(url: str, late: Late) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A bus that defers them, once what holds them is there."""
    async with Bus(None, url=url) as bus:
        await bus.defer(late.due(0), delay=LONGEST)
        left = iter(range(MESSAGES))

        async def work() -> None:
            for _ in left:
                delay = _delay()
                await bus.defer(late.due(time.time() + delay), delay=delay)
                await asyncio.sleep(0)  # in-process nothing else would let the handler run

        async def send() -> None:
            await asyncio.gather(*(work() for _ in range(TASKS)))

        yield send


# --- by hand --------------------------------------------------------------------------------------------


@asynccontextmanager
async def wait_by_timers(_: str, __: Late) -> AsyncIterator[None]:
    """Nothing but the event loop."""
    yield


@asynccontextmanager
async def send_by_timers(_: str, late: Late) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A timer for each."""

    async def send() -> None:
        loop = asyncio.get_running_loop()
        for _number in range(MESSAGES):
            delay = _delay()
            loop.call_later(delay, late.note, late.due(time.time() + delay))

    yield send


def _connect(url: str) -> sqlite3.Connection:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("CREATE TABLE IF NOT EXISTS later (id INTEGER PRIMARY KEY, due REAL, body BLOB)")
    connection.execute("CREATE INDEX IF NOT EXISTS due ON later (due)")
    return connection


@asynccontextmanager
async def wait_by_sqlite(url: str, late: Late) -> AsyncIterator[None]:
    """One connection, no leases: read what is due, handle it, delete it."""
    connection = _connect(url)

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK)
            now = time.time()
            due = connection.execute("SELECT id, body FROM later WHERE due <= ?", (now,)).fetchall()
            for _, body in due:
                late.note(Due.model_validate_json(body))
            if due:
                ids = json.dumps([number for number, _ in due])
                connection.execute("DELETE FROM later WHERE id IN (SELECT value FROM json_each(?))", (ids,))

    looking = asyncio.create_task(look())
    yield
    looking.cancel()
    connection.close()


@asynccontextmanager
async def send_by_sqlite(url: str, late: Late) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """All in one transaction."""
    connection = _connect(url)

    async def send() -> None:
        now = time.time()
        due = [now + _delay() for _ in range(MESSAGES)]
        rows = [(at, late.due(at).model_dump_json().encode()) for at in due]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO later (due, body) VALUES (?, ?)", rows)
        connection.execute("COMMIT")

    yield send
    connection.close()


@asynccontextmanager
async def wait_by_aio_pika(url: str, late: Late) -> AsyncIterator[None]:
    """Consume the queue, and acknowledge each message."""
    bus = Bus("deferred", url=url)
    await bus.declare()  # the same queue
    await bus.stop()
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    await channel.set_qos(100)
    queue = await channel.get_queue("deferred")

    async def handle(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        late.note(Due.model_validate_json(message.body))
        await message.ack()

    await queue.consume(handle)
    yield
    await connection.close()


CONTENDERS: dict[str, dict[str, tuple[Waiting, Sending]]] = {
    "asyncio": {
        "streamtools": (wait_by_bus, send_by_bus),
        "a timer for each": (wait_by_timers, send_by_timers),
    },
    "sqlite": {
        "streamtools": (wait_by_bus, send_by_bus),
        "sqlite3 by hand": (wait_by_sqlite, send_by_sqlite),
    },
    "rabbitmq": {
        "streamtools": (wait_by_bus, send_by_bus),
        "aio-pika by hand": (wait_by_aio_pika, send_by_bus),
    },
}


# --- one process waits, another defers -----------------------------------------------------------------


async def _told(what: str) -> None:
    """Say where we are, and wait until it is to go on."""
    print(what, flush=True)
    await asyncio.to_thread(sys.stdin.readline)


async def _wait(protocol: str, name: str, url: str, run: str) -> None:
    late = Late(run)
    waiting, sending = CONTENDERS[protocol][name]
    async with waiting(url, late):
        usage = Usage()
        await asyncio.sleep(QUIET)
        quiet = sum(usage.percent())
        if protocol == "asyncio":
            async with sending(url, late) as send:
                await send()
        else:
            await _told("ready")
        usage = Usage()
        await late.done.wait()
        percent = usage.percent()
    print(json.dumps({"late": late.seconds, "percent": percent, "quiet": quiet}))


async def _send(protocol: str, name: str, url: str, run: str) -> None:
    async with CONTENDERS[protocol][name][1](url, Late(run)) as send:
        await _told("ready")
        await send()


def _start(*arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "benchmarks.deferred", *arguments]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def _ready(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        raise SystemExit("A process of the benchmark ended by itself; see above.")


def measure(protocol: str, name: str, url: str) -> dict[str, Any]:
    """One contender: milliseconds late, sorted, and per cent of a CPU."""
    run = secrets.token_hex(4)  # a broker may hold another run's
    waiter = _start("wait", protocol, name, url, run)
    if protocol != "asyncio":
        _ready(waiter)
        sender = _start("send", protocol, name, url, run)
        _ready(sender)
        _tell(waiter)
        _tell(sender)
        sender.communicate()
    out, _ = waiter.communicate()
    if waiter.returncode:
        raise SystemExit(f"{name} on {protocol} failed; see above.")
    found: dict[str, Any] = json.loads(out)
    found["late"] = sorted(seconds * 1e3 for seconds in found["late"])
    return found


# --- the table ------------------------------------------------------------------------------------------


def _row(protocol: str, name: str, found: dict[str, Any]) -> str:
    late = found["late"]
    cuts = " ".join(f"{late[int(len(late) * part)]:>8.1f}" for part in (0.5, 0.9, 0.99))
    early = sum(1 for milliseconds in late if milliseconds < 0)
    user, system = found["percent"]
    return (
        f"{f'{protocol}, {name}':28} {cuts} {late[-1]:>8.1f} {early:>6} "
        f"{user:>7.1f} {system:>7.1f} {user + system:>7.1f} {found['quiet']:>7.1f}"
    )


def _table(protocols: list[str], rabbitmq: str) -> None:
    print(f"{MESSAGES:,} messages of random delays up to {LONGEST:g} s; milliseconds late, per cent of one CPU\n")
    columns = "".join(f"{name:>9}" for name in ("p50", "p90", "p99", "max"))
    print(
        f"{'':28}{columns} {'early':>6}" + "".join(f"{n:>8}" for n in ("user", "system", "CPU", "quiet")), flush=True
    )
    for protocol in protocols:
        for name in CONTENDERS[protocol]:
            folder = tempfile.mkdtemp(prefix="streamtools-bench-")
            urls = {
                "asyncio": f"asyncio://bench?maxsize={3 * MESSAGES}",
                "sqlite": f"sqlite:///{folder}/{len(name)}.db",
                "rabbitmq": rabbitmq,
            }
            try:
                print(_row(protocol, name, measure(protocol, name, urls[protocol])), flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    print("\nCPU: user + system, of the process that waits; quiet: while nothing is due.")


def main(protocols: list[str]) -> None:
    """Print the table."""
    protocols = protocols or [*PROTOCOLS]
    url = os.environ.get("STREAMTOOLS_TEST_RABBITMQ_URL", "")
    if url or "rabbitmq" not in protocols:
        return _table(protocols, url)
    with RabbitMQNode() as node:
        _table(protocols, node.url)


if __name__ == "__main__":
    CHILDREN = {"wait": _wait, "send": _send}
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        logging.disable(logging.WARNING)
        asyncio.run(CHILDREN[sys.argv[1]](*sys.argv[2:]))
    else:
        main(sys.argv[1:])
