"""What breaks short of the end of the broker: connections, queues, alarms, silence. Nothing confirmed is lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from streamtools import Consumer, Message, Producer, Retry
from streamtools.admin import QueueAdmin
from streamtools.consumer import OrderedBy
from streamtools.drivers.rabbitmq import RabbitMQProducer
from streamtools.drivers.rabbitmq.amqp import connection
from streamtools.drivers.rabbitmq.publishing import publisher_channel
from streamtools.drivers.rabbitmq.rare import forgotten_consumer, unconfirmed
from streamtools.errors import SendError, StreamToolsError
from tests.brokers.address import RabbitMQAddress
from tests.brokers.rabbitmq import RabbitMQNode
from tests.chaos.traffic import Traffic
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until


def ask_soon(monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    """The times of a channel that gets no confirmations, shorter."""
    for name, seconds in {
        "CONFIRM_TIMEOUT": slow,
        "TRIAL_TIMEOUT": 4.0,
        "GRACE_TIMEOUT": 0.2,
        "ASK_INTERVAL": (slow, 10.0),
    }.items():
        monkeypatch.setattr(unconfirmed, name, seconds)


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_connection_that_is_cut_is_made_again(rabbitmq_vhost: RabbitMQAddress, fault: str) -> None:
    host, _, port = rabbitmq_vhost.url.split("@")[1].split("/")[0].partition(":")
    async with Proxy(host, int(port)) as proxy:
        async with Traffic(rabbitmq_vhost.url.replace(f":{port}/", f":{proxy.port}/")) as traffic:
            for _ in range(3):
                await traffic.grows(500)
                await getattr(proxy, fault)()
            await traffic.grows(500)
            await traffic.finish()


async def test_connections_closed_by_the_operator_are_made_again(own_rabbitmq: RabbitMQNode) -> None:
    async with Traffic(own_rabbitmq.url) as traffic:
        await traffic.grows(500)
        await asyncio.to_thread(own_rabbitmq.close_all_connections)
        await traffic.grows(500)
        await traffic.finish()


async def test_a_queue_deleted_under_its_consumer_is_made_again(rabbitmq_vhost: RabbitMQAddress) -> None:
    received: list[bytes] = []
    consumer = Consumer("orders", url=rabbitmq_vhost.url)

    @consumer()
    async def handle(message: bytes) -> None:
        received.append(message)

    running = asyncio.create_task(handle())
    async with Producer("orders", url=rabbitmq_vhost.url) as producer:
        await producer.send(b"1")
        await wait_until(lambda: received == [b"1"])
        rabbitmq_vhost.manage("DELETE", f"queues/{rabbitmq_vhost.url.rpartition('/')[2]}/orders")

        async def send() -> bool:
            try:
                await producer.send(b"2")
            except StreamToolsError:
                return False
            return True

        await wait_until(send)
        await wait_until(lambda: b"2" in received)
    consumer.stop()
    await running


async def test_a_queue_that_gives_no_answer_is_named_and_taken_up_when_it_does(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "CALL_TIMEOUT", 1.0)
    ask_soon(monkeypatch, 1.0)
    handled: list[int] = []
    consumer = Consumer("orders", url=own_rabbitmq.url)

    @consumer()
    async def handle(message: int) -> None:
        handled.append(message)

    async with Producer("orders", url=own_rabbitmq.url, send_timeout=60) as producer:
        await asyncio.to_thread(own_rabbitmq.freeze_queue, "orders")
        sending, running = asyncio.create_task(producer.send(1)), asyncio.create_task(handle())
        try:
            for text, times in (
                ("has not confirmed a message to 'orders'", 2),
                ("the request to consume 'orders'", 1),
            ):
                await wait_until(lambda: [text in r.getMessage() for r in caplog.records].count(True) >= times)  # noqa: B023
        finally:
            await asyncio.to_thread(own_rabbitmq.thaw_queue, "orders")
        await sending
        await wait_until(lambda: set(handled) == {1})  # once more if it was sent again meanwhile
    consumer.stop()
    await running


async def test_a_queue_that_gives_no_answer_holds_up_no_message_to_another(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask_soon(monkeypatch, 1.0)
    monkeypatch.setattr(unconfirmed, "ASK_INTERVAL", (100.0, 100.0))
    url = own_rabbitmq.url
    async with RabbitMQProducer("dead", url=url), RabbitMQProducer("orders", url=url) as producer:
        await producer.send(b"", delay=0.5)  # makes the levels
    async with (
        RabbitMQProducer("orders", url=url, send_timeout=60) as producer,
        Consumer("orders", url=url) as orders,
    ):
        await asyncio.to_thread(own_rabbitmq.freeze_queue, "dead")
        try:
            dead = asyncio.create_task(producer.send_messages([Message(body=b"dead", queue="dead", id="dead")]))
            await asyncio.sleep(0.1)  # its channel stands still now
            await asyncio.gather(
                producer.send(b"at once"), *(producer.send(b"later", delay=d) for d in (0.1, 0.3, 0.5))
            )
            assert not dead.done()
            bodies: list[bytes] = []
            while bodies.count(b"later") < 3 or b"at once" not in bodies:
                for delivery in await orders.receive(10, timeout=20):
                    bodies.append(delivery.message.body)
                    await delivery.ack()
        finally:
            await asyncio.to_thread(own_rabbitmq.thaw_queue, "dead")
        await dead
        async with QueueAdmin(url=url) as admin:
            assert (await admin.stats("dead")).ready <= 2
    said = [record.getMessage() for record in caplog.records if "no leader" in record.getMessage()]
    assert said and all("'dead'" in text for text in said)


async def test_a_way_around_a_level_may_need_one_that_is_new(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_soon(monkeypatch, 1.0)
    async with Producer("orders", url=own_rabbitmq.url) as producer:
        await producer.send(b"", delay=100)
        await asyncio.to_thread(own_rabbitmq.freeze_queue, "streamtools.delay.09")
        try:
            await producer.send(b"", delay=90)
        finally:
            await asyncio.to_thread(own_rabbitmq.thaw_queue, "streamtools.delay.09")
        async with QueueAdmin(url=own_rabbitmq.url) as admin:
            assert (await admin.stats("streamtools.delay.10")).ready >= 1


@pytest.mark.slow
async def test_a_retry_does_not_wait_for_a_level_of_the_delay_that_the_broker_has_lost(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_soon(monkeypatch, 1.0)
    attempts: list[int] = []
    consumer = Consumer("orders", url=own_rabbitmq.url, retry=Retry(retries=2, delay=0.05, jitter=0))

    @consumer()
    async def handle(number: int, message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt < 3:
            raise ValueError("not yet")

    async with Producer("orders", url=own_rabbitmq.url) as producer:
        running = asyncio.create_task(handle())
        await producer.send(1, delay=0.05)
        await wait_until(lambda: attempts == [1, 2, 3])
        await asyncio.to_thread(own_rabbitmq.wait_saved)
        await asyncio.to_thread(own_rabbitmq.unsave, "streamtools.delay.00")
        await asyncio.to_thread(own_rabbitmq.restart, force=True)
        attempts.clear()
        await producer.send(2)
        await wait_until(lambda: attempts == [1, 2, 3])
        await producer.send(3, delay=0.05)
        await wait_until(lambda: attempts == [1, 2, 3, 1, 2, 3])

        await asyncio.to_thread(own_rabbitmq.delete_queue, "streamtools.delay.00")

        async def send_from_another_process() -> None:  # as good as: this one avoids the level for a while
            async with Producer("orders", url=own_rabbitmq.url) as other:
                await other.send(4, delay=0.05)

        await asyncio.to_thread(asyncio.run, send_from_another_process())
        await wait_until(lambda: attempts == [1, 2, 3] * 3)
        async with QueueAdmin(url=own_rabbitmq.url) as admin:
            await admin.stats("streamtools.delay.00")  # it is there again
    consumer.stop()
    await running


async def test_what_the_writer_of_the_brokers_log_lost_is_sent_again(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No confirmation comes on that channel before something else is written to the queue; seen on 3.10."""
    ask_soon(monkeypatch, 2.0)
    async with Producer("orders", url=own_rabbitmq.url, send_timeout=60) as producer:
        await producer.send(b"1")
        await asyncio.to_thread(own_rabbitmq.ctl, "eval", "sys:suspend(ra_log_wal).")
        sending = asyncio.create_task(producer.send(b"2"))
        written = "fun F() -> {_, N} = process_info(whereis(ra_log_wal), message_queue_len), N > 0 orelse F() end"
        await asyncio.to_thread(
            own_rabbitmq.ctl, "eval", f"Wait = {written}, Wait(), exit(whereis(ra_log_wal), kill)."
        )
        await sending

    async with Consumer("orders", url=own_rabbitmq.url) as consumer:
        seen: set[bytes] = set()
        while len(seen) < 2:
            for delivery in await consumer.receive(10, timeout=20):
                seen.add(delivery.message.body)
                await delivery.ack()


