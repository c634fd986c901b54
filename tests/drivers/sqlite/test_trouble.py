"""What is wrong with a file is said once, clearly, with what to do; and nothing is lost by it."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from streamtools import ConsumerFactory, ConsumerRunner, Retry
from streamtools.cli.app import app
from streamtools.delivery import Settlement
from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer, schema
from streamtools.drivers.sqlite.schema import VERSION, NoRoom, explain
from streamtools.drivers.sqlite.tables import Tables
from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost, SendError
from streamtools.settings import SQLiteSettings
from streamtools.verdicts import ACK, Verdict
from tests.drivers.sqlite.conftest import drain, look, take
from tests.faults.waiting import wait_until


async def refused(path: object, text: str) -> None:
    """One permanent error of this text, for whatever way the file is used."""
    url = f"sqlite:///{path}"
    producer, consumer, admin = (
        SQLiteProducer("orders", url=url),
        SQLiteConsumer("orders", url=url),
        SQLiteAdmin(url=url),
    )
    factory = ConsumerFactory(url=url)

    @factory.route("orders")
    async def handle(msg: object) -> None: ...

    ways: list[Callable[[], Awaitable[object]]] = [
        producer.open, lambda: producer.send(1), consumer.open, consumer.receive, admin.open,
        lambda: ConsumerRunner(factory).serve(signals=False),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(ConnectError, match=text) as caught:
            await way()
        assert caught.value.permanent
    for client in (producer, consumer, admin):
        await client.close()
    for command in COMMANDS:
        arguments = [*command, "--url", url]
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert result.exit_code == 1, result.output
        assert command == ["doctor"] or re.search(text, " ".join(result.output.split())), result.output
        assert "Traceback" not in result.output


#: What looks into the file, and what writes.
COMMANDS = [
    ["queues", "list"], ["queues", "stats", "orders"], ["queues", "create", "orders"], ["send", "orders", "x"],
    ["receive", "orders"], ["errors", "list"], ["doctor"],
]  # fmt: skip
DAMAGES = {
    "a table is missing": "DROP TABLE later",
    "a column is missing": "ALTER TABLE messages DROP COLUMN due",
    "a column has another name": "ALTER TABLE claims RENAME COLUMN expires TO until",
    "a column is new": "ALTER TABLE ready ADD COLUMN more",
    "a table is a view": "ALTER TABLE held RENAME TO kept; CREATE VIEW held AS SELECT * FROM kept",
    "the version is gone": "PRAGMA user_version=0",
    "the version is none": "PRAGMA user_version=-1",
}


def change(path: Path, script: str) -> None:
    """As an operator does by hand."""
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        connection.executescript(script)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_file_that_was_changed_by_hand_is_refused_for_good(url: str, path: Path, damage: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("x")
    change(path, DAMAGES[damage])
    await refused(path, r"(is not as streamtools has made it|their version is).* Another program has .* mv ")
    assert look(path, "SELECT count(*) FROM messages") == [(1,)]


@pytest.mark.parametrize("table", ["messages", "ready", "later", "held", "claims", "lanes", "queues", "bindings"])
async def test_a_table_that_goes_away_while_the_file_is_open_ends_who_needs_it(
    url: str, path: Path, table: str
) -> None:
    consumer = SQLiteConsumer("orders", url=url)

    @consumer()
    async def handle(msg: str) -> None: ...

    async with SQLiteProducer("orders", url=url) as producer:
        started = asyncio.Event()
        running = asyncio.create_task(consumer.run(handle, on_started=started.set))
        await started.wait()
        change(path, f"PRAGMA foreign_keys=OFF; DROP TABLE {table}")
        found = []
        async with asyncio.timeout(30):
            while not found and not running.done():
                try:
                    await producer.send("x")
                except ConnectError as error:
                    found.append(error)
                await asyncio.wait({running}, timeout=0.05)
        consumer.stop()
        ended = (await asyncio.gather(running, return_exceptions=True))[0]
        found += [ended] if isinstance(ended, ConnectError) else []
    assert found and all(error.permanent and "is not as streamtools has made it" in str(error) for error in found)


@pytest.mark.parametrize("action", ["RAISE(ABORT, 'no')", "RAISE(IGNORE)"])
async def test_a_trigger_of_others_that_forbids_one_statement_fails_who_makes_it_and_nobody_else(
    url: str, path: Path, action: str
) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        when = "CREATE TRIGGER no BEFORE INSERT ON messages WHEN length(new.body) > 9"
        change(path, f"{when} BEGIN SELECT {action}; END")
        got = await asyncio.gather(*(producer.send(text) for text in ("a", "x" * 10, "b")), return_exceptions=True)
        assert [isinstance(result, ConnectError) for result in got] == [False, True, False]
        assert await drain(consumer) == [b"a", b"b"]


async def test_a_message_that_is_larger_than_sqlite_takes_is_refused_and_its_copy_goes_with_less(url: str) -> None:
    def limit(tables: Tables, arguments: Sequence[Any]) -> list[None]:
        tables.run.__self__.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)  # type: ignore[attr-defined]
        return [None for _ in arguments]

    consumer = SQLiteConsumer("orders", url=url, retry=Retry(retries=0))
    sent: list[str] = []

    @consumer()
    async def handle(msg: str) -> None:
        sent.append(msg)
        async with SQLiteProducer("orders", url=url, outbox=True) as inner:
            await inner.send("x" * 60_000)

    async with SQLiteProducer("orders", url=url) as producer, SQLiteAdmin(url=url) as admin:
        running = asyncio.create_task(handle())
        await wait_until(lambda: consumer._session is not None)
        assert producer._session is not None
        await producer._session.call(limit, None, full=False)
        with pytest.raises(SendError, match="under 1 GB") as caught:
            await producer.send("x" * 60_000, id="large")
        assert caught.value.refused == caught.value.unfit == ("large",)
        await producer.send("small")

        async def rejected() -> bool:
            return (await admin.stats("error")).ready == 1

        await wait_until(rejected)
        consumer.stop()
        await running
    assert sent == ["small"]


async def test_too_many_open_files_pass(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    consumer = SQLiteConsumer("orders", url=url, connect_timeout=0.5)
    assert not await asyncio.to_thread(schema._has_no_file_left)
    os.close(free := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(ConnectionLost, match="too many files open already: ulimit -n"):
            await consumer.open()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await consumer.open()
    assert await drain(consumer) == [b"a"]
    await consumer.close()


async def test_a_missing_directory_is_named_with_the_command_to_make_it(tmp_path: Path) -> None:
    await refused(tmp_path / "no" / "q.db", f"mkdir -p {tmp_path}/no")


async def test_a_directory_is_no_file(tmp_path: Path) -> None:
    await refused(tmp_path, "is a directory")


async def test_a_file_of_something_else_is_not_touched(path: Path) -> None:
    path.write_text("name,price\n" * 1000)
    await refused(path, "not a SQLite file")
    assert path.read_text() == "name,price\n" * 1000


async def test_a_file_of_another_application_is_not_touched(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (name)")
    connection.close()
    await refused(path, "another application")
    assert look(path, "SELECT name FROM sqlite_master") == [("customers",)]


async def test_a_file_of_a_newer_version_is_not_touched(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url):
        pass
    look(path, f"PRAGMA user_version={VERSION + 1}")
    await refused(path, rf"newer streamtools .*version {VERSION + 1}.*pip install \.$")


async def test_a_damaged_file_says_how_to_save_what_is_left(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send_many([os.urandom(3000)] * 300)
    data = bytearray(path.read_bytes())
    data[8192:-4096] = os.urandom(len(data) - 8192 - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(ConnectError, match=r"damaged .*\.recover") as caught:
        async with SQLiteConsumer("orders", url=url) as consumer, asyncio.timeout(10):
            await consumer.receive(1000)
    assert caught.value.permanent


async def test_memory_is_another_protocol(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="asyncio://"):
        await SQLiteProducer("orders", url="sqlite:///:memory:").open()


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that a user without privileges can reach; the test becomes one if it runs as root."""
    uid = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
        os.seteuid(uid)
        directory.chmod(0o755)


