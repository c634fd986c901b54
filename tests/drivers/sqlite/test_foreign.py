"""Rows that other programs wrote: whatever stands in one costs that one alone."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer
from streamtools.drivers.sqlite.rows import Claimed
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.settings import SQLiteSettings
from tests.drivers.sqlite.conftest import look
from tests.drivers.sqlite.test_moved import make
from tests.faults.waiting import wait_until

#: How many messages of the queue can be handled now.
WAITING = (
    "SELECT count(*) FROM ready r JOIN messages m ON m.id = r.id JOIN lanes l ON l.id = r.lane "
    "JOIN queues q ON q.id = l.queue WHERE q.name = 'orders'"
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1e308, 2**62, "\x1e", "],\n[", "\x00", "9999-12-31T23:59:59.9999999Z", "nan", "{}", "[", "é"])
)
NAMES = st.sampled_from(
    ["id", "type", "time", "deliver_at", "expires_at", "attempt", "version", "headers", "error", "key", "key_bytes"]
    + ["origin", "content_type", "content_encoding", "handler", "reply_to", "body", "queue", "exchange", "x"]
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | NAMES, inner, max_size=3),
)
OBJECTS = st.dictionaries(NAMES, JSON_VALUES, max_size=5)
METAS = (
    OBJECTS.map(json.dumps)
    | OBJECTS.map(lambda fields: json.dumps({"id": "odd", **fields}, ensure_ascii=False))
    | JSON_VALUES.map(json.dumps)
    | st.sampled_from(
        ["", "{", "}", "[1", "2]", '{"id":"a"},{"id":"b"}', "{}],\n[{}", '"abc', 'def"', "\x1e", "{}\x1e{}"]
    )
    | st.sampled_from(
        ['{"id":"a","time":Infinity}', '{"id":"a","deliver_at":NaN}', '{"id":"\\ud800"}', "[" * 5000, "9" * 5000]
    )
    | st.binary(max_size=10)
    | SCALARS.filter(lambda value: value is not None)
)
VALUES = SCALARS | st.binary(max_size=20)
BODIES = st.binary(max_size=40) | VALUES.filter(lambda value: value is not None)
ROWS = st.fixed_dictionaries(
    {"key": VALUES, "due": VALUES, "meta": METAS, "body": BODIES, "count": st.just(0) | VALUES, "text": st.booleans()}
)


def write(path: Path, rows: Sequence[dict[str, Any]], where: str = "ready") -> None:
    """As another program may: beside ours, without our ids."""
    connection = sqlite3.connect(path, timeout=20)
    with connection:
        (lane,) = connection.execute(
            "SELECT l.id FROM lanes l JOIN queues q ON q.id = l.queue WHERE q.name = 'orders'"
        ).fetchone()
        for row in rows:
            with suppress(sqlite3.IntegrityError):  # what the tables refuse
                write_one(connection, row, lane, where)
    connection.close()


def write_one(connection: sqlite3.Connection, row: dict[str, Any], lane: int, where: str) -> None:
    text = "CAST(? AS TEXT)" if row["text"] else "?"  # of bytes a text that need not be UTF-8
    (number,) = connection.execute(
        f"INSERT INTO messages (lane, key, due, meta, body) VALUES (?, {text}, ?, {text}, {text}) RETURNING id",
        (lane, row["key"], row["due"], row["meta"], row["body"]),
    ).fetchone()
    if where == "ready":
        connection.execute("INSERT INTO ready VALUES (?, ?, ?, ?)", (lane, number, row["count"], row["key"]))
    elif where == "later":
        connection.execute("INSERT INTO later VALUES (?, ?, ?)", (lane, row["due"], number))
    else:
        connection.execute("INSERT INTO held VALUES (?, ?, ?, ?)", (number, row["count"], lane, row["count"]))


async def handle_all(path: Path, expected: int) -> list[Any]:
    """Handle all that comes, half of the odd ones fail; what was handled of ours, once there is nothing left."""
    consumer = SQLiteConsumer(
        "orders", url=f"sqlite:///{path}", retry=Retry(retries=1, delay=0, jitter=0), prefetch=10
    )
    ours: list[Any] = []

    @consumer()
    async def handle(msg: Message) -> None:
        if msg.source == "ours":
            ours.append(msg.body)
        elif len(msg.body or b"") % 2:
            raise OSError("half of them fail")

    running = asyncio.create_task(handle())
    try:
        await wait_until(lambda: running.done() or len(ours) == expected)
        await wait_until(lambda: running.done() or consumer._loop is not None and consumer._loop.in_hand == 0)
        assert not running.done()
        await wait_until(lambda: running.done() or look(path, WAITING) == [(0,)])
        return ours
    finally:
        consumer.stop(0)
        await running


async def check(path: Path, rows: Sequence[dict[str, Any]], where: str) -> None:
    url = f"sqlite:///{path}"
    async with SQLiteProducer("orders", url=url, client_id="ours") as producer, SQLiteProducer("error", url=url):
        async with SQLiteAdmin(url=url) as admin:
            await producer.send("first")
            write(path, rows[: len(rows) // 2], where)
            await producer.send_many(["second", "third"])
            write(path, rows[len(rows) // 2 :], where)
            later = await producer.send("later", delay=1000)
            # Whoever looks and whoever calls back a message sees what is theirs
            assert {info.name for info in await admin.list()} == {"orders", "error"}
            await admin.peek("orders", 100)
            assert await admin.cancel("orders", later.id)
            assert not await admin.cancel("orders", later.id)
            await producer.send("last")
            assert await handle_all(path, 4) == [b"first", b"second", b"third", b"last"]
            await admin.stats("error")
            for message in await admin.peek("error", 100):
                assert message.error is not None
            await admin.purge("error")
            await admin.purge("orders")


@pytest.mark.parametrize("where", ["ready", "later", "held"])
async def test_rows_of_any_content_cost_themselves_alone(where: str, tmp_path: Path) -> None:
    logger = logging.getLogger("streamtools")
    logger.propagate = False  # thousands of expected lines
    loop = asyncio.get_running_loop()
    number = 0

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(st.lists(ROWS, min_size=1, max_size=8))
    def property_holds(rows: list[dict[str, Any]]) -> None:
        nonlocal number
        number += 1
        path = tmp_path / f"{number}.db"
        asyncio.run_coroutine_threadsafe(check(path, rows, where), loop).result(60)
        path.unlink()

    try:
        await asyncio.to_thread(property_holds)
    finally:
        logger.propagate = True


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ("oops", "cannot be read"),
        ("[1, 2]", "not a JSON object"),
        (b"\x00\x01", "cannot be read"),
        ('{"id":"\\ud800"}', "cannot be read"),
        ('{"id":"a"},{"id":"b"}', "cannot be read"),
    ],
)
async def test_a_row_that_cannot_be_read_goes_to_the_error_queue_with_its_body_and_its_place(
    meta: Any, reason: str, url: str, path: Path
) -> None:
    await make(path, "a")
    write(path, [{"key": None, "due": None, "meta": meta, "body": b"\x00body\xff", "count": 0, "text": False}])
    await make(path, "b")
    got: list[bytes] = []
    consumer = SQLiteConsumer("orders", url=url)

    @consumer()
    async def handle(body: bytes) -> None:
        got.append(body)

    running = asyncio.create_task(handle())
    await wait_until(lambda: got == [b"a", b"b"])
    async with SQLiteAdmin(url=url) as admin:
        await wait_until(lambda: look(path, "SELECT count(*) FROM messages") == [(1,)])
        (failed,) = await admin.peek("error")
    consumer.stop()
    await running
    assert failed.body == b"\x00body\xff"
    assert failed.error is not None and failed.error.queue == "orders"
    assert reason in failed.error.reason and "row 2 of 'orders'" in failed.error.reason


async def test_what_is_malformed_in_a_row_is_left_out_and_the_rest_is_kept(url: str, path: Path) -> None:
    await make(path)
    meta = {"id": "7", "type": 5, "time": 1e300, "attempt": "x", "headers": {"a": "b", "c": 1}, "key": "k", "new": 1}
    write(path, [{"key": 5, "due": "x", "meta": json.dumps(meta), "body": "é\0a", "count": "x", "text": False}])
    async with SQLiteConsumer("orders", url=url) as consumer:
        (delivery,) = await consumer.receive(timeout=0)
        assert delivery.decode_error is None
        assert delivery.message == Message(body="é\0a".encode(), queue="orders", id="7", key="k", headers={"a": "b"})
        await delivery.ack()
    assert look(path, "SELECT count(*) FROM messages") == [(0,)]


@pytest.mark.parametrize("odd", ['{"id":"x","deliver_at":Infinity}', "oops", b"\xff", '{"id": "\xff"}'])
async def test_a_delayed_message_is_called_back_beside_rows_that_are_odd(odd: Any, url: str, path: Path) -> None:
    await make(path)
    row = {"key": None, "due": float("inf"), "meta": odd, "body": b"", "count": 0, "text": True}
    write(path, [row], "later")
    async with SQLiteProducer("orders", url=url) as producer, SQLiteAdmin(url=url) as admin:
        receipt = await producer.send("a", delay=100)
        assert await admin.cancel("orders", receipt.id)
        assert not await admin.cancel("orders", "x y")
        assert (await admin.stats("orders")).ready == 1


@pytest.mark.parametrize("number", [1, 7, 2**40, 2**62, 2**63 - 1])
async def test_ids_that_others_have_taken_do_not_stop_our_sends(number: int, url: str, path: Path) -> None:
    await make(path)
    look(path, f"INSERT INTO messages VALUES ({number}, 1, NULL, NULL, '{{}}', x'00')")
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(["a"] * 10)
        batch = await consumer.receive(20, timeout=0)
        await consumer.ack_many(batch)
        assert [delivery.message.body for delivery in batch] == [b"a"] * 10


@pytest.mark.parametrize("value", ["'abc'", "x'ff'", "1.5e300", "9223372036854775806", "-5", None])
async def test_a_counter_of_ids_that_somebody_has_changed_does_not_stop_our_sends(
    value: str | None, url: str, path: Path
) -> None:
    await make(path)
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send("a")
        look(path, "DELETE FROM sequence" if value is None else f"UPDATE sequence SET last = {value}")
        await producer.send_many(["a"] * 10)
        batch = await consumer.receive(20, timeout=0)
        await consumer.ack_many(batch)
        assert [delivery.message.body for delivery in batch] == [b"a"] * 11


@given(st.lists(METAS.map(lambda meta: meta if isinstance(meta, bytes) else str(meta).encode("utf-8", "replace"))))
def test_no_row_is_read_with_the_meta_of_another(odd: list[bytes]) -> None:
    odd = [meta.replace(b"\x1e", b"") for meta in odd]
    metas = [meta for number, each in enumerate(odd) for meta in (each, b'{"id":"good-%d"}' % number)]
    metas.append(b'{"id":"good-%d"}' % len(odd))
    bodies = [b"%d" % number for number in range(len(metas))]
    taken = Claimed(
        1, 1, [*range(len(metas))], [0] * len(metas), [*map(len, bodies)], b"\x1e".join(metas), b"".join(bodies)
    )
    read = [message for message, _, _ in taken.messages("q")]
    assert [message.body for message in read] == bodies
    assert [message.id for message in read[1::2]] == [f"good-{number}" for number in range(len(odd))]
    assert read[-1].id == f"good-{len(odd)}"


ODD_TIMES = ["1e999", "'soon'", "x'00'", "'9'", "1.76e12", "9e18", "-1e999", "-1e308"]


@pytest.mark.parametrize("due", ODD_TIMES)
async def test_a_delayed_row_whose_time_can_never_come_is_delivered_at_once(due: str, url: str, path: Path) -> None:
    await make(path)
    async with SQLiteConsumer("orders", url=url) as consumer:
        receiving = asyncio.create_task(consumer.receive(timeout=30))
        await asyncio.sleep(0)
        look(path, "INSERT INTO messages VALUES (500, 1, NULL, NULL, '{\"id\":\"x\"}', x'61')")
        look(path, f"INSERT INTO later VALUES (1, {due}, 500)")
        async with SQLiteAdmin(url=url) as admin:
            info = await admin.stats("orders")
            assert (info.ready + info.in_hand, info.delayed) == (1, 0)
        (delivery,) = await receiving
        assert delivery.message.body == b"a"
        await delivery.ack()
    assert [look(path, f"SELECT count(*) FROM {table}") for table in ("messages", "later", "ready")] == [[(0,)]] * 3


@pytest.mark.parametrize("expires", [*ODD_TIMES, None])
async def test_a_row_held_under_a_lease_that_never_ends_comes_back(
    expires: str | None, brief: SQLiteSettings, path: Path
) -> None:
    await make(path)
    async with SQLiteConsumer("orders", url=brief) as consumer:
        for body in (b"a", b"b"):  # what comes later than the first look comes back as well
            receiving = asyncio.create_task(consumer.receive(timeout=30))
            # Its own lease has been looked after by then
            await wait_until(lambda: look(path, "SELECT count(*) FROM claims") == [(0,)])
            if expires is not None:
                look(path, f"INSERT INTO claims VALUES (7, {expires})")
            look(path, f"INSERT INTO messages VALUES (500, 1, NULL, NULL, '{{}}', x'{body.hex()}')")
            look(path, "INSERT INTO held VALUES (500, 7, 1, 'x')")
            (delivery,) = await receiving
            assert delivery.message.body == body
            await delivery.ack()


GHOSTS = ["777777", "-777", "0", "4611686018427387905", "9223372036854775807", "1.5", "'x'", "x'00'"]


@pytest.mark.parametrize("number", GHOSTS)
@pytest.mark.parametrize("ordered_by", [None, "queue", "key"])
async def test_a_row_without_a_message_stops_nothing_and_is_not_counted_for_ever(
    number: str, ordered_by: Any, url: str, path: Path
) -> None:
    await make(path, "a")
    look(path, f"INSERT INTO ready VALUES (1, {number}, 0, NULL)")
    await make(path, "b")
    look(path, f"INSERT INTO later VALUES (1, 5, {number})")
    async with SQLiteConsumer("orders", url=url, ordered_by=ordered_by) as consumer, SQLiteAdmin(url=url) as admin:
        bodies = []
        while len(bodies) < 2:
            batch = await consumer.receive(10, timeout=30)
            bodies += [delivery.message.body for delivery in batch]
            await consumer.ack_many(batch)
        assert sorted(bodies) == [b"a", b"b"]
        assert await consumer.receive(timeout=0) == []
        info = await admin.stats("orders")
        assert (info.ready, info.delayed, info.in_hand) == (0, 0, 0)


@pytest.mark.parametrize("number", GHOSTS)
async def test_purge_takes_rows_that_other_programs_wrote_under_any_id(number: str, url: str, path: Path) -> None:
    await make(path, "a")
    look(path, f"INSERT INTO ready VALUES (1, {number}, 0, NULL)")
    look(path, f"INSERT INTO later VALUES (1, 1e10, {number})")
    for real in (2**62 + 7, 2**63 - 2):
        look(path, f"INSERT INTO messages VALUES ({real}, 1, NULL, NULL, '{{}}', x'61')")
        look(path, f"INSERT INTO ready VALUES (1, {real}, 0, NULL)")
    async with SQLiteAdmin(url=url) as admin:
        assert await admin.purge("orders") == 3
        info = await admin.stats("orders")
        assert (info.ready, info.delayed) == (0, 0)
    assert look(path, "SELECT count(*) FROM messages") == [(0,)]


@pytest.mark.parametrize("ordered_by", [None, "queue", "key"])
async def test_a_row_with_the_greatest_id_is_delivered(ordered_by: Any, url: str, path: Path) -> None:
    await make(path)
    look(path, f"INSERT INTO messages VALUES ({2**63 - 1}, 1, 'k', NULL, '{{}}', x'61')")
    look(path, f"INSERT INTO ready VALUES (1, {2**63 - 1}, 0, 'k')")
    async with SQLiteConsumer("orders", url=url, ordered_by=ordered_by) as consumer:
        (delivery,) = await consumer.receive(timeout=30)
        assert delivery.message.body == b"a"
        await delivery.ack()


@pytest.mark.parametrize("name", ["x'71'", "NULL", "7", "1.5", "CAST(x'ff' AS TEXT)", "''"])
async def test_a_queue_whose_name_nobody_can_use_hides_no_other(name: str, url: str, path: Path) -> None:
    async with SQLiteAdmin(url=url) as admin:
        await admin.create("orders")
        await admin.create("parcels")
        with sqlite3.connect(path) as connection, suppress(sqlite3.IntegrityError):
            connection.execute(f"UPDATE queues SET name = {name} WHERE name = 'parcels'")
        connection.close()

        assert "orders" in [info.name for info in await admin.list()]
