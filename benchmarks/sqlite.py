"""SQLite: durable sends, receiving with settlements, what waiting costs, and how fast a message changes hands.

The raw twin does the same work by hand on the `sqlite3` module in one thread without an event loop:
one table, the same transactions, durability and batch sizes; it has no leases, groups, delays or
retries. `python -m benchmarks.sqlite [--million]`; --million adds a queue with a million messages
that are waiting and a million that are delayed.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rounds import Contender, Stopwatch, compare
from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer

MESSAGES = 20_000
BATCH = 500
SINGLES = 4_000
BODY = os.urandom(256)
PREFETCH = 100
ROUNDS = 5
Result = tuple[int, float, float]


class Folder:
    """A new file for each round, on the disk that tests use too."""

    def __init__(self) -> None:
        self.name = Path(tempfile.mkdtemp(prefix="streamtools-bench-"))
        self._number = 0

    def new(self) -> Path:
        self._number += 1
        return self.name / f"{self._number}.db"


FOLDER = Folder()

# --- streamtools ----------------------------------------------------------------------------------------


async def _fill(url: str, number: int, **options: float) -> None:
    async with SQLiteProducer("bench", url=url) as producer:
        for _ in range(number // BATCH):
            await producer.send_many([BODY] * BATCH, **options)


async def _send_many() -> Result:
    async with SQLiteProducer("bench", url=f"sqlite:///{FOLDER.new()}") as producer:
        with Stopwatch() as watch:
            for _ in range(MESSAGES // BATCH):
                await producer.send_many([BODY] * BATCH)
    return MESSAGES, watch.wall, watch.cpu


async def _send_one_by_one(tasks: int) -> Result:
    number = SINGLES if tasks > 1 else SINGLES // 4
    left = iter(range(number))

    async def send() -> None:
        for _ in left:
            await producer.send(BODY)

    async with SQLiteProducer("bench", url=f"sqlite:///{FOLDER.new()}") as producer:
        with Stopwatch() as watch:
            await asyncio.gather(*(send() for _ in range(tasks)))
    return number, watch.wall, watch.cpu


async def _receive(path: Path | None = None) -> Result:
    url = f"sqlite:///{path or FOLDER.new()}"
    if path is None:
        await _fill(url, MESSAGES)
    consumer = SQLiteConsumer("bench", url=url, prefetch=PREFETCH)
    left = MESSAGES

    @consumer()
    async def handle(body: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            consumer.stop()

    with Stopwatch() as watch:
        await handle()
    return MESSAGES, watch.wall, watch.cpu


# --- the raw twin ---------------------------------------------------------------------------------------


def _raw(path: Path, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={synchronous}")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY AUTOINCREMENT, "
        "claimed INTEGER NOT NULL DEFAULT 0, meta TEXT NOT NULL, body BLOB NOT NULL)"
    )
    connection.execute("CREATE INDEX IF NOT EXISTS ready ON messages (id) WHERE claimed = 0")
    return connection


def _raw_send(path: Path, number: int, batch: int) -> Result:
    connection = _raw(path, "FULL")
    insert = "INSERT INTO messages (meta, body) VALUES (?, ?)"
    rows = [('{"id":"0123456789abcdef0123456789abcdef"}', BODY)] * batch
    with Stopwatch() as watch:
        for _ in range(number // batch):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(insert, rows)
            connection.execute("COMMIT")
    connection.close()
    return number, watch.wall, watch.cpu


async def _handle(body: bytes) -> None:
    return


async def _raw_receive() -> Result:
    path = FOLDER.new()
    _raw_send(path, MESSAGES, BATCH)
    connection = _raw(path, "NORMAL")
    claim = (
        "UPDATE messages SET claimed = 1 WHERE id IN "
        f"(SELECT id FROM messages WHERE claimed = 0 ORDER BY id LIMIT {PREFETCH}) RETURNING id, meta, body"
    )
    seen = 0
    with Stopwatch() as watch:
        while rows := connection.execute(claim).fetchall():
            for row in rows:
                await _handle(row[2])
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM messages WHERE id = ?", [(row[0],) for row in rows])
            connection.execute("COMMIT")
            seen += len(rows)
    connection.close()
    return seen, watch.wall, watch.cpu


# --- two processes --------------------------------------------------------------------------------------


def _child(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.sqlite", *map(str, arguments)], stdout=subprocess.PIPE)


async def _sender(url: str, number: str, gap: str) -> None:
    async with SQLiteProducer("bench", url=url) as producer:
        for _ in range(int(number)):
            await asyncio.sleep(float(gap) * random.uniform(0.5, 1.5))
            await producer.send(str(time.time()))


async def _hand_over(number: int, gap: float) -> list[float]:
    """Milliseconds from `send` in one process to the message in hand in another."""
    url = f"sqlite:///{FOLDER.new()}"
    late = []
    async with SQLiteConsumer("bench", url=url) as consumer:
        child = _child("sender", url, number, gap)
        while len(late) < number:
            (delivery,) = await consumer.receive()
            late.append((time.time() - float(delivery.message.body)) * 1e3)
            await delivery.ack()
        await asyncio.to_thread(child.wait)
    return late


async def _idler(url: str, seconds: str) -> None:
    async with SQLiteConsumer("bench", url=url) as consumer:
        waiting = asyncio.create_task(consumer.receive())
        await asyncio.sleep(1)
        with Stopwatch() as watch:
            await asyncio.sleep(float(seconds))
        waiting.cancel()
        print(watch.cpu / watch.wall * 100)


def _idle(seconds: float) -> float:
    """Per cent of one CPU that a process with a waiting consumer takes."""
    child = _child("idler", f"sqlite:///{FOLDER.new()}", seconds)
    out, _ = child.communicate()
    return float(out)


# --- the tables -----------------------------------------------------------------------------------------


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _run(work: Callable[[], object]) -> Callable[[], Result]:
    return lambda: asyncio.run(work())  # type: ignore[arg-type]


def _waiting() -> None:
    idle = [_idle(4) for _ in range(ROUNDS)]
    print("\nWaiting, median (min-max)\n")
    print(f"{'idle consumer, % of a CPU':44} {_spread(idle)}")
    for name, number, gap in (("every 0.1 s", 40, 0.1), ("after 3 s of silence", 6, 3.0)):
        late = asyncio.run(_hand_over(number, gap))
        print(f"{'hand-over between processes, ms, ' + name:44} {_spread(late)}")


def _million() -> None:
    path = FOLDER.new()
    url = f"sqlite:///{path}"
    asyncio.run(_fill(url, 1_000_000))
    asyncio.run(_fill(url, 1_000_000, delay=86_400))
    compare(
        "receive and settle, a million waiting and a million delayed",
        [
            Contender("streamtools, a million waiting", _run(lambda: _receive(path))),
            Contender("streamtools, 20,000 waiting", _run(_receive)),
        ],
        rounds=ROUNDS,
    )


def main() -> None:
    """Print the tables."""
    try:
        compare(
            f"send_many, batches of {BATCH}, 256 B, on the disk",
            [
                Contender("streamtools", _run(_send_many)),
                Contender("sqlite3 by hand", lambda: _raw_send(FOLDER.new(), MESSAGES, BATCH)),
            ],
            rounds=ROUNDS,
        )
        compare(
            "send one by one, each on the disk when it returns",
            [
                Contender("streamtools, 100 tasks", _run(lambda: _send_one_by_one(100))),
                Contender("streamtools, 10 tasks", _run(lambda: _send_one_by_one(10))),
                Contender("streamtools, 1 task", _run(lambda: _send_one_by_one(1))),
                Contender("sqlite3 by hand", lambda: _raw_send(FOLDER.new(), SINGLES // 4, 1)),
            ],
            rounds=ROUNDS,
        )
        compare(
            f"receive and settle, async handler, {PREFETCH} at a time",
            [
                Contender("streamtools", _run(_receive)),
                Contender("sqlite3 by hand", _run(_raw_receive)),
            ],
            rounds=ROUNDS,
        )
        _waiting()
        if "--million" in sys.argv:
            _million()
    finally:
        shutil.rmtree(FOLDER.name, ignore_errors=True)


if __name__ == "__main__":
    CHILDREN = {"sender": _sender, "idler": _idler}
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        asyncio.run(CHILDREN[sys.argv[1]](*sys.argv[2:]))  # type: ignore[operator]
    else:
        main()