def lose_privileges() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


async def test_a_file_without_write_permission_says_so(shared_directory: Path) -> None:
    path = shared_directory / "q.db"
    async with SQLiteProducer("orders", url=f"sqlite:///{path}") as producer:
        await producer.send("a")
    path.chmod(0o444)
    shared_directory.chmod(0o555)
    lose_privileges()
    await refused(path, "permission")


async def test_a_directory_without_write_permission_says_so(shared_directory: Path) -> None:
    shared_directory.chmod(0o555)
    lose_privileges()
    with pytest.raises(ConnectError, match="permission") as caught:
        await SQLiteProducer("orders", url=f"sqlite:///{shared_directory}/new.db").open()
    assert caught.value.permanent


async def test_a_locked_file_is_waited_for(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        sending = asyncio.create_task(producer.send("a"))
        receiving = asyncio.create_task(consumer.receive())
        await wait_until(lambda: bool(producer._session and producer._session._pending))
        assert not sending.done()
        lock.close()
        async with asyncio.timeout(10):
            await sending
            assert await take(await receiving) == [b"a"]


async def test_a_file_that_stays_locked_is_an_error_that_says_where_to_look(path: Path) -> None:
    settings = SQLiteSettings(path=str(path), busy_timeout=0.2)
    async with SQLiteProducer("orders", url=settings, send_timeout=1) as producer:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        with pytest.raises(SendError, match=r"locked for .*fuser -v") as caught:
            await producer.send("a", id="1")
        assert caught.value.unknown == ("1",)
        lock.close()
        await producer.send("b")
        async with SQLiteConsumer("orders", url=settings) as consumer:
            assert await drain(consumer) == [b"b"]


async def test_a_send_timeout_shorter_than_the_busy_timeout_still_says_why(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url, send_timeout=0.5) as producer:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        with pytest.raises(SendError, match="locked for"):
            await producer.send("a")
        lock.close()


@pytest.mark.parametrize("beside", [False, True])
async def test_a_locked_file_is_named_whatever_else_waits_for_it(beside: bool, url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url, send_timeout=4) as producer, SQLiteConsumer("orders", url=url) as c:
        await producer.send("a")
        waiting = asyncio.create_task(c.receive()) if beside else None
        if waiting is not None:
            await take(await waiting)
            waiting = asyncio.create_task(c.receive())
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        if beside:  # its lease is renewed, or its claim begun, and waits for the lock before the send does
            assert producer._session is not None
            worker = producer._session._database.worker
            await wait_until(lambda: worker.locked_since is not None)
        with pytest.raises(SendError, match=r"locked for .*fuser -v"):
            await producer.send("b")
        lock.close()
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})


