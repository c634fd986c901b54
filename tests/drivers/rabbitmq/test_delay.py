"""The delay chain: none early, none lost, whatever the target's name and however long."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, cast

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from hypothesis import given
from hypothesis import strategies as st

from streamtools.admin import QueueAdmin
from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.drivers.rabbitmq.topology import delay_chain, delay_levels
from streamtools.errors import SendError
from streamtools.message import Message
from tests.brokers.rabbitmq import RabbitMQNode
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


class TestArithmetic:
    @given(st.integers(1, delay_levels.MOST))
    def test_the_levels_hold_a_message_for_exactly_its_steps(self, number: int) -> None:
        digits = delay_levels.digits(number)

        held = sum(delay_levels.level_time(level) for level, digit in enumerate(digits) if digit == "1")
        assert held == number * 100
        assert digits[-1] == "1"

    @given(st.floats(0.001, delay_levels.MOST * delay_levels.STEP - 1))
    def test_never_too_few_steps_and_at_most_one_too_many(self, seconds: float) -> None:
        assert seconds <= delay_levels.steps(seconds) * delay_levels.STEP <= seconds + 2 * delay_levels.STEP

    @given(st.floats(0.001, 86400), st.sets(st.integers(0, 12)))
    async def test_a_level_that_is_avoided_is_not_on_the_way_and_nothing_is_early(
        self, seconds: float, avoided: set[int]
    ) -> None:
        chain = delay_chain.DelayChain(cast(Connection, None))
        chain._levels = delay_levels.DOUBLING
        for level in avoided:
            chain.leaderless.avoid(delay_levels.level_name(level))

        entry, key = chain.route(seconds, "orders")

        *digits, target = key.split(".")
        ways = {level for level, digit in enumerate(digits) if digit == "1"}
        assert target == "orders" and entry == delay_levels.level_name(max(ways))
        assert not ways & avoided
        assert sum(map(delay_levels.level_time, ways)) >= seconds * 1000
        if not avoided:
            assert chain.route(seconds, "orders")[1] == ".".join(
                (*delay_levels.digits(delay_levels.steps(seconds)), "orders")
            )

    def test_more_than_a_year_is_held_and_more_than_the_most_is_refused(self) -> None:
        assert delay_levels.steps(366 * 86400) <= delay_levels.MOST
        with pytest.raises(Unsendable, match="days"):
            delay_levels.steps(400 * 86400)

    @pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e308, 10**30])
    def test_a_delay_that_is_no_number_of_seconds_is_refused_by_itself(self, seconds: float) -> None:
        with pytest.raises(Unsendable, match="days"):
            delay_levels.steps(seconds)
        assert delay_levels.steps(-float("inf")) == 0

    @given(st.text(min_size=1, max_size=255))
    def test_a_target_is_one_word_without_wildcards(self, name: str) -> None:
        assert not set(delay_levels.word(name)) & set(".*#")

    def test_times_to_live_fit_the_brokers_32_bits(self) -> None:
        assert delay_levels.level_time(delay_levels.DOUBLING + delay_levels.LAPS) < 1 << 32


async def test_none_is_early_and_none_is_lost(producer: Any, consumer: Any) -> None:
    sender = await producer()
    now = time.time()
    rng = random.Random(1)
    dues = {str(n): now + 0.5 + rng.uniform(0, 4) for n in range(500)}
    await sender.send_messages([Message(body=b"", queue="orders", id=i, deliver_at=due) for i, due in dues.items()])

    receiver = await consumer(prefetch=1000)
    late = []
    while len(late) < 500:
        for delivery in await receiver.receive(100, timeout=10):
            late.append(time.time() - dues[delivery.message.id])
            assert delivery.redeliveries == 0
            assert delivery.message.error is None
            assert delivery.message.headers == {}

    late.sort()
    assert late[0] >= 0
    assert late[250] < 1


@pytest.mark.parametrize("name", ["a.b", "b", "a.#", "#", "x" * 255, "a b", "+@,/:"])
async def test_any_queue_name_can_be_a_target(producer: Any, consumer: Any, url: str, name: str) -> None:
    other = await producer("c.b")
    sender = await producer(name)

    await sender.send(b"x", delay=0.15)

    assert await take(await consumer(name), 1)
    async with QueueAdmin(url=url) as admin:
        assert (await admin.stats("c.b")).ready == 0
    assert other.queue == "c.b"


async def test_a_message_goes_through_the_chain_again_and_again(producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send(b"x", delay=0.3)
    receiver = await consumer()
    for attempt in range(1, 6):
        (delivery,) = await take(receiver, 1)
        assert delivery.message.attempt == attempt
        await delivery.retry(0.3)

    (last,) = await take(receiver, 1)
    assert last.message.attempt == 6


async def test_a_missing_target_is_refused_before_anything_is_sent(producer: Any) -> None:
    sender = await producer()
    batch = [Message(body=b"", queue=queue, id=queue, deliver_at=time.time() + 1) for queue in ("orders", "nowhere")]

    with pytest.raises(SendError, match="nowhere") as caught:
        await sender.send_messages(batch)

    assert caught.value.refused == ("nowhere",)


async def test_a_target_that_is_deleted_meanwhile_stalls_nobody(
    producer: Any, consumer: Any, foreign: AbstractChannel, url: str
) -> None:
    gone, sender = await producer("gone"), await producer()
    await gone.send_many([b"x"] * 50, delay=0.5)
    await sender.send(b"kept", delay=0.5)
    await foreign.queue_delete("gone")

    assert (await take(await consumer(), 1))[0].message.body == b"kept"

    async def collected() -> bool:
        async with QueueAdmin(url=url) as admin:
            return (await admin.stats("streamtools.undeliverable")).ready == 50

    await wait_until(collected)


@pytest.mark.parametrize("kind", ["queue", "exchange"])
async def test_a_level_that_is_deleted_meanwhile_is_made_anew_and_nothing_is_lost(
    producer: Any, consumer: Any, foreign: AbstractChannel, kind: str
) -> None:
    sender, receiver = await producer(), await consumer()
    await sender.send(b"makes the levels", delay=0.6)
    (first,) = await take(receiver, 1)
    await first.ack()
    for level in range(len(delay_levels.digits(delay_levels.steps(0.6)))):
        delete = foreign.queue_delete if kind == "queue" else foreign.exchange_delete
        await delete(delay_levels.level_name(level))

    receipts = [await sender.send(b"", delay=0.3), *await sender.send_many([b""] * 20, delay=0.6)]
    for retried in await take(receiver, 21):
        await retried.retry(0.1)

    assert {d.message.id for d in await take(receiver, 21)} == {receipt.id for receipt in receipts}


async def test_what_is_held_above_a_level_that_was_deleted_goes_on_when_it_is_made_anew(
    producer: Any, consumer: Any, foreign: AbstractChannel
) -> None:
    sender, receiver = await producer(), await consumer()
    await sender.send(b"makes the levels", delay=0.6)
    await take(receiver, 1)
    await foreign.queue_delete(delay_levels.level_name(0))

    assert delay_levels.digits(delay_levels.steps(0.4)) == ["1", "0", "1"]
    await sender.send(b"1", delay=0.4)
    assert not await receiver.receive(1, timeout=1)
    sender._publisher._shared.chain._renew_at = 0.0
    await sender.send(b"2", delay=0.4)
    assert {d.message.body for d in await take(receiver, 2)} == {b"1", b"2"}


async def test_a_long_delay_is_held_and_makes_its_levels_once(
    producer: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared: list[str] = []
    declare = aiormq.Channel.queue_declare

    async def noted(channel: aiormq.Channel, queue: str = "", **options: Any) -> Any:
        declared.append(queue)
        return await declare(channel, queue, **options)

    monkeypatch.setattr(aiormq.Channel, "queue_declare", noted)
    sender = await producer()
    await sender.send(b"x", delay=365 * 86400)
    first = len(declared)
    for _ in range(20):
        await sender.send(b"x", delay=365 * 86400)

    assert 20 < first == len(declared), declared
    async with QueueAdmin(url=url) as admin:
        assert (await admin.stats("orders")).ready == 0
        assert (await admin.stats(delay_levels.level_name(delay_levels.DOUBLING + 7))).ready == 21


@pytest.mark.slow
async def test_delayed_messages_survive_kill_9_of_the_broker(own_rabbitmq: RabbitMQNode) -> None:
    due = time.time() + 20
    async with RabbitMQProducer("orders", url=own_rabbitmq.url) as sender:
        await sender.send(b"warm", delay=12.8)  # makes the levels; one younger than a second may be lost
        await asyncio.sleep(2)
        await sender.send_messages(
            [Message(body=b"", queue="orders", id=str(n), deliver_at=due + n / 100) for n in range(300)]
        )
    await asyncio.to_thread(own_rabbitmq.restart, force=True)

    async with RabbitMQConsumer("orders", url=own_rabbitmq.url, prefetch=1000) as receiver:
        seen: dict[str, float] = {}
        async with asyncio.timeout(60):
            while len(seen) < 301:
                for delivery in await receiver.receive(100, timeout=30):
                    seen[delivery.message.id] = time.time()
                    await delivery.ack()

    assert all(moment >= due + int(i) / 100 for i, moment in seen.items() if i.isdigit())


@pytest.mark.slow
async def test_what_a_queue_without_a_leader_refuses_reaches_it_later(own_rabbitmq: RabbitMQNode) -> None:
    """So it is for a moment when a broker starts: it may dead-letter before the target of that is there."""
    server = f"{{'{own_rabbitmq.vhost}_orders', node()}}"
    async with RabbitMQProducer("orders", url=own_rabbitmq.url) as sender:
        await sender.send_messages(
            [Message(body=b"", queue="orders", id=str(n), deliver_at=time.time() + 4) for n in range(40)]
        )
    await asyncio.to_thread(own_rabbitmq.ctl, "eval", f"ra:stop_server(quorum_queues, {server}).")
    await asyncio.sleep(10)  # the broker asks for a leader for 5 s before it takes that for a refusal
    await asyncio.to_thread(own_rabbitmq.ctl, "eval", f"ra:restart_server(quorum_queues, {server}).")

    async with RabbitMQConsumer("orders", url=own_rabbitmq.url, prefetch=1000) as receiver:
        seen: set[str] = set()
        async with asyncio.timeout(60):
            while len(seen) < 40:
                for delivery in await receiver.receive(100, timeout=60):
                    seen.add(delivery.message.id)
                    await delivery.ack()
