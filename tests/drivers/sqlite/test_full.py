"""A queue that has filled its disk can be handled, purged and opened; it takes messages again when there is room."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer
from streamtools.errors import SendError
from streamtools.retry import Retry
from tests.drivers.sqlite.conftest import drain, look
from tests.drivers.sqlite.test_moved import running
from tests.faults.waiting import wait_until


@pytest.fixture(params=[3, 12])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of so many MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:  # noqa: ASYNC221
        pytest.skip("only root mounts a small disk")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def fill(url: str, size: int = 2000, *, to_the_last: bool = True) -> int:
    """Send until it is refused, and then what is smaller; how many were taken."""
    batch = max(1, min(20, 40_000 // size))
    taken = 0
    async with SQLiteProducer("orders", url=url) as producer:
        with pytest.raises(SendError, match="no room.*df -h"):
            while True:
                await producer.send_many([os.urandom(size)] * batch)
                taken += batch
        with pytest.raises(SendError, match="no room"):
            while to_the_last:
                await producer.send(b"x")
                taken += 1
            raise SendError("no room")
    return taken


def fill_the_rest(disk: Path) -> Path:
    """As another program does."""
    path = disk / "log"
    number = os.open(path, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(number, b"x" * 4096)
    os.close(number)
    return path


@pytest.mark.parametrize("size", [50, 2000, 100_000])
async def test_what_fills_the_disk_can_be_handled_one_by_one_by_a_consumer_that_comes_then(
    disk: Path, size: int
) -> None:
    url = f"sqlite:///{disk}/queues.db"
    taken = await fill(url, size)
    got = 0
    async with SQLiteConsumer("orders", url=url) as consumer:
        while batch := await consumer.receive(10, timeout=0):
            for delivery in batch:
                await delivery.ack()
                got += 1
    assert got == taken
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send(os.urandom(size // 2))


async def test_it_can_be_looked_at_and_purged(disk: Path) -> None:
    url = f"sqlite:///{disk}/queues.db"
    taken = await fill(url)
    async with SQLiteAdmin(url=url) as admin:
        assert (await admin.stats("orders")).ready == taken
        assert await admin.purge("orders") == taken
        await admin.delete("orders")


async def test_failures_reach_the_error_queue(disk: Path) -> None:
    url = f"sqlite:///{disk}/queues.db"
    taken = await fill(url, 20_000, to_the_last=False)
    consumer = SQLiteConsumer("orders", url=url, retry=Retry(retries=1, delay=0, jitter=0))
    runs = 0

    @consumer()
    async def handle(body: bytes) -> None:
        nonlocal runs
        runs += 1
        raise TypeError("no")

    task = asyncio.create_task(handle())
    await wait_until(lambda: runs == 2 * taken, timeout=60)
    consumer.stop()
    await task
    async with SQLiteAdmin(url=url) as admin:
        assert (await admin.stats("error")).ready == taken


async def test_another_program_that_takes_the_rest_does_not_stop_an_open_consumer(disk: Path) -> None:
    url = f"sqlite:///{disk}/queues.db"
    got: list[bytes] = []
    async with running(url, [], group="other"), SQLiteConsumer("orders", url=url, group="slow") as consumer:
        taken = await fill(url)
        rest = fill_the_rest(disk)
        while batch := await consumer.receive(10, timeout=0):
            await consumer.ack_many(batch)
            got += [delivery.message.body for delivery in batch]
        assert len(got) == taken
        rest.unlink()
    assert look(disk / "queues.db", "PRAGMA integrity_check") == [("ok",)]


async def test_sends_are_taken_again_when_there_is_room(disk: Path) -> None:
    url = f"sqlite:///{disk}/queues.db"
    rest = fill_the_rest(disk)
    rest.write_bytes(rest.read_bytes()[: -2 * 1024 * 1024])
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        with pytest.raises(SendError, match="no room"):
            await producer.send(b"x" * 2_000_000)
        rest.unlink()
        await producer.send(b"x" * 200_000)
        assert await drain(consumer) == [b"x" * 200_000]