async def test_a_new_file_that_is_locked_is_an_error_that_says_where_to_look(path: Path) -> None:
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    settings = SQLiteSettings(path=str(path), busy_timeout=0.2)
    with pytest.raises(ConnectError, match=r"locked for .*fuser -v"):
        await SQLiteProducer("orders", url=settings, send_timeout=0.3).open()
    lock.close()


async def test_a_verdict_that_a_locked_file_kept_from_being_written_is_not_handled_again(path: Path) -> None:
    settings = SQLiteSettings(path=str(path), busy_timeout=0.2)
    consumer = SQLiteConsumer("orders", url=settings)
    handled: list[bytes] = []
    lock = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    @consumer()
    async def handle(body: bytes) -> None:
        if not handled:
            await asyncio.to_thread(lock.execute, "BEGIN IMMEDIATE")
        handled.append(body)

    async with SQLiteProducer("orders", url=settings) as producer:
        await producer.send("a")
        running = asyncio.create_task(handle())
        await wait_until(lambda: bool(handled))
        await wait_until(lambda: not consumer._connected)
        lock.close()
        await wait_until(lambda: look(path, "SELECT count(*) FROM messages") == [(0,)])
        consumer.stop()
        await running
    assert handled == [b"a"]


async def set_pages(producer: SQLiteProducer, number: int) -> None:
    """Allow the file that many pages: the disk is full beyond."""

    def limit(tables: Tables, arguments: Sequence[Any]) -> list[None]:
        tables.value(f"PRAGMA max_page_count={number}")
        return [None for _ in arguments]

    assert producer._session is not None
    await producer._session.call(limit, None, full=False)


