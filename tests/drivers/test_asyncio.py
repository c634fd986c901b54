"""Queues within this process: places, groups, back-pressure, deletion."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamtools import ADMINS, CONSUMER_LOOPS, PRODUCERS
from streamtools.delivery import Settlement
from streamtools.errors import SendError
from streamtools.testing.waiting import eventually
from streamtools.verdicts import ACK, RELEASE

Producer, Consumer, Admin = PRODUCERS["asyncio"], CONSUMER_LOOPS["asyncio"], ADMINS["asyncio"]


async def test_what_is_released_one_by_one_has_its_places_back() -> None:
    async with Producer("orders") as producer, Consumer("orders") as one, Consumer("orders") as two:
        await producer.send_many(["a", "b", "c", "d", "e", "f"])
        first, second = await one.receive(3), await two.receive(2)
        for delivery in (second[1], first[0], first[2], second[0], first[1]):
            await delivery.release()
        assert [d.message.body for d in await one.receive(10)] == [b"a", b"b", b"c", b"d", b"e", b"f"]


async def test_an_operator_sees_and_moves_the_messages_of_all_groups() -> None:
    async with Producer("orders") as producer, Admin() as admin:
        async with Consumer("orders", group="billing"), Consumer("orders", group="shipping"):
            await producer.send_many(["a", "b"])
            assert [m.body for m in await admin.peek("orders")] == [b"a", b"b", b"a", b"b"]
            await admin.create("elsewhere")
            assert await admin.move("orders", "elsewhere") == 4
            assert (await admin.stats("orders")).ready == 0


async def test_what_an_operator_moves_onto_its_own_queue_stays_with_its_group() -> None:
    async with Producer("orders") as producer, Admin() as admin:
        async with Consumer("orders", group="billing") as billing, Consumer("orders", group="shipping") as shipping:
            await producer.send("a")
            [done], [failed] = await billing.receive(), await shipping.receive()
            await done.ack()
            await failed.retry()
            assert await admin.move("orders") == 1
            assert [d.message.attempt for d in await shipping.receive()] == [1]
            assert await billing.receive(timeout=0) == []


async def test_what_is_given_back_beside_a_copy_that_is_refused_returns_to_its_queue() -> None:
    async with Producer("orders") as producer, Consumer("orders") as consumer:
        await producer.send_many(["a", "b"])
        first, second = await consumer.receive(2)
        lost = first.message.replace(queue="nowhere")
        with pytest.raises(SendError):
            await consumer._settle([Settlement(first, RELEASE), Settlement(second, ACK, (lost,))])
        assert [d.message.body for d in await consumer.receive(2, timeout=5)] == [b"a"]
        assert consumer._queues[0].in_hand == 2


async def test_a_group_that_comes_while_a_send_waits_for_room_breaks_nothing() -> None:
    url = "asyncio://full?maxsize=1"
    async with Producer("orders", url=url) as producer, Consumer("orders", url=url, group="billing") as billing:
        await producer.send("a")
        waiting = asyncio.create_task(producer.send("b"))
        await eventually(lambda: _waits_for_room(billing))
        async with Consumer("orders", url=url, group="shipping") as shipping:
            await (await billing.receive())[0].ack()
            await waiting
            assert [d.message.body for d in await shipping.receive(10)] == [b"b"]
            assert [d.message.body for d in await billing.receive(10)] == [b"b"]


async def test_a_send_that_is_cancelled_while_one_group_is_full_reaches_no_group() -> None:
    url = "asyncio://full?maxsize=1"
    async with Producer("orders", url=url) as producer, Consumer("orders", url=url, group="billing") as billing:
        async with Consumer("orders", url=url, group="shipping") as shipping:
            await producer.send("a")
            await (await billing.receive())[0].ack()
            waiting = asyncio.create_task(producer.send("b"))  # there is room for billing, not for shipping
            await eventually(lambda: _waits_for_room(billing))
            waiting.cancel()
            await asyncio.wait([waiting])
            assert [d.message.body for d in await shipping.receive(10)] == [b"a"]
            assert await shipping.receive(timeout=0) == await billing.receive(timeout=0) == []


async def test_a_consumer_that_waits_makes_a_deleted_queue_anew() -> None:
    async with Producer("orders") as producer, Admin() as admin, Consumer("orders") as consumer:
        waiting = asyncio.create_task(consumer.receive())
        await eventually(lambda: consumer._puller.is_busy)
        await admin.delete("orders")
        await eventually(lambda: "orders" in consumer._broker.topics)  # type: ignore[attr-defined]
        await producer.send("a")
        assert [d.message.body for d in await waiting] == [b"a"]


async def test_a_send_that_waits_for_room_learns_that_the_queue_was_deleted() -> None:
    url = "asyncio://full?maxsize=1"
    async with Producer("orders", url=url) as producer, Admin(url=url) as admin:
        await producer.send("a")
        waiting = asyncio.create_task(producer.send("b", id="b"))
        await eventually(lambda: _waits_for_room(admin))
        await admin.delete("orders")
        with pytest.raises(SendError, match="no queue") as caught:
            await waiting
        assert caught.value.refused == ("b",)


def _waits_for_room(someone: Any) -> bool:
    return any(queue._putters for queue in someone._broker.topic("orders").groups.values())


async def test_a_queue_named_like_the_placeholder_has_its_own_error_queue() -> None:
    async with Producer("a{queue}") as producer, Consumer("a{queue}", error_queue="{queue}.error") as consumer:
        await producer.send("x")
        [delivery] = await consumer.receive()
        await delivery.reject("no good")
        async with Admin() as admin:
            assert [message.body for message in await admin.peek("a{queue}.error")] == [b"x"]
