"""A file that is deleted, moved, restored or replaced under those who use it, idle or not."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer, database
from streamtools.drivers.sqlite.schema import check_exists
from streamtools.errors import QueueError
from tests.drivers.sqlite.conftest import drain, look
from tests.drivers.sqlite.test_trouble import move_away
from tests.faults.waiting import wait_until


async def make(path: Path, *bodies: str) -> Path:
    """A file with these messages, which nobody uses."""
    url = f"sqlite:///{path}"
    async with SQLiteProducer("orders", url=url) as producer, SQLiteProducer("error", url=url):
        for body in bodies:
            await producer.send(body)
    return path


@asynccontextmanager
async def running(url: str, got: list[bytes], **options: object) -> AsyncIterator[SQLiteConsumer]:
    """A consumer whose loop runs."""
    consumer = SQLiteConsumer("orders", url=url, **options)  # type: ignore[arg-type]

    @consumer()
    async def handle(body: bytes) -> None:
        got.append(body)

    task = asyncio.create_task(handle())
    await wait_until(lambda: consumer.connected)
    try:
        yield consumer
    finally:
        consumer.stop()
        await asyncio.wait_for(task, 20)


def delete(path: Path, backup: Path) -> None:
    """All three of it; another comes into its place."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink()
    os.replace(backup, path)


def delete_the_database_alone(path: Path, backup: Path) -> None:
    path.unlink()
    os.replace(backup, path)


def replace(path: Path, backup: Path) -> None:
    """Its log stays beside the new one, which it does not belong to."""
    os.replace(backup, path)


def move(path: Path, backup: Path) -> None:
    move_away(path)
    os.replace(backup, path)


def move_the_database_alone(path: Path, backup: Path) -> None:
    path.rename(path.with_name("away.db"))
    shutil.copy(backup, path)


@pytest.mark.parametrize("change", [delete, delete_the_database_alone, replace, move, move_the_database_alone])
async def test_an_idle_consumer_notices_that_its_file_is_another(
    change: Callable[[Path, Path], None], url: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="streamtools")
    backup = await make(path.with_name("backup.db"), "from the backup")
    got: list[bytes] = []
    async with running(url, got):
        await make(path, *["old"] * 50)  # so that the log holds pages of the old file
        await wait_until(lambda: look(path, "SELECT count(*) FROM messages") == [(0,)])
        change(path, backup)
        async with asyncio.timeout(10):
            await wait_until(lambda: got == [b"old"] * 50 + [b"from the backup"])
        await make(path, "new")
        await wait_until(lambda: got[-1] == b"new")
    said = [r.getMessage() for r in caplog.records if "moved, deleted or replaced" in r.getMessage()]
    assert len(said) == 1
    assert look(path, "PRAGMA integrity_check") == [("ok",)]


async def test_a_file_that_was_moved_away_alone_has_all_that_was_sent(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send_many(["a", "b"])
        away = path.rename(path.with_name("away.db"))
        await producer.send("c")
    async with SQLiteConsumer("orders", url=f"sqlite:///{away}") as consumer:
        assert await drain(consumer) == [b"a", b"b"]
    async with SQLiteConsumer("orders", url=url) as consumer:
        assert await drain(consumer) == [b"c"]


@pytest.mark.parametrize("declare", [False, "passive"])
async def test_a_consumer_that_makes_no_file_waits_for_it_and_is_not_ready(
    declare: object, url: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await make(path, "a")
    got: list[bytes] = []
    async with running(url, got, declare=declare) as consumer:
        await wait_until(lambda: look(path, "SELECT count(*) FROM messages") == [(0,)])
        move_away(path)
        await wait_until(lambda: not consumer.connected)
        await make(path.with_name("away.db"), "while it was away")
        for suffix in ("", "-wal", "-shm"):
            if (away := Path(f"{path.with_name('away.db')}{suffix}")).exists():
                away.rename(f"{path}{suffix}")
        await wait_until(lambda: got == [b"a", b"while it was away"])
        assert consumer.connected
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


async def test_a_file_that_comes_back_the_moment_after_it_was_missed_is_opened(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(path, "a")
    got: list[bytes] = []

    def missed(where: str, wanted: str) -> None:
        try:
            check_exists(where, wanted)
        except QueueError:
            backup.rename(path)
            raise

    monkeypatch.setattr(database, "check_exists", missed)
    backup = await make(path.with_name("backup.db"), "b")
    async with running(url, got, declare=False):
        await wait_until(lambda: look(path, "SELECT count(*) FROM messages") == [(0,)])
        move_away(path)
        await wait_until(lambda: got == [b"a", b"b"])


async def test_several_consumers_and_a_producer_notice_at_once_and_share_the_new_file(url: str, path: Path) -> None:
    got: list[bytes] = []
    other: list[bytes] = []
    async with (
        running(url, got),
        running(f"{url}?lease=29", other),  # a thread and a connection of its own, as another process has
        SQLiteProducer("orders", url=url) as producer,
    ):
        for number in range(5):
            await producer.send(f"{number}")
            await wait_until(lambda: len(got) + len(other) == number + 1)  # noqa: B023
            await wait_until(lambda: look(path, "SELECT count(*) FROM messages") == [(0,)])
            path.unlink()
            await make(path, f"{number}")
            del (got or other)[-1]
            await wait_until(lambda: len(got) + len(other) == number + 1)  # noqa: B023
    assert look(path, "PRAGMA integrity_check") == [("ok",)]


async def test_an_admin_that_stays_open_looks_at_the_file_that_is_there(url: str, path: Path) -> None:
    await make(path, "a")
    async with SQLiteAdmin(url=url) as admin:
        assert (await admin.stats("orders")).ready == 1
        backup = await make(path.with_name("backup.db"), "b", "c")
        assert (await admin.stats("orders")).ready == 1
        os.replace(backup, path)
        await wait_until_ready(admin, 2)
        path.unlink()
        with pytest.raises(QueueError, match="no file"):
            async with asyncio.timeout(10):
                while True:
                    await admin.stats("orders")


async def wait_until_ready(admin: SQLiteAdmin, number: int) -> None:
    """Ask until it is so many."""
    async with asyncio.timeout(10):
        while (await admin.stats("orders")).ready != number:
            await asyncio.sleep(0)


async def test_a_backup_restored_by_sqlite_itself_is_read_at_once(url: str, path: Path) -> None:
    backup = await make(path.with_name("backup.db"), "restored")
    got: list[bytes] = []
    async with running(url, got):
        with sqlite3.connect(backup) as source, sqlite3.connect(path, timeout=10) as target:
            source.backup(target)
        source.close()
        target.close()
        await wait_until(lambda: got == [b"restored"])
