"""What becomes of messages whose consumer is gone, or only thinks that it has them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from streamtools.delivery import Settlement
from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from streamtools.settings import SQLiteSettings
from streamtools.verdicts import ACK, RELEASE, Verdict
from tests.drivers.sqlite.conftest import drain, look, take
from tests.faults.waiting import wait_until


async def go_silent(consumer: SQLiteConsumer) -> None:
    """As if its process had died: it renews its lease no more, and gives nothing back."""
    consumer._holder.closed = True


async def test_what_a_closed_consumer_had_in_hand_is_there_at_once_and_not_counted(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send_many(["a", "b"])
        async with SQLiteConsumer("orders", url=url) as one:
            assert len(await one.receive(10)) == 2
        async with SQLiteConsumer("orders", url=url) as two:
            batch = await two.receive(10)
            assert [(d.message.body, d.redeliveries) for d in batch] == [(b"a", 0), (b"b", 0)]


async def test_what_a_dead_consumer_had_in_hand_comes_back_counted(brief: SQLiteSettings) -> None:
    async with SQLiteProducer("orders", url=brief) as producer, SQLiteConsumer("orders", url=brief) as dead:
        await producer.send_many(["a", "b"])
        await dead.receive(1)
        await go_silent(dead)
        async with SQLiteConsumer("orders", url=brief) as alive, asyncio.timeout(10):
            (b,) = await alive.receive(10)
            (a,) = await alive.receive(10)
        assert [(a.message.body, a.redeliveries), (b.message.body, b.redeliveries)] == [(b"a", 1), (b"b", 0)]


async def test_a_lease_is_renewed_for_as_long_as_something_is_in_hand(brief: SQLiteSettings, path: Path) -> None:
    async with SQLiteProducer("orders", url=brief) as producer, SQLiteConsumer("orders", url=brief) as one:
        await producer.send("a")
        (delivery,) = await one.receive()
        ((first,),) = look(path, "SELECT expires FROM claims")
        async with SQLiteConsumer("orders", url=brief) as two:
            waiting = asyncio.create_task(two.receive())
            # By three leases further on it would have come back twice.
            await wait_until(lambda: look(path, "SELECT max(expires) FROM claims")[0][0] > first + 1.5)  # type: ignore[operator]
            assert not waiting.done()
            waiting.cancel()
        await delivery.ack()


async def test_an_idle_consumer_holds_no_lease(brief: SQLiteSettings, path: Path) -> None:
    async with SQLiteProducer("orders", url=brief) as producer, SQLiteConsumer("orders", url=brief) as consumer:
        await producer.send("a")
        await take(await consumer.receive())
        waiting = asyncio.create_task(consumer.receive())
        await wait_until(lambda: look(path, "SELECT count(*) FROM claims") == [(0,)])
        await producer.send("b")
        async with asyncio.timeout(10):
            assert await take(await waiting) == [b"b"]


async def test_a_settlement_that_comes_after_the_lease_does_nothing(brief: SQLiteSettings, path: Path) -> None:
    async with SQLiteProducer("orders", url=brief) as producer, SQLiteConsumer("orders", url=brief) as late:
        await producer.send("a")
        (old,) = await late.receive()
        await go_silent(late)
        async with SQLiteConsumer("orders", url=brief) as consumer, asyncio.timeout(10):
            (new,) = await consumer.receive()
            copy = old.message.replace(attempt=2)
            await late._settle(
                [Settlement(old, Verdict.retry(), (copy,)), Settlement(old, ACK), Settlement(old, RELEASE)]
            )
            assert look(path, "SELECT count(*) FROM messages") == [(1,)]
            await new.release()
            assert await drain(consumer) == [b"a"]


async def test_a_consumer_that_lost_its_lease_goes_on_under_a_new_one(brief: SQLiteSettings, path: Path) -> None:
    async with (
        SQLiteProducer("orders", url=brief) as producer,
        SQLiteConsumer("orders", url=brief) as slow,
        SQLiteConsumer("orders", url=brief) as other,
    ):
        await producer.send("a")
        (old,) = await slow.receive()
        await go_silent(slow)
        async with asyncio.timeout(10):
            (again,) = await other.receive()
        await again.release()
        slow._holder.closed = False  # it wakes up
        async with asyncio.timeout(10):
            (new,) = await slow.receive()
        assert new.token.claim != old.token.claim
        await slow._settle([Settlement(old, ACK)])
        assert look(path, "SELECT count(*) FROM messages") == [(1,)]
        await new.ack()
        assert look(path, "SELECT count(*) FROM messages") == [(0,)]


async def test_a_suspect_is_taken_alone_and_nothing_beside_it(brief: SQLiteSettings) -> None:
    async with SQLiteProducer("orders", url=brief) as producer:
        await producer.send_many(["a", "b"])
        for _ in range(2):
            async with asyncio.timeout(10):
                victim = await SQLiteConsumer("orders", url=brief).open()
                while len(await victim.receive(10, timeout=0)) != 2:
                    pass
            await go_silent(victim)
            victim._session = None  # nothing goes back but by the lease
        async with SQLiteConsumer("orders", url=brief) as consumer, asyncio.timeout(10):
            await producer.send_many(["c"])
            (c,) = await consumer.receive(10)
            (a,) = await consumer.receive(10)
            assert [(c.message.body, c.redeliveries), (a.message.body, a.redeliveries)] == [(b"c", 0), (b"a", 2)]
            waiting = asyncio.create_task(consumer.receive(10))
            await a.ack()
            (b,) = await waiting
            assert (b.message.body, b.redeliveries) == (b"b", 2)
            await take([b, c])


async def test_no_message_is_stuck_behind_a_suspect_that_is_kept_for_long(brief: SQLiteSettings) -> None:
    async with SQLiteProducer("orders", url=brief) as producer, SQLiteConsumer("orders", url=brief) as consumer:
        consumer._isolate(1)
        await producer.send("a")
        async with asyncio.timeout(10):
            assert await take(await consumer.receive()) == [b"a"]
