"""Groups: every group has every message, and its consumers share them."""

from __future__ import annotations

import pytest

from streamtools.admin import ADMINS
from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from tests.drivers.sqlite.conftest import drain, take


async def test_every_group_has_every_message_and_its_consumers_share_them(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteConsumer("orders", url=url, group="billing") as billing,
        SQLiteConsumer("orders", url=url, group="billing") as other,
        SQLiteConsumer("orders", url=url, group="stock") as stock,
        SQLiteConsumer("orders", url=url) as nobody,
    ):
        await producer.send_many(range(10))
        shared = await take(await billing.receive(4)) + await drain(other)
        assert sorted(map(int, shared)) == list(range(10))
        assert [int(body) for body in await drain(stock)] == list(range(10))
        assert [int(body) for body in await drain(nobody)] == list(range(10))


async def test_the_first_group_takes_over_what_waited_and_later_ones_begin_with_what_comes(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("old")
        async with (
            SQLiteConsumer("orders", url=url, group="first") as first,
            SQLiteConsumer("orders", url=url, group="second") as second,
        ):
            await producer.send("new")
            assert await drain(first) == [b"old", b"new"]
            assert await drain(second) == [b"new"]


async def test_a_group_keeps_its_messages_while_none_of_it_is_there(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        async with SQLiteConsumer("orders", url=url, group="a"), SQLiteConsumer("orders", url=url, group="b"):
            pass
        await producer.send("x")
        for group in ("a", "b"):
            async with SQLiteConsumer("orders", url=url, group=group) as consumer:
                assert await drain(consumer) == [b"x"]


async def test_offset_latest_leaves_what_waits_only_the_first_time(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("old")
        async with SQLiteConsumer("orders", url=url, group="g", offset="latest") as consumer:
            assert await consumer.receive(timeout=0) == []
        await producer.send("while away")
        async with SQLiteConsumer("orders", url=url, group="g", offset="latest") as consumer:
            assert await drain(consumer) == [b"while away"]


async def test_consumers_without_a_group_take_over_what_waited_too(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("old")
        async with SQLiteConsumer("orders", url=url) as plain, SQLiteConsumer("orders", url=url, group="g") as group:
            assert await drain(group) == []
            assert await drain(plain) == [b"old"]


async def test_a_retry_goes_back_to_its_own_group_alone(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteConsumer("orders", url=url, group="a") as a,
        SQLiteConsumer("orders", url=url, group="b") as b,
    ):
        await producer.send("x")
        (delivery,) = await a.receive()
        await delivery.retry()
        (again,) = await a.receive()
        assert again.message.attempt == 2
        assert await drain(b) == [b"x"]


async def test_a_redrive_goes_back_to_the_group_that_failed(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteConsumer("orders", url=url, group="a") as a,
        SQLiteConsumer("orders", url=url, group="b") as b,
        ADMINS["sqlite"](url=url) as admin,
    ):
        await producer.send("x")
        (delivery,) = await a.receive()
        await delivery.reject("no")
        assert await drain(b) == [b"x"]
        assert await admin.move("error", failed_in=["orders"]) == 1
        assert await drain(b) == []
        assert await drain(a) == [b"x"]


@pytest.mark.parametrize("group", [None, "g"])
async def test_looking_at_a_queue_makes_no_group_of_it(url: str, group: str | None) -> None:
    async with SQLiteProducer("orders", url=url) as producer, ADMINS["sqlite"](url=url) as admin:
        await producer.send("x")
        assert [message.body for message in await admin.peek("orders")] == [b"x"]
        async with SQLiteConsumer("orders", url=url, group=group) as consumer:
            assert await drain(consumer) == [b"x"]
            await producer.send("y")
            assert (await admin.stats("orders")).ready == 1