@pytest.mark.parametrize(("by_hand", "ordered_by"), [(True, None), (False, None), (True, "queue"), (False, "queue")])
async def test_a_consumer_that_its_queue_has_forgotten_begins_anew(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch, by_hand: bool, ordered_by: OrderedBy
) -> None:
    monkeypatch.setattr(forgotten_consumer, "SILENCE_POLL_INTERVAL", 1.0)
    handled: list[int] = []
    consumer = Consumer("orders", url=own_rabbitmq.url, ordered_by=ordered_by)

    @consumer()
    async def handle(message: int) -> None:
        handled.append(message)

    async def pull() -> None:
        async for delivery in consumer:
            handled.append(int(delivery.message.body))
            await delivery.ack()

    async with Producer("orders", url=own_rabbitmq.url) as producer:
        running = asyncio.create_task(pull() if by_hand else handle())
        await producer.send(1)
        await wait_until(lambda: handled == [1])
        await asyncio.to_thread(own_rabbitmq.forget_consumers, "orders")
        await producer.send(2)
        await wait_until(lambda: handled == [1, 2])
    running.cancel()
    await asyncio.wait({running})
    await consumer.close()


async def test_a_consumer_to_which_its_queue_does_not_deliver_yet_begins_anew_once(
    rabbitmq_vhost: RabbitMQAddress, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forgotten_consumer, "SILENCE_POLL_INTERVAL", 0.2)
    options = {"url": rabbitmq_vhost.url, "arguments": {"x-single-active-consumer": True}}
    async with Consumer("orders", **options) as active, Producer("orders", url=rabbitmq_vhost.url) as producer:
        await producer.send_many(range(200))
        held = [await active.receive(1), await active.receive(1)]
        async with Consumer("orders", **options) as standby:
            assert await standby.receive(1, timeout=3) == []
            await asyncio.gather(*(delivery.ack() for (delivery,) in held))
            await active.close()
            assert await standby.receive(1, timeout=20)

    assert [("delivers none" in r.getMessage()) for r in caplog.records].count(True) == 1


