"""An operator's view: numbers, purge, delete, peek, move."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer
from streamtools.errors import ConfigurationError, ConnectError, QueueError, SendError
from streamtools.message import ErrorDetails, Message
from streamtools.redrive import redrive
from streamtools.testing import eventually
from tests.drivers.sqlite.conftest import drain, look, take


@pytest.fixture
async def admin(url: str) -> AsyncIterator[SQLiteAdmin]:
    async with SQLiteAdmin(url=url) as opened:
        yield opened


async def test_the_numbers_are_those_of_the_queue(url: str, admin: SQLiteAdmin) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(range(5))
        await producer.send("later", delay=60)
        held = await consumer.receive(2)
        info = await admin.stats("orders")
        assert (info.ready, info.delayed, info.in_hand) == (3, 1, 2)
        assert info.oldest is not None
        assert 0 <= info.oldest < 60
        await take(held)
        assert [(q.name, q.ready, q.in_hand) for q in await admin.list()] == [("error", 0, 0), ("orders", 3, 0)]
        await drain(consumer)
        assert (await admin.stats("orders")).oldest is None


async def test_purge_forgets_what_waits_and_leaves_what_is_in_hand(url: str, admin: SQLiteAdmin, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(range(5))
        await producer.send("later", delay=60)
        held = await consumer.receive(2)
        assert await admin.purge("orders") == 4
        assert await admin.purge("orders") == 0
        info = await admin.stats("orders")
        assert (info.ready, info.delayed, info.in_hand) == (0, 0, 2)
        await held[0].retry()
        await held[1].release()
        assert await drain(consumer) == [b"1", b"0"]
        assert look(path, "SELECT count(*) FROM messages") == [(0,)]


async def test_a_large_purge_leaves_what_comes_meanwhile(url: str, admin: SQLiteAdmin) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        for _ in range(24):
            await producer.send_many([b""] * 500)
        purging = asyncio.create_task(admin.purge("orders"))
        late = 0
        while not purging.done():
            await producer.send("late")
            late += 1
        assert await purging >= 12_000
        assert (await admin.stats("orders")).ready + await purging == 12_000 + late


async def test_delete_takes_everything_and_a_consumer_that_waits_makes_the_queue_anew(
    url: str, admin: SQLiteAdmin, path: Path
) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(range(3))
        held = await consumer.receive(1)
        waiting = asyncio.create_task(_two(consumer))
        await asyncio.sleep(0)
        await admin.delete("orders")
        assert look(path, "SELECT count(*) FROM messages") == [(0,)]
        await held[0].ack()

        async def sent() -> None:
            while True:
                try:
                    await producer.send("new")
                    return
                except SendError:
                    continue

        async with asyncio.timeout(20):
            await sent()
            assert (await waiting)[-1] == b"new"


async def _two(consumer: SQLiteConsumer) -> list[bytes]:
    bodies: list[bytes] = []
    while b"new" not in bodies:
        bodies += await take(await consumer.receive(10))
    return bodies


async def test_a_missing_queue_is_an_error(admin: SQLiteAdmin) -> None:
    await admin.create("another")
    for ask in (admin.stats, admin.purge, admin.delete, admin.peek, admin.move):
        with pytest.raises(QueueError, match="no queue 'nowhere'"):
            await ask("nowhere")


async def test_create_is_safe_to_repeat(url: str, admin: SQLiteAdmin) -> None:
    await admin.create("orders")
    await admin.create("orders")
    async with SQLiteProducer("orders", url=url, declare=False) as producer:
        await producer.send("x")
    assert (await admin.stats("orders")).ready == 1


async def test_peek_leaves_the_messages_where_they_are(url: str, admin: SQLiteAdmin) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(range(250))
        assert [int(m.body) for m in await admin.peek("orders", 3)] == [0, 1, 2]
        assert len(await admin.peek("orders", 1000)) == 250
        batch = await consumer.receive(500)
        assert [(int(d.message.body), d.redeliveries) for d in batch] == [(n, 0) for n in range(250)]


async def test_move_takes_failed_messages_back_where_they_came_from(url: str, admin: SQLiteAdmin) -> None:
    async with (
        SQLiteProducer("orders", url=url) as orders,
        SQLiteProducer("payments", url=url) as payments,
        SQLiteConsumer("orders", url=url) as one,
        SQLiteConsumer("payments", url=url) as two,
    ):
        for producer, consumer in ((orders, one), (payments, two)):
            await producer.send_many(["keep", "move"])
            for delivery in await consumer.receive(2):
                await delivery.reject("no")
        assert (
            await admin.move("error", failed_in=["orders", "payments"], where=lambda message: message.body == b"move")
            == 2
        )
        assert await drain(one) == await drain(two) == [b"move"]
        assert (await admin.stats("error")).ready == 2


async def test_an_admin_that_is_closed_says_how_to_open_it(url: str) -> None:
    with pytest.raises(ConnectError, match="async with"):
        await SQLiteAdmin(url=url).list()


async def test_a_redrive_by_code_goes_only_where_it_is_told_to(url: str, admin: SQLiteAdmin) -> None:
    forged = ErrorDetails(queue="payouts", reason="forged")
    own = ErrorDetails(queue="orders", reason="failed")
    batch = [
        Message(body=b"forged", queue="orders.error", id="1", error=forged),
        Message(body=b"own", queue="orders.error", id="2", error=own),
        Message(body=b"ours", queue="orders.error", id="3", error=replace(own, queue="orders-2")),
    ]
    for name in ("orders", "orders-2", "orders.error", "payouts"):
        await admin.create(name)
    async with SQLiteProducer("orders.error", url=url) as producer:
        await producer.send_messages(batch)
    for verb in (redrive, SQLiteAdmin.move):
        with pytest.raises(ConfigurationError, match=r"2 stay .*failed_in=\['payouts'\], and 1 more reasons"):
            await verb(admin, "orders.error")
    assert [m.body for m in await admin.peek("orders")] == [b"own"]
    assert await redrive(admin, "orders.error", failed_in=["orders-2"], limit=1) == 1
    assert [m.body for m in await admin.peek("orders-2")] == [b"ours"]
    assert [m.body for m in await admin.peek("orders.error")] == [b"forged"]
    assert not await admin.peek("payouts")
    for wrong in ("payouts", [""], [5]):
        with pytest.raises(ConfigurationError):
            await redrive(admin, "orders.error", failed_in=wrong)  # type: ignore[arg-type]
    assert await redrive(admin, "orders.error", target="orders") == 1


async def test_a_redrive_goes_on_after_a_lock_that_lasts(
    url: str, admin: SQLiteAdmin, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took a queue that was silent for a second as empty, and reported what it had moved until then."""
    async with SQLiteProducer("failed", url=url) as producer, SQLiteProducer("orders", url=url):
        await producer.send_many(range(5))
    monkeypatch.setattr("streamtools.admin.EMPTY_TIMEOUT", 0.05)
    received: list[int] = []
    receive = SQLiteConsumer.receive

    async def counted(self: SQLiteConsumer, *args: Any, **kwargs: Any) -> Any:
        batch = await receive(self, *args, **kwargs)
        received.append(len(batch))
        return batch

    monkeypatch.setattr(SQLiteConsumer, "receive", counted)
    opened = SQLiteConsumer._open
    locked = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    async def lock_then(self: SQLiteConsumer) -> None:
        await opened(self)
        await asyncio.to_thread(locked.execute, "BEGIN IMMEDIATE")

    monkeypatch.setattr(SQLiteConsumer, "_open", lock_then)
    moving = asyncio.create_task(admin.move("failed", "orders"))
    await eventually(lambda: received == [0])
    await asyncio.to_thread(locked.execute, "ROLLBACK")
    locked.close()
    assert await moving == 5
    assert (await admin.stats("orders")).ready == 5
