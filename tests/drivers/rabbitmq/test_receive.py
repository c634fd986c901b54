"""Receiving and settling: what is acknowledged, what goes back, and what foreign senders leave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiormq import spec
from aiormq.abc import AbstractChannel

from streamtools import Retry
from streamtools.admin import QueueAdmin
from streamtools.delivery import Settlement
from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.consuming import isolation
from streamtools.drivers.rabbitmq.consuming.consumer import GATHER_TIMEOUT
from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel
from streamtools.engine.tasks import wake_throttle
from streamtools.errors import ConnectionLost, SendError
from streamtools.message import Message
from streamtools.verdicts import ACK, RELEASE
from tests.brokers.address import RabbitMQAddress
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


async def _depth(url: str, queue: str = "orders") -> int:
    async with QueueAdmin(url=url) as admin:
        return (await admin.stats(queue)).ready


async def test_acknowledged_out_of_order_only_the_unfinished_come_back(producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send_many([str(n) for n in range(20)])
    first = await consumer()
    deliveries = await take(first, 20)

    await asyncio.gather(*(deliveries[n].ack() for n in (3, 0, 1, 19, 7, 2, 8)))
    await deliveries[5].release()
    await first._settle([Settlement(deliveries[n], ACK) for n in (4, 3, 19)])
    await first.close()

    left = await take(await consumer(), 12)
    assert sorted(int(d.message.body) for d in left) == [5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert all(d.redeliveries >= 1 for d in left)


async def test_settling_twice_is_harmless(producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send_many([b"1", b"2"])
    receiver = await consumer()
    one, two = await take(receiver, 2)

    for _ in range(3):
        await receiver._settle([Settlement(one, ACK)])
    await receiver._settle([Settlement(two, ACK)])

    await sender.send(b"3")
    assert (await take(receiver, 1))[0].message.body == b"3"


@pytest.mark.parametrize("ordered_by", [None, "queue"])
async def test_what_is_given_back_at_the_end_comes_again_in_order(
    producer: Any, consumer: Any, ordered_by: str | None
) -> None:
    sender = await producer()
    await sender.send_many([str(n) for n in range(50)])
    receiver = await consumer(prefetch=20, ordered_by=ordered_by)
    (first,) = await take(receiver, 1)
    await first.ack()
    taken = await take(receiver, 3)

    receiver.stop()
    await receiver._stop()
    await receiver._settle([Settlement(d, RELEASE) for d in reversed(taken)])
    await receiver.close()

    again = await take(await consumer(prefetch=100), 49)
    assert [int(d.message.body) for d in again] == list(range(1, 50))


async def test_cancelling_receive_loses_nothing(producer: Any, consumer: Any) -> None:
    sender = await producer()
    receiver = await consumer(prefetch=10)
    seen: list[bytes] = []

    async def send() -> None:
        for n in range(200):
            await sender.send(str(n))

    sending = asyncio.create_task(send())
    while len(seen) < 200:
        for delivery in await receiver.receive(5, timeout=0.003):
            seen.append(delivery.message.body)
            await delivery.ack()
    await sending

    assert seen == [str(n).encode() for n in range(200)]


async def test_no_more_than_the_prefetch_is_taken(producer: Any, consumer: Any, url: str) -> None:
    sender = await producer()
    await sender.send_many([b"x"] * 100)
    receiver = await consumer(prefetch=7)
    await take(receiver, 7)

    async def depth() -> bool:
        # One more than the prefetch until the first is settled: it came before the prefetch was known.
        return await _depth(url) == 92

    await wait_until(depth)
    assert len(await receiver.receive(10, timeout=0.2)) == 1
    assert await receiver.receive(10, timeout=0.2) == []
    assert await depth()


async def test_a_copy_that_is_refused_keeps_its_delivery_in_hand_and_settles_the_others(
    producer: Any, consumer: Any, url: str
) -> None:
    sender = await producer()
    await sender.send_many([b"1", b"2"])
    receiver = await consumer()
    one, two = await take(receiver, 2)
    copy = Message(body=b"c", queue="error", id="good")

    with pytest.raises(SendError) as caught:
        await receiver._settle(
            [
                Settlement(one, ACK, (copy.replace(queue="nowhere", id="bad"),)),
                Settlement(two, ACK, (copy,)),
            ]
        )
    await receiver.close()

    assert caught.value.refused == ("bad",)
    assert await _depth(url, "error") == 1
    assert [d.message.body for d in await take(await consumer(), 1)] == [b"1"]


async def test_a_delivery_of_an_ended_connection_is_not_settled_on_the_next(producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send(b"1")
    receiver = await consumer()
    (old,) = await take(receiver, 1)
    await receiver.close()
    await receiver.open()

    with pytest.raises(ConnectionLost, match="delivers them again"):
        await old.ack()

    (new,) = await take(receiver, 1)
    assert new.redeliveries >= 1
    await new.ack()


async def test_a_foreign_message_without_anything_is_received(foreign: AbstractChannel, consumer: Any) -> None:
    receiver = await consumer()
    properties = spec.Basic.Properties(headers={"n": 1, "nested": {"a": [1, "ü"]}, "odd name \u2603": "x"})
    await foreign.basic_publish(b"\xff\x00", routing_key="orders", properties=properties)

    message = (await take(receiver, 1))[0].message

    assert message.body == b"\xff\x00"
    assert message.headers == {"n": "1", "nested": '{"a": [1, "ü"]}', "odd name \u2603": "x"}
    assert message.content_type is None
    assert message.id


async def test_what_the_broker_dead_lettered_itself_says_where_it_came_from(
    foreign: AbstractChannel, producer: Any, consumer: Any, url: str
) -> None:
    sender = await producer(queue_type="classic")
    await sender.send(b"x", headers={"mine": "1"})
    taken = await foreign.basic_get("orders")
    await foreign.basic_reject(taken.delivery.delivery_tag, requeue=False)

    message = (await take(await consumer("error"), 1))[0].message

    assert message.error is not None
    assert message.error.queue == "orders"
    assert "rejected" in message.error.reason
    assert message.headers == {"mine": "1"}


async def test_counts_rise_with_each_redelivery(producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send(b"x")
    counts = []
    for _ in range(4):
        receiver = await consumer()
        (delivery,) = await take(receiver, 1)
        counts.append(delivery.redeliveries)
        await receiver.close()

    assert counts == [0, 1, 2, 3]


async def test_a_classic_queue_says_at_least_that_it_is_a_redelivery(producer: Any, consumer: Any) -> None:
    sender = await producer(queue_type="classic")
    await sender.send(b"x")
    first = await consumer()
    await take(first, 1)
    await first.close()

    assert (await take(await consumer(), 1))[0].redeliveries == 1


async def test_suspects_are_taken_one_at_a_time_until_an_innocent_comes(producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send_many([b"1", b"2"])
    for _ in range(2):
        receiver = await consumer()
        await take(receiver, 2)
        await receiver.close()
    await sender.send_many([b"3", b"4", b"5"])

    careful = await consumer()
    first = await careful.receive(10, timeout=5)
    nothing_more = await careful.receive(10, timeout=0.3)
    await first[0].ack()
    second = await take(careful, 1)
    await second[0].ack()
    rest = await take(careful, 3)

    assert [d.redeliveries for d in (*first, *second, *rest)] == [2, 2, 0, 0, 0]
    assert nothing_more == []


async def test_who_holds_a_suspect_and_asks_for_more_is_given_more(
    producer: Any, consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "ALONE_TIMEOUT", 0.5)
    sender = await producer()
    await sender.send_many([str(n) for n in range(5)])
    for _ in range(2):
        receiver = await consumer()
        await take(receiver, 5)
        await receiver.close()

    # As a handler does that gathers several before it settles them.
    gathered = await take(await consumer(), 5)

    assert [d.redeliveries for d in gathered] == [2] * 5
    assert sorted(int(d.message.body) for d in gathered) == [0, 1, 2, 3, 4]


async def test_a_suspect_that_is_held_back_lets_others_pass(
    producer: Any, consumer: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "ALONE_TIMEOUT", 0.5)
    sender = await producer(error_arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    await sender.send_many([str(n) for n in range(5)])
    for _ in range(2):
        receiver = await consumer()
        await take(receiver, 5)
        await receiver.close()
    async with RabbitMQProducer("error", url=url) as filler:
        await filler.send_many([b"full"] * 2)
    handled: list[int] = []
    working = RabbitMQConsumer("orders", url=url, retry=Retry(retries=0))

    @working()
    async def handle(message: int) -> None:
        handled.append(message)
        if message == 0:
            raise ValueError("to an error queue that is full")

    running = asyncio.create_task(handle())
    await wait_until(lambda: set(handled) == {0, 1, 2, 3, 4})
    working.stop()
    await running


async def test_closing_while_a_receive_waits_ends_it(consumer: Any) -> None:
    receiver = await consumer()
    waiting = asyncio.create_task(receiver.receive(1, timeout=None))
    await asyncio.sleep(0)

    async with asyncio.timeout(5):
        await receiver.close()
        await asyncio.gather(waiting, return_exceptions=True)

    assert isinstance(waiting.exception(), Exception)


async def test_nothing_is_left_running_after_the_end(producer: Any, consumer: Any) -> None:
    before = asyncio.all_tasks()
    sender, receiver = await producer(), await consumer()
    await sender.send_many([b"x"] * 10, delay=0.1)
    for delivery in await take(receiver, 10):
        await delivery.retry(0.1)

    await sender.close()
    await receiver.close()

    await wait_until(lambda: asyncio.all_tasks() <= before)


@pytest.mark.parametrize("tls", [False, True])
async def test_deferred_messages_that_come_one_by_one_gather_and_others_do_not(
    rabbitmq_vhost: RabbitMQAddress, consumer: Any, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    address = rabbitmq_vhost
    secure = f"{address.tls_url}?cafile={address.ca}&certfile={address.cert}&keyfile={address.key}"
    if tls and address.tls_url is None:
        pytest.skip("STREAMTOOLS_TEST_RABBITMQ_TLS_URL is not set")
    rests: list[float] = []
    rest = ConsumerChannel.rest

    def count(channel: ConsumerChannel, seconds: float) -> None:
        rests.append(seconds)
        rest(channel, seconds)

    monkeypatch.setattr(ConsumerChannel, "rest", count)
    monkeypatch.setattr(wake_throttle, "REST_LIMIT", 0.0)
    receiver = await consumer(url=secure if tls else address.url)

    async def arrive(number: int, **options: Any) -> None:
        async with RabbitMQProducer("orders", url=address.url) as sender:
            await sender.send_many([str(n) for n in range(number)], **options)
        deliveries = await take(receiver, number)
        assert sorted(int(d.message.body) for d in deliveries) == list(range(number))
        await asyncio.gather(*(delivery.ack() for delivery in deliveries))

    await arrive(20)
    assert not rests
    await arrive(20, delay=0.1)
    assert rests
    assert max(rests) <= GATHER_TIMEOUT
    rests.clear()
    await arrive(20)
    assert not rests
