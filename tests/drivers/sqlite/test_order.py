"""`ordered_by` across consumers: what one has in hand goes before what another may take."""

from __future__ import annotations

import asyncio

from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from tests.drivers.sqlite.conftest import drain, take


async def test_in_order_by_queue_nothing_is_taken_past_what_another_has_in_hand(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteConsumer("orders", url=url, ordered_by="queue") as one,
        SQLiteConsumer("orders", url=url, ordered_by="queue") as two,
    ):
        await producer.send_many(range(4))
        held = await one.receive(2)
        assert await two.receive(10, timeout=0) == []
        waiting = asyncio.create_task(two.receive(10))
        await held[0].ack()
        assert not waiting.done()
        await held[1].ack()
        async with asyncio.timeout(10):
            assert await take(await waiting) == [b"2", b"3"]


async def test_in_order_by_queue_the_next_in_line_has_what_a_closed_one_gave_back(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        async with (
            SQLiteConsumer("orders", url=url, ordered_by="queue") as one,
            SQLiteConsumer("orders", url=url, ordered_by="queue") as two,
        ):
            await producer.send_many(range(4))
            assert len(await one.receive(2)) == 2
            waiting = asyncio.create_task(two.receive(10))
            await one.close()
            async with asyncio.timeout(10):
                assert await take(await waiting) == [b"0", b"1", b"2", b"3"]


async def test_in_order_by_key_keys_in_other_hands_are_left_and_the_others_taken(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteConsumer("orders", url=url, ordered_by="key") as one,
        SQLiteConsumer("orders", url=url, ordered_by="key") as two,
    ):
        for number, key in enumerate(["a", "a", "b", "a", "b", None]):
            await producer.send(number, key=key)
        (first,) = await one.receive(1)
        others = await two.receive(10)
        assert [d.message.body for d in others] == [b"2", b"4", b"5"]
        assert await two.receive(10, timeout=0) == []
        await first.ack()
        async with asyncio.timeout(10):
            assert await take(await two.receive(10)) == [b"1", b"3"]
        await take(others)
        assert await drain(one) == []


async def test_a_consumer_may_take_more_of_the_keys_that_it_has_in_hand(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteConsumer("orders", url=url, ordered_by="key") as one,
    ):
        for number in range(3):
            await producer.send(number, key="a")
        first = await one.receive(1)
        rest = await one.receive(10)
        assert await take(first + rest) == [b"0", b"1", b"2"]
