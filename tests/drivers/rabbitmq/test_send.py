"""Sending: what is confirmed is held by its queue, and what cannot be sent is named."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from aiormq.abc import AbstractChannel
from pamqp.commands import Basic

from streamtools import Exchange, Retry
from streamtools.drivers.rabbitmq import RabbitMQConsumer
from streamtools.drivers.rabbitmq.publishing.publisher_channel import WINDOW
from streamtools.errors import Closed, SendError
from streamtools.message import Message
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


async def test_what_was_sent_is_received_in_order_with_all_its_metadata(producer: Any, consumer: Any) -> None:
    sender = await producer(client_id="shop")
    await sender.send({"n": 1}, headers={"größe": "ü" * 50}, type="orders.Placed", key="k", correlation_id="c")
    await sender.send_many([{"n": n} for n in range(2, 400)], ttl=60)

    deliveries = await take(await consumer(prefetch=1000), 399)

    assert [d.message.body for d in deliveries] == [b'{"n":%d}' % n for n in range(1, 400)]
    first = deliveries[0].message
    assert first.headers == {"größe": "ü" * 50}
    assert (first.type, first.key, first.correlation_id, first.source) == ("orders.Placed", "k", "c", "shop")
    assert first.time == pytest.approx(deliveries[1].message.time, abs=5)
    assert deliveries[1].message.expires_at is not None


async def test_another_client_reads_the_body_and_the_native_properties(
    producer: Any, foreign: AbstractChannel
) -> None:
    sender = await producer()
    receipt = await sender.send({"n": 1}, headers={"tenant": "a"}, type="T")

    message = await foreign.basic_get("orders", no_ack=True)

    assert message.body == b'{"n":1}'
    properties = message.header.properties
    assert (properties.message_id, properties.message_type) == (receipt.id, "T")
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    assert properties.headers["tenant"] == "a"


async def test_many_more_than_the_window_are_all_confirmed(producer: Any, consumer: Any) -> None:
    sender = await producer()

    await sender.send_many([b"x"] * (2 * WINDOW + 50))
    await asyncio.gather(*(sender.send(b"y") for _ in range(500)))

    assert len(await take(await consumer(prefetch=10_000), 2 * WINDOW + 550)) == 2 * WINDOW + 550


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 1_000_000])
async def test_bodies_of_any_size_arrive_whole(producer: Any, consumer: Any, size: int) -> None:
    sender = await producer()
    body = bytes(i % 251 for i in range(1000)) * (size // 1000) + b"z" * (size % 1000)

    await sender.send(body)

    assert (await take(await consumer(), 1))[0].message.body == body


async def test_an_unroutable_message_is_refused_by_name_and_the_others_are_held(producer: Any, consumer: Any) -> None:
    sender = await producer()
    batch = [Message(body=b"a", queue=q, id=i) for q, i in [("orders", "1"), ("nowhere", "2"), ("orders", "3")]]

    with pytest.raises(SendError, match="no queue 'nowhere'") as caught:
        await sender.send_messages(batch)

    assert caught.value.refused == ("2",)
    assert [d.message.id for d in await take(await consumer(), 2)] == ["1", "3"]


async def test_a_missing_queue_without_declaring_it_is_refused(producer: Any) -> None:
    sender = await producer("missing", declare=False)

    with pytest.raises(SendError, match="declare=True"):
        await sender.send(b"x")
    with pytest.raises(SendError, match="declare=True"):
        await sender.send(b"x", delay=5)


async def test_what_a_queue_does_not_take_for_a_moment_is_sent_again(producer: Any, consumer: Any) -> None:
    sender = await producer()
    first_channel, said_no = sender._publisher._channel, []
    confirm = first_channel.confirm

    def refuse(tag: int, *, multiple: bool, held: bool) -> None:
        said_no.append(tag)
        confirm(tag, multiple=multiple, held=False)

    first_channel.confirm = refuse
    await sender.send(b"x", id="1")

    assert len(said_no) == 1
    await wait_until(lambda: first_channel.number not in sender._lease.connection._frames._channels)  # it was closed
    await sender.send(b"x", id="1")
    assert {d.message.id for d in await take(await consumer(), 3)} == {"1"}


async def test_a_full_queue_refuses_and_says_so(producer: Any) -> None:
    sender = await producer(arguments={"x-max-length": 1}, send_timeout=3)
    with suppress(SendError):
        await sender.send_many([b"x"] * 500)  # the limit is noticed a moment late
    outcomes = await asyncio.gather(*(sender.send(b"x") for _ in range(20)), return_exceptions=True)
    refusals = [o for o in outcomes if isinstance(o, SendError)]

    assert refusals
    assert "full" in str(refusals[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"headers": {"n" * 256: "v"}},
        {"headers": {"": "v" * 140_000}},
        {"headers": {"x": "\ud800"}},
        {"type": "t" * 140_000},
        {"deliver_at": 4e9},
    ],
    ids=["header name", "header size", "surrogate", "type size", "delay"],
)
async def test_a_message_that_amqp_cannot_carry_is_refused_alone(
    producer: Any, consumer: Any, bad: dict[str, Any]
) -> None:
    sender = await producer()
    batch = [Message(body=b"a", queue="orders", id=i, **(bad if i == "2" else {})) for i in ("1", "2", "3")]

    with pytest.raises(SendError, match="Message 2 cannot be sent") as caught:
        await sender.send_messages(batch)

    assert caught.value.refused == ("2",)
    assert [d.message.id for d in await take(await consumer(), 2)] == ["1", "3"]


async def test_metadata_over_255_bytes_travels_all_the_same(producer: Any, consumer: Any) -> None:
    sender = await producer(client_id="s" * 300)

    await sender.send(b"x", id="i" * 300, type="ü" * 300, correlation_id="c" * 400, reply_to="r" * 256)

    message = (await take(await consumer(), 1))[0].message
    assert (message.id, message.type, message.source) == ("i" * 300, "ü" * 300, "s" * 300)
    assert (message.correlation_id, message.reply_to) == ("c" * 400, "r" * 256)


async def test_an_unroutable_message_with_a_long_id_is_refused_too(producer: Any) -> None:
    sender = await producer()

    with pytest.raises(SendError) as caught:
        await sender.send_messages([Message(body=b"", queue="nowhere", id="i" * 300)])

    assert caught.value.refused == ("i" * 300,)


async def test_a_header_named_like_a_brokers_own_comes_back_as_it_was(producer: Any, consumer: Any) -> None:
    headers = {"CC": "a", "BCC": "b", "x-death": "c", "x-delivery-count": "7"}
    sender = await producer()

    await sender.send(b"x", headers=headers)

    delivery = (await take(await consumer(), 1))[0]
    assert delivery.message.headers == headers
    assert delivery.redeliveries == 0


async def test_a_cancelled_send_leaves_the_producer_usable(producer: Any, consumer: Any) -> None:
    sender = await producer()
    for _ in range(20):
        task = asyncio.create_task(sender.send_many([b"x"] * 5000))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    receipt = await sender.send(b"last")

    assert receipt.queue == "orders"


async def test_closing_twice_and_sending_after_it_raises(producer: Any) -> None:
    sender = await producer()
    await sender.close()
    await sender.close()

    with pytest.raises(Closed):
        await sender.send(b"x")


async def test_a_body_over_the_brokers_limit_is_refused_and_the_others_go_through(
    producer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = await producer()
    sender._limits.learn("406 PRECONDITION_FAILED - message size 20000000 is larger than configured max size 1000")

    with pytest.raises(SendError, match="max_message_size"):
        await sender.send(b"x" * 1001)

    await sender.send(b"x" * 1000)


@pytest.mark.parametrize("wrong", [{"queue": "q" * 300}, {"queue": "nowhere"}, {"exchange": Exchange("inner")}])
async def test_one_of_several_with_the_same_id_is_refused_alone(
    producer: Any, consumer: Any, foreign: AbstractChannel, wrong: dict[str, Any]
) -> None:
    await foreign.exchange_declare("inner", exchange_type="topic", durable=True, internal=True)
    sender = await producer(send_timeout=3)
    batch = [Message(body=b"%d" % n, queue="orders", id="same") for n in range(20)]
    batch[7] = replace(batch[7], **wrong)

    with pytest.raises(SendError) as caught:
        await sender.send_messages(batch)

    assert type(caught.value) is SendError  # its name is shown to users
    assert caught.value.refused == ("same",)
    assert caught.value.unknown == ()
    deliveries = await take(await consumer(), 19)
    assert sorted(int(d.message.body) for d in deliveries) == [n for n in range(20) if n != 7]


async def test_each_of_several_with_the_same_id_that_reach_no_queue_is_refused(producer: Any) -> None:
    sender = await producer(send_timeout=3)
    batch = [Message(body=b"%d" % n, queue="nowhere", id="same") for n in range(20)]
    with pytest.raises(SendError) as caught:
        await sender.send_messages(batch)
    assert caught.value.refused == ("same",) * 20


async def test_what_one_handler_sends_is_refused_alone_though_another_sends_with_the_same_id(
    url: str, foreign: AbstractChannel, consumer: Any, producer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[int] = []
    receiver = RabbitMQConsumer("orders", url=url, retry=Retry(retries=0), concurrency=20)
    others, all_of_them = await consumer("others"), asyncio.Event()
    targets = [await producer(queue, declare=False, outbox=True) for queue in ("others", "nowhere")]

    async def handle(number: int) -> None:
        handled.append(number)
        if len(handled) == 21:
            all_of_them.set()
        if number:  # the first one only has the whole prefetch taken
            await all_of_them.wait()
            await targets[number % 2].send(number, id="same")

    running = asyncio.create_task(receiver()(handle)())
    await wait_until(lambda: receiver.connected)
    for number in range(21):
        properties = Basic.Properties(message_id="same" if number else "first")
        await foreign.basic_publish(b"%d" % number, routing_key="orders", properties=properties)

    assert sorted(int(d.message.body) for d in await take(others, 10)) == list(range(2, 21, 2))
    failed = await take(await consumer("error"), 10)
    assert sorted(int(d.message.body) for d in failed) == list(range(1, 20, 2))
    assert await others.receive(timeout=1) == []
    assert sorted(handled) == list(range(21))
    assert caplog.text.count("rejected message") == 10
    receiver.stop()
    await running