@pytest.mark.parametrize(("slow", "send_timeout"), [(1.5, 1), (0.5, 60)])
async def test_a_channel_whose_confirmations_are_lost_is_given_up(
    rabbitmq_vhost: RabbitMQAddress, monkeypatch: pytest.MonkeyPatch, slow: float, send_timeout: int
) -> None:
    ask_soon(monkeypatch, slow)
    confirm = publisher_channel.PublisherChannel.confirm
    dead: list[publisher_channel.PublisherChannel] = []

    def confirm_unless_dead(
        channel: publisher_channel.PublisherChannel, tag: int, *, multiple: bool, held: bool
    ) -> None:
        dead[:] = dead or [channel]
        if channel is not dead[0]:
            confirm(channel, tag, multiple=multiple, held=held)

    monkeypatch.setattr(publisher_channel.PublisherChannel, "confirm", confirm_unless_dead)
    async with Producer("orders", url=rabbitmq_vhost.url, send_timeout=send_timeout) as producer:
        if send_timeout == 1:
            with pytest.raises(SendError):
                await producer.send(b"given up")
            await wait_until(lambda: dead[0].watch.stuck)
        await producer.send(b"x")


async def test_an_alarm_holds_senders_back_and_lets_acknowledgements_through(own_rabbitmq: RabbitMQNode) -> None:
    url = own_rabbitmq.url
    async with Producer("orders", url=url, send_timeout=60) as producer:
        await producer.send_many([str(n) for n in range(100)])
        async with Consumer("orders", url=url, prefetch=200) as consumer:
            deliveries = []
            while len(deliveries) < 100:
                deliveries += await consumer.receive(100, timeout=10)
            await deliveries.pop().retry(0)  # so that the publishing connection exists
            await consumer.receive(1, timeout=10)
            await asyncio.to_thread(own_rabbitmq.raise_alarm)
            try:
                sending = asyncio.create_task(producer.send(b"held"))
                retrying = asyncio.create_task(deliveries.pop().retry(0))
                async with asyncio.timeout(10):
                    for delivery in deliveries:
                        await delivery.ack()
                await asyncio.sleep(0.5)
                assert not sending.done()
                assert not retrying.done()
                async with Producer("others", url=url, send_timeout=1) as hasty:
                    with pytest.raises(SendError, match=r"low on memory.*alarms"):
                        await hasty.send(b"too soon")
            finally:
                await asyncio.to_thread(own_rabbitmq.clear_alarm)
            async with asyncio.timeout(30):
                await sending
                await retrying
        async with QueueAdmin(url=url) as admin:

            async def left() -> bool:
                return (await admin.stats("orders")).ready == 3

            await wait_until(left)


async def test_closing_during_an_alarm_does_not_hang(own_rabbitmq: RabbitMQNode) -> None:
    producer = Producer("orders", url=own_rabbitmq.url)
    await producer.open()
    await producer.send(b"x")
    await asyncio.to_thread(own_rabbitmq.raise_alarm)
    try:
        sending = asyncio.create_task(producer.send_many([b"x" * 1000] * 5000))
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        await producer.close()
        assert time.monotonic() - begin < 20
        await asyncio.gather(sending, return_exceptions=True)
        assert isinstance(sending.exception(), StreamToolsError)
    finally:
        await asyncio.to_thread(own_rabbitmq.clear_alarm)


async def test_a_frozen_broker_does_not_hang_a_close(own_rabbitmq: RabbitMQNode) -> None:
    consumer = Consumer("orders", url=own_rabbitmq.url)
    await consumer.open()
    own_rabbitmq.freeze()
    try:
        begin = time.monotonic()
        await consumer.close()
        assert time.monotonic() - begin < 20
    finally:
        own_rabbitmq.thaw()