async def test_a_full_disk_refuses_loses_nothing_and_goes_on_when_there_is_room(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send("small")
        await set_pages(producer, 1)  # as many as there are
        with pytest.raises(SendError, match="no room.*df -h") as caught:
            await producer.send(b"x" * 100_000, id="big")
        assert caught.value.refused == ("big",)
        (small,) = await consumer.receive()
        with pytest.raises(SendError, match="no room"):
            await consumer._settle([Settlement(small, ACK, (small.message.replace(body=b"x" * 100_000),))])
        await small.release()
        await set_pages(producer, 1_000_000)
        await producer.send(b"x" * 100_000)
        assert await drain(consumer) == [b"small", b"x" * 100_000]


async def test_one_send_without_room_does_not_fail_those_beside_it(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(["x" * 3000] * 20)
        await drain(consumer)  # leaves some free pages
        await set_pages(producer, 1)
        got = await asyncio.gather(
            producer.send("a"), producer.send(b"x" * 1_000_000), producer.send("b"), return_exceptions=True
        )
        assert [isinstance(result, SendError) for result in got] == [False, True, False]
        assert await drain(consumer) == [b"a", b"b"]


def move_away(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").rename(path.parent / f"away.db{suffix}")


async def test_everyone_has_an_answer_when_the_file_goes_away_under_them(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(["a", "b"])
        held = await consumer.receive(2)
        move_away(path)
        copy = held[1].message.replace(attempt=2)
        asked = [
            consumer._settle([Settlement(held[0], ACK)]),
            consumer._settle([Settlement(held[1], Verdict.retry(), (copy,))]),
            consumer._receive(10),
            producer.send("c"),
        ]
        async with asyncio.timeout(20):
            got = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, ConnectionLost) for answer in got[:3])
        assert await drain(consumer) == [b"c"], "the producer opened the new file by itself"


async def test_a_file_that_was_moved_away_is_not_written_to_any_more(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send("old")
        (old,) = await consumer.receive()
        move_away(path)
        with pytest.raises(ConnectionLost, match="moved, deleted or replaced"):
            await consumer._settle([Settlement(old, ACK)])
        await producer.send("new")
        assert await drain(consumer) == [b"new"]


FOR_GOOD = ["NOTADB", "CORRUPT", "CORRUPT_VTAB", "READONLY", "READONLY_DIRECTORY", "CANTOPEN", "CANTOPEN_ISDIR"]
FOR_GOOD += ["PERM", "AUTH", "ERROR", "SCHEMA", "CONSTRAINT", "CONSTRAINT_NOTNULL", "MISMATCH"]
PASSING = ["BUSY", "BUSY_RECOVERY", "BUSY_SNAPSHOT", "LOCKED", "FULL", "IOERR", "IOERR_WRITE", "IOERR_FSYNC"]
PASSING += ["IOERR_SHMSIZE", "TOOBIG", "PROTOCOL", "NOMEM", "INTERRUPT", "READONLY_DBMOVED", "READONLY_RECOVERY"]


@pytest.mark.parametrize("name", FOR_GOOD + PASSING)
def test_each_trouble_of_sqlite_passes_or_is_for_good(name: str) -> None:
    error = sqlite3.OperationalError(name)
    error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{name}")
    found = explain(error, "/a/b.db")
    assert isinstance(found, ConnectError) and "/a/b.db" in str(found)
    assert found.permanent is (name in FOR_GOOD)
    assert isinstance(found, NoRoom) is (name in ("FULL", "IOERR_SHMSIZE"))
