"""What goes in comes out: whole, in order, once."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from streamtools.delivery import Settlement
from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from streamtools.errors import QueueError, SendError
from streamtools.message import ErrorDetails, Message
from streamtools.verdicts import ACK, Verdict
from tests.drivers.sqlite.conftest import drain, look, take
from tests.faults.waiting import wait_until

EVERYTHING = Message(
    body=bytes(range(256)) + b"\0\xff\xfe",
    queue="orders",
    id="id-\0-ü",
    type="orders.Placed",
    source="shop",
    time=1_700_000_000.123456,
    content_type="application/octet-stream",
    content_encoding="identity",
    correlation_id="c",
    causation_id="d",
    reply_to="answers",
    intent="command",
    key="schlüssel \N{SNOWMAN}",
    headers={"x": "ü\0\n", "": "", "origin": "not ours", "id": "mine"},
    attempt=3,
    expires_at=4_000_000_000.5,
    error=ErrorDetails(
        queue="orders", handler="h", exception="E", reason="r" * 5000, traceback="t\0", attempts=2, first_failed=1.5
    ),
)


async def test_every_field_of_a_message_arrives_as_it_was_sent(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_messages([EVERYTHING])
        (delivery,) = await consumer.receive()
        assert delivery.message == EVERYTHING
        assert delivery.message.body == EVERYTHING.body
        assert delivery.redeliveries == 0


async def test_bodies_of_all_sizes_and_bytes_stay_apart_in_one_batch(url: str) -> None:
    bodies = [b"", b"\0", os.urandom(3), b"", b"\xff" * 70_000, "ü".encode(), os.urandom(4096), b""]
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(bodies)
        batch = await consumer.receive(100)
        assert [d.message.body for d in batch] == bodies
        assert await take(batch) == bodies


@pytest.mark.parametrize("number", [1, 2, 16, 17, 255, 256, 257, 700])
async def test_a_batch_of_any_length_arrives_in_order_and_only_once(url: str, number: int) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        receipts = await producer.send_many(range(number))
        assert len({receipt.id for receipt in receipts}) == number
        assert await drain(consumer, 100) == [str(n).encode() for n in range(number)]
        assert await consumer.receive(timeout=0) == []


async def test_bodies_that_are_too_large_together_are_claimed_in_parts(url: str) -> None:
    bodies = [bytes([n]) * 6_000_000 for n in range(8)]
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(bodies)
        first = await consumer.receive(1, timeout=30)
        second = await consumer.receive(100, timeout=30)
        assert len(second) == 2
        assert await take(first + second) + await drain(consumer) == bodies


async def test_timeout_0_asks_and_is_told_so_that_no_load_hides_a_message(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SQLiteConsumer, "poll_timeout", 0.0)  # the time of a machine that is busy otherwise
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        assert await consumer.receive(timeout=0) == []
        for number in range(20):
            await producer.send(number)
            assert await take(await consumer.receive(timeout=0)) == [str(number).encode()]
        assert await consumer.receive(timeout=0) == []
        await producer.send("later", delay=0.1)
        assert await consumer.receive(timeout=0) == []
        assert await take(await consumer.receive(timeout=10)) == [b"later"]


async def test_messages_outlive_everyone(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("kept")
    async with SQLiteConsumer("orders", url=url) as consumer:
        assert await drain(consumer) == [b"kept"]


async def test_a_waiting_consumer_has_a_message_of_its_own_process_at_once(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        waiting = asyncio.create_task(consumer.receive())
        await wait_until(lambda: bool(consumer._session and consumer._session._pending))
        await producer.send("now")
        async with asyncio.timeout(10):
            assert await take(await waiting) == [b"now"]


async def test_many_tasks_send_at_once_and_all_arrives(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await asyncio.gather(*(producer.send(n) for n in range(500)))
        assert sorted(map(int, await drain(consumer))) == list(range(500))


async def test_a_delayed_message_waits_for_its_time_and_no_longer(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        sent = time.time()
        await producer.send("later", delay=0.4)
        await producer.send("first")
        (first,) = await consumer.receive(10)
        assert first.message.body == b"first"
        async with asyncio.timeout(10):
            (later,) = await consumer.receive(10)
        assert later.message.body == b"later"
        assert time.time() - sent >= 0.4
        assert later.message.deliver_at is not None


async def test_delayed_messages_come_in_the_order_of_their_times(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        for delay in (0.6, 0.2, 0.4):
            await producer.send(str(delay), delay=delay)
        async with asyncio.timeout(10):
            bodies = [(await take(await consumer.receive()))[0] for _ in range(3)]
        assert bodies == [b"0.2", b"0.4", b"0.6"]


async def test_a_retry_goes_behind_and_an_attempt_further(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(["a", "b"])
        (first,) = await consumer.receive()
        await first.retry()
        batch = await consumer.receive(10)
        assert [(d.message.body, d.message.attempt) for d in batch] == [(b"b", 1), (b"a", 2)]


async def test_a_released_message_is_the_first_again_and_not_counted(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send_many(["a", "b"])
        for _ in range(4):
            (first,) = await consumer.receive()
            assert (first.message.body, first.redeliveries) == (b"a", 0)
            await first.release()
        assert await drain(consumer) == [b"a", b"b"]


async def test_a_rejected_message_is_in_the_error_queue_with_its_reason(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send("bad", headers={"x": "y"})
        (delivery,) = await consumer.receive()
        await delivery.reject("why not")
        async with SQLiteConsumer("error", url=url) as errors:
            (failed,) = await errors.receive()
        assert failed.message.error is not None
        assert (failed.message.error.queue, failed.message.error.reason) == ("orders", "why not")
        assert (failed.message.body, failed.message.headers) == (b"bad", {"x": "y"})
        assert await consumer.receive(timeout=0) == []


async def test_settling_twice_does_nothing_even_to_a_later_message(url: str, path: Path) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        await producer.send("one")
        (one,) = await consumer.receive()
        await consumer._settle([Settlement(one, ACK)])
        await producer.send("two")
        (two,) = await consumer.receive()
        copy = one.message.replace(attempt=2)
        await consumer._settle([Settlement(one, ACK), Settlement(one, Verdict.retry(), (copy,))])
        await consumer._settle([Settlement(one, ACK)] * 3)
        await two.release()
        assert await drain(consumer) == [b"two"]
        assert look(path, "SELECT count(*) FROM messages") == [(0,)]


async def test_what_goes_out_with_a_settlement_and_the_settlement_are_one(url: str) -> None:
    async with (
        SQLiteProducer("orders", url=url) as producer,
        SQLiteProducer("shipping", url=url),
        SQLiteConsumer("orders", url=url) as consumer,
        SQLiteConsumer("shipping", url=url) as shipping,
    ):
        await producer.send_many(["a", "b"])
        good, bad = await consumer.receive(2)
        out = good.message.replace(queue="shipping", id="s")
        with pytest.raises(SendError, match="'nowhere'") as caught:
            await consumer._settle(
                [
                    Settlement(good, ACK, (out,)),
                    Settlement(bad, ACK, (out, bad.message.replace(queue="nowhere", id="n"))),
                ]
            )
        assert caught.value.refused == ("n",)
        assert await drain(shipping) == [b"a"], "nothing of the second one went out"
        assert await consumer.receive(timeout=0) == [], "the first is settled, the second still in hand"
        await bad.release()
        assert await drain(consumer) == [b"b"]


async def test_a_queue_that_is_missing_refuses_and_the_rest_is_held(url: str) -> None:
    producer = SQLiteProducer("orders", url=url)
    async with producer, SQLiteConsumer("orders", url=url) as consumer:
        good = Message(body=b"1", queue="orders", id="good")
        with pytest.raises(SendError, match="declare=True") as caught:
            await producer.send_messages([good, good.replace(queue="nowhere", id="bad")])
        assert (caught.value.refused, caught.value.unknown) == (("bad",), ())
        assert await drain(consumer) == [b"1"]


async def test_declare_false_makes_nothing(url: str) -> None:
    async with SQLiteProducer("orders", url=url, declare=False) as producer:
        with pytest.raises(SendError, match="no queue 'orders'.*declare"):
            await producer.send("x")
    with pytest.raises(QueueError, match="no queue 'orders'.*declare=True"):
        await SQLiteConsumer("orders", url=url, declare=False).open()
    with pytest.raises(QueueError, match="declare=True"):
        await SQLiteProducer("orders", url=url, declare="passive").open()


async def test_declare_passive_wants_the_error_queue_too(url: str) -> None:
    async with SQLiteProducer("orders", url=url):
        with pytest.raises(QueueError, match="'error'"):
            await SQLiteConsumer("orders", url=url, declare="passive").open()
        async with SQLiteConsumer("orders", url=url), SQLiteConsumer("orders", url=url, declare="passive"):
            pass


async def test_text_that_has_no_utf8_form_is_refused_and_others_of_its_transaction_are_not(url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer, SQLiteConsumer("orders", url=url) as consumer:
        results = await asyncio.gather(
            producer.send("good", id="1"),
            producer.send_messages([Message(body=b"bad", queue="orders", key="\ud800", id="2")]),
            producer.send("good", id="3"),
            return_exceptions=True,
        )
        assert isinstance(results[1], SendError)
        assert results[1].refused == ("2",)
        assert await drain(consumer) == [b"good", b"good"]
