"""Several processes on one file, some of which die."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from streamtools.settings import SQLiteSettings
from tests.drivers.sqlite.conftest import drain, look, take

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def process(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process at work; killed at the end unless it has ended."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.drivers.sqlite.process", *map(str, arguments),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        if started.stdout is not None:
            await started.stdout.read()
        await started.wait()


async def lines(source: asyncio.subprocess.Process, number: int | None = None) -> list[str]:
    """The next lines that it says; all until it ends when `number` is None."""
    assert source.stdout is not None
    found: list[str] = []
    while number is None or len(found) < number:
        line = await source.stdout.readline()
        if not line:
            break
        found.append(line.decode().strip())
    return found


async def test_two_processes_share_the_work_and_do_nothing_twice(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        async with process("consume", url, 10, 0.001) as one, process("consume", url, 10, 0.001) as two:
            await producer.send_many(range(1000))
            done: list[list[str]] = [[], []]
            async with asyncio.timeout(60):
                for heard, source in zip(done, (one, two), strict=True):
                    heard += await lines(source, 1)
                await asyncio.gather(
                    *(_collect(source, done, heard) for source, heard in zip((one, two), done, strict=True))
                )
        assert Counter(map(int, done[0] + done[1])) == Counter(range(1000))
        assert all(len(heard) > 10 for heard in done)


async def _collect(source: asyncio.subprocess.Process, done: list[list[str]], heard: list[str]) -> None:
    while sum(map(len, done)) < 1000:
        try:
            async with asyncio.timeout(0.5):
                heard += await lines(source, 1)
        except TimeoutError:
            continue


async def test_a_message_is_handed_over_to_a_process_that_waits(url: str) -> None:
    async with SQLiteConsumer("orders", url=url) as consumer, process("send", url, "hello") as other:
        async with asyncio.timeout(30):
            assert await lines(other, 1) == ["ready"]
            waiting = asyncio.create_task(consumer.receive())
            assert other.stdin is not None
            other.stdin.write(b"go\n")
            assert await take(await waiting) == [b"hello"]


@pytest.mark.parametrize("after", [1, 300, 1500])
async def test_nothing_is_lost_when_a_consumer_is_killed_in_the_middle(path: Path, after: int) -> None:
    url = f"sqlite:///{path}?lease=1"
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send_many(range(2500))
    async with process("consume", url, 100, 0.001) as victim, asyncio.timeout(60):
        handled = await lines(victim, after)
        victim.kill()
        handled += await lines(victim)
    assert len(handled) < 2500
    rest: list[bytes] = []
    async with SQLiteConsumer("orders", url=url) as consumer, asyncio.timeout(60):
        while len({*map(int, handled), *map(int, rest)}) < 2500 or look(path, "SELECT 1 FROM messages LIMIT 1"):
            rest += await take(await consumer.receive(500))
    assert {*map(int, handled), *map(int, rest)} == set(range(2500))
    # Twice at most what it had in hand: its prefetch.
    assert len(handled) + len(rest) <= 2500 + 100
    assert look(path, "PRAGMA integrity_check") == [("ok",)]


async def test_what_a_killed_process_had_in_hand_comes_back_counted(path: Path) -> None:
    url = f"sqlite:///{path}?lease=1"
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(range(20))
        async with process("hold", url, 20) as victim, asyncio.timeout(30):
            assert await lines(victim, 1) == ["20"]
            victim.kill()
        async with asyncio.timeout(30):
            batch = await consumer.receive(100)
        assert [(int(d.message.body), d.redeliveries) for d in batch] == [(n, 1) for n in range(20)]


@pytest.mark.parametrize(("size", "after"), [(1, 30), (50, 700), (500, 3000)])
async def test_whatever_a_killed_producer_had_confirmed_is_there(path: Path, url: str, size: int, after: int) -> None:
    async with process("produce", url, size) as victim, asyncio.timeout(60):
        confirmed = await lines(victim, after)
        victim.kill()
        confirmed += await lines(victim)
    held = [id for (id,) in look(path, "SELECT json_extract(meta, '$.id') FROM messages")]  # noqa: A001
    # A line that the kill cut short is no receipt.
    assert {id for id in confirmed if len(id) == 32} <= set(held)  # noqa: A001
    assert len(held) == len(set(held))
    assert len(held) % size == 0
    assert look(path, "PRAGMA integrity_check") == [("ok",)]
    async with SQLiteConsumer("orders", url=url) as consumer:
        assert len(await drain(consumer)) == len(held)


async def test_a_forked_child_opens_the_file_anew(url: str) -> None:
    async with process("fork", url) as other, asyncio.timeout(30):
        await other.wait()
        assert other.returncode == 0
    async with SQLiteConsumer("orders", url=url) as consumer:
        assert await drain(consumer) == [b"before", b"child", b"after"]


async def test_consumers_of_different_settings_share_a_file(path: Path, url: str) -> None:
    other = SQLiteSettings(path=str(path), lease=5)
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=other) as consumer:
        waiting = asyncio.create_task(consumer.receive())
        await producer.send("a")
        async with asyncio.timeout(10):
            assert await take(await waiting) == [b"a"]
