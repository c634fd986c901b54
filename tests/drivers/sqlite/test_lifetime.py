"""Opening, closing, cancelling: nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import weakref
from pathlib import Path

import pytest

from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer
from streamtools.errors import Closed
from tests.drivers.sqlite.conftest import drain, look, take
from tests.faults.waiting import wait_until


def database_threads() -> set[threading.Thread]:
    """Those at work now; one of an earlier test may still be about to end."""
    return {thread for thread in threading.enumerate() if thread.name == "streamtools-sqlite"}


async def until_waiting(consumer: SQLiteConsumer) -> None:
    await wait_until(lambda: bool(consumer._session and consumer._session._pending))


async def test_one_thread_serves_a_file_and_ends_with_its_last_user(url: str) -> None:
    before = database_threads()
    async with SQLiteProducer("orders", url=url), SQLiteConsumer("orders", url=url):
        assert len(database_threads() - before) == 1
        async with SQLiteAdmin(url=url):
            assert len(database_threads() - before) == 2, "an operator's questions hold no one up"
    await wait_until(lambda: database_threads() <= before)


async def test_closing_twice_and_opening_again_work(url: str) -> None:
    producer = SQLiteProducer("orders", url=url)
    consumer = SQLiteConsumer("orders", url=url)
    for number in range(3):
        await producer.open()
        await producer.open()
        await consumer.open()
        await producer.send(number)
        assert await drain(consumer) == [str(number).encode()]
        await asyncio.gather(producer.close(), consumer.close(), producer.close(), consumer.close())
        await consumer.close()


async def test_close_ends_a_receive_that_waits(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        consumer = await SQLiteConsumer("orders", url=url).open()
        waiting = asyncio.create_task(consumer.receive())
        await until_waiting(consumer)
        await consumer.close()
        async with asyncio.timeout(10):
            with pytest.raises(Closed):
                await waiting
        await producer.send("a")
        async with SQLiteConsumer("orders", url=url) as other:
            assert await drain(other) == [b"a"]


async def test_close_ends_a_send_that_waits_for_the_file(url: str, path: Path) -> None:
    producer = await SQLiteProducer("orders", url=url).open()
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    sending = asyncio.create_task(producer.send("a"))
    await wait_until(lambda: bool(producer._session and producer._session._pending))
    async with asyncio.timeout(10):
        await producer.close()
        with pytest.raises(Closed):
            await sending
    lock.close()


async def test_close_does_not_wait_for_ever_for_a_locked_file(url: str, path: Path) -> None:
    consumer = await SQLiteConsumer("orders", url=url).open()
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    async with asyncio.timeout(20):
        await consumer.close()
    lock.close()


async def test_a_cancelled_receive_strands_nothing(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        seen: list[bytes] = []
        for number in range(60):
            receiving = asyncio.create_task(consumer.receive(10))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            sending = asyncio.create_task(producer.send(number))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            if number % 3 == 0:
                await sending
            receiving.cancel()
            (got,) = await asyncio.gather(receiving, return_exceptions=True)
            if isinstance(got, list):
                seen += await take(got)
            await sending
        async with asyncio.timeout(20):
            while len(seen) < 60:
                seen += await take(await consumer.receive(100))
        assert sorted(map(int, seen)) == list(range(60))
        assert look(path, "SELECT count(*) FROM messages") == [(0,)]


async def test_a_cancelled_send_arrives_whole_or_not_at_all(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        confirmed = 0
        for number in range(40):
            sending = asyncio.create_task(producer.send_many([number] * 10))
            for _ in range(number % 8):
                await asyncio.sleep(0)
            if number % 4:
                sending.cancel()
            (got,) = await asyncio.gather(sending, return_exceptions=True)
            confirmed += isinstance(got, list)
        bodies = await drain(consumer)
        assert confirmed * 10 <= len(bodies) <= 400
        assert all(bodies.count(body) == 10 for body in set(bodies))


async def test_a_cancelled_open_leaves_no_thread(url: str) -> None:
    before = database_threads()
    for turns in range(12):
        opening = asyncio.create_task(SQLiteProducer("orders", url=url).open())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        (got,) = await asyncio.gather(opening, return_exceptions=True)
        if isinstance(got, SQLiteProducer):
            await got.close()
    await wait_until(lambda: database_threads() <= before)


def test_a_loop_that_ends_without_closing_ends_the_thread(url: str) -> None:
    async def forget() -> None:
        producer = await SQLiteProducer("orders", url=url).open()
        consumer = await SQLiteConsumer("orders", url=url).open()
        await producer.send("a")
        receiving = asyncio.create_task(consumer.receive(timeout=60))
        await producer.send("b")
        receiving.cancel()

    before = database_threads()
    asyncio.run(forget())
    asyncio.run(wait_until(lambda: database_threads() <= before))


def test_a_loop_that_ended_is_not_kept(url: str) -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def forget() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await SQLiteProducer("orders", url=url).open()

    async def is_gone() -> bool:
        gc.collect()
        return loops[0]() is None

    asyncio.run(forget())
    asyncio.run(wait_until(is_gone))
