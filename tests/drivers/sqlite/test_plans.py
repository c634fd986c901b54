"""What keeps it fast and small with a million messages: the indexes, and the files' sizes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer, schema
from streamtools.drivers.sqlite.rows import Rows, Target
from streamtools.drivers.sqlite.statements import CANDIDATES, LOOK
from streamtools.drivers.sqlite.tables import Tables
from streamtools.message import Message
from tests.drivers.sqlite.conftest import drain
from tests.faults.waiting import wait_until


@pytest.fixture
def watched(path: Path) -> Iterator[tuple[Tables, list[str]]]:
    """The statements on a connection of their own, and a list of all that are run."""
    connection = schema.connect(str(path))
    seen: list[str] = []
    connection.set_trace_callback(seen.append)
    yield Tables(connection), seen
    connection.close()


def plan(tables: Tables, statement: str) -> list[str]:
    return [row[3] for row in tables.run(f"EXPLAIN QUERY PLAN {statement}").fetchall()]


@pytest.mark.parametrize("ordered_by", [None, "queue", "key"])
def test_claims_and_looks_use_the_index(watched: tuple[Tables, list[str]], ordered_by: str | None) -> None:
    tables, _ = watched
    for statement in (CANDIDATES[ordered_by], LOOK[ordered_by]):
        for name, value in {"lane": 1, "claim": 2, "limit": 3}.items():
            statement = statement.replace(f":{name}", str(value))
        steps = plan(tables, statement)
        assert any("SEARCH r USING PRIMARY KEY (lane=?" in step for step in steps), steps
        assert not any(step.startswith(("SCAN r", "SCAN m")) or "B-TREE" in step for step in steps), steps


def test_every_statement_on_a_messages_way_uses_an_index(watched: tuple[Tables, list[str]]) -> None:
    tables, seen = watched
    tables.make_queue("orders")
    lane = tables.join("orders", "", latest=False)
    seen.clear()
    message = Message(body=b"x", queue="orders", id="id")
    tables.insert([Rows(Target("orders", "k", due), ["{}"], [b"x"], [message]) for due in (None, 5.0, 50.0)], 10.0)
    taken = tables.claim(lane, 7, ordered_by=None, limit=10, alone=True, now=20.0)
    assert taken is not None
    tables.claim(lane, 7, ordered_by="key", limit=10, alone=True, now=60.0)
    tables.still_held(7, taken.ids)
    tables.remove(7, taken.ids[:1])
    tables.put_back(7, taken.ids)
    tables.put_back(7)
    # `held` is as small as what is in hand; queues and lanes are few, and read when they have changed.
    big = {"messages", "m", "ready", "r", "later", "l"}
    for statement in {statement for statement in seen if "queues" not in statement}:
        for step in plan(tables, statement):
            assert not (step.startswith("SCAN") and step.split()[1] in big), (step, statement)


async def test_the_files_do_not_grow_while_messages_come_and_go(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        sizes = []
        for _ in range(12):
            await producer.send_many([b"x" * 4000] * 200)
            assert len(await drain(consumer, 200)) == 200
            sizes.append(path.stat().st_size)
        assert max(sizes) < 3 * 200 * 4000
        assert Path(f"{path}-wal").stat().st_size < 2 * schema.CHECKPOINT_PAGES * 4200


async def test_a_log_that_a_reader_kept_from_ending_is_cut_afterwards(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LOG_LIMIT", 1_000_000)
    async with SQLiteProducer("orders", url=url) as producer:
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchall()
        for _ in range(10):
            await producer.send_many([b"x" * 4000] * 100)
        assert Path(f"{path}-wal").stat().st_size > 1_000_000
        reader.close()

        async def is_cut() -> bool:
            await producer.send("x")
            return Path(f"{path}-wal").stat().st_size < 1_000_000

        await wait_until(is_cut)
