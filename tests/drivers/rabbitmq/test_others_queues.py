"""Queues and exchanges of others, as they are: with their ends, their single consumer, their arguments."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from aiormq.abc import AbstractChannel
from pamqp.commands import Basic

from streamtools import (
    Binding,
    Bus,
    Command,
    ConsumerFactory,
    ConsumerRunner,
    Exchange,
    Message,
    MessageContext,
    Retry,
)
from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.amqp.frames import (
    CHANNEL_CLOSE,
    CONNECTION_CLOSE,
    HEAD,
    LONG,
    METHOD,
    ack_frame,
    readable,
)
from streamtools.errors import ConfigurationError, QueueError, SendError
from tests.brokers.address import RabbitMQAddress
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


class Count(Command, name="others.Count"):
    """Something to handle."""

    id: int


def _names(address: RabbitMQAddress, kind: str) -> set[str]:
    rows = address.manage("GET", f"{kind}/{address.url.rpartition('/')[2]}")
    return {row["name"] for row in rows if row["name"] and not row["name"].startswith("amq.")}


# --- queues that end with their last consumer ---------------------------------------------------


async def test_a_route_of_a_queue_that_ends_with_its_last_consumer_handles_everything(url: str) -> None:
    handled: list[int] = []
    consumers = ConsumerFactory("rabbitmq", url=url)

    @consumers.route("orders", auto_delete=True)
    async def handle(message: int) -> None:
        handled.append(message)

    runner = ConsumerRunner(consumers)
    running = asyncio.create_task(runner.serve())
    await wait_until(lambda: consumers.instances[0].connected)
    async with RabbitMQProducer("orders", url=url, auto_delete=True) as producer:
        for number in range(5):
            await producer.send(number)
        await wait_until(lambda: handled == list(range(5)))
        await producer.send_many(range(5, 300))
        await wait_until(lambda: handled == list(range(300)))
    runner.stop()
    await running


@pytest.mark.parametrize("arguments", [{}, {"x-single-active-consumer": True}, {"x-expires": 60_000}])
async def test_a_foreign_queue_that_ends_with_its_last_consumer_goes_on(
    foreign: AbstractChannel, consumer: Any, arguments: dict[str, Any]
) -> None:
    await foreign.queue_declare("orders", auto_delete=True, arguments=arguments)
    receiver = await consumer()
    for number in range(50):
        await foreign.basic_publish(str(number).encode(), routing_key="orders")
        (delivery,) = await take(receiver, 1)
        assert delivery.message.body == str(number).encode()
        await delivery.ack()


async def test_a_bus_on_a_queue_that_ends_with_its_last_consumer(url: str) -> None:
    handled: list[int] = []
    bus = Bus("orders", url=url, auto_delete=True)

    @bus.handler
    async def count(command: Count) -> None:
        handled.append(command.id)

    async with bus:
        await bus.start()
        for number in range(50):
            await bus.send(Count(id=number), to="orders")
        await wait_until(lambda: handled == list(range(50)))


@pytest.mark.parametrize("options", [{"exclusive": True}, {"exclusive": True, "auto_delete": True, "durable": False}])
async def test_an_exclusive_queue_takes_its_whole_prefetch(consumer: Any, url: str, options: dict[str, Any]) -> None:
    receiver = await consumer(prefetch=20, **options)
    async with RabbitMQProducer("orders", url=url, declare=False) as producer:
        await producer.send_many(range(40))
    assert len(await take(receiver, 20)) == 20


@pytest.mark.parametrize("options", [{}, {"declare": "passive"}, {"exclusive": True}])
async def test_a_producer_sends_to_an_exclusive_queue_of_its_own_process(
    consumer: Any, url: str, options: dict[str, Any]
) -> None:
    receiver = await consumer(exclusive=True)
    async with RabbitMQProducer("orders", url=url, send_timeout=5, **options) as producer:
        await producer.send(1)
    (delivery,) = await take(receiver, 1)
    assert delivery.message.body == b"1"


# --- one consumer at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_a_foreign_queue_with_a_single_active_consumer_keeps_its_order_beside_a_standby(
    foreign: AbstractChannel, url: str, kind: str
) -> None:
    arguments = {"x-single-active-consumer": True, "x-queue-type": kind}
    await foreign.queue_declare("orders", durable=True, arguments=arguments)
    handled: list[int] = []
    consumers = [RabbitMQConsumer("orders", url=url) for _ in range(3)]

    async def take_one(message: int) -> None:
        handled.append(message)
        await asyncio.sleep(0.002)
        assert handled[-1] == message  # nobody else has begun another meanwhile

    running = [asyncio.create_task(consumer()(take_one)()) for consumer in consumers]
    await wait_until(lambda: all(consumer.connected for consumer in consumers))
    async with RabbitMQProducer("orders", url=url, declare=False) as producer:
        await producer.send_many(range(300))
    await wait_until(lambda: len(handled) >= 300)
    assert handled == list(range(300))
    for consumer in consumers:
        consumer.stop()
    await asyncio.gather(*running)


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_a_standby_begins_nothing_while_the_active_one_handles_its_first_message(
    foreign: AbstractChannel, url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtools.drivers.rabbitmq.consuming.isolation.ALONE_TIMEOUT", 0.05)
    arguments = {"x-single-active-consumer": True, "x-queue-type": kind}
    await foreign.queue_declare("orders", durable=True, arguments=arguments)
    begun: list[int] = []
    ends = asyncio.Event()

    async def take_one(message: int) -> None:
        begun.append(message)
        await ends.wait()

    consumers = [RabbitMQConsumer("orders", url=url) for _ in range(2)]
    running = [asyncio.create_task(consumer()(take_one)()) for consumer in consumers]
    await wait_until(lambda: all(consumer.connected for consumer in consumers))
    async with RabbitMQProducer("orders", url=url, declare=False) as producer:
        await producer.send_many(range(10))
    await wait_until(lambda: bool(begun))
    with pytest.raises(TimeoutError):
        await wait_until(lambda: len(begun) > 1, timeout=1)
    ends.set()
    await wait_until(lambda: begun == list(range(10)))
    for consumer in consumers:
        consumer.stop()
    await asyncio.gather(*running)


@pytest.mark.parametrize("declare", [True, "passive", False])
@pytest.mark.parametrize("further", [{}, {"x-max-priority": 5}, {"x-queue-type": "quorum"}])
async def test_a_foreign_queue_with_a_single_active_consumer_stands_while_consumers_come_and_go(
    foreign: AbstractChannel, url: str, caplog: pytest.LogCaptureFixture, further: dict[str, Any], declare: Any
) -> None:
    """RabbitMQ 3.10 ends a classic one whose active consumer is cancelled with all in hand, and another waiting."""
    await foreign.queue_declare("orders", durable=True, arguments={"x-single-active-consumer": True, **further})
    handled: list[int] = []

    async def take_one(message: int) -> None:
        handled.append(message)
        await asyncio.sleep(0.002)

    consumers = [
        RabbitMQConsumer("orders", url=url, declare=declare, error_declare=False, concurrency=8) for _ in range(2)
    ]
    running = [asyncio.create_task(consumer()(take_one)()) for consumer in consumers]
    await wait_until(lambda: all(consumer.connected for consumer in consumers))
    async with RabbitMQProducer("orders", url=url, declare=False) as producer:
        for number in range(100):
            await producer.send(number)
        for consumer, task in zip(consumers, running, strict=True):
            consumer.stop()
            await producer.send_many(range(100, 150))
            await task
    async with RabbitMQConsumer("orders", url=url, declare=declare, error_declare=False) as last:
        while set(handled) != set(range(150)) or handled.count(149) < 2:
            (delivery,) = await last.receive(timeout=20)
            handled.append(json.loads(delivery.message.body or b""))
            await delivery.ack()
    assert all(handled.count(number) < 3 for number in range(100))
    assert not [r for r in caplog.records if "has ended" in r.getMessage()]


@pytest.mark.parametrize("declare", [True, "passive", False])
async def test_a_classic_queue_is_never_believed_a_count_that_somebody_copied(
    foreign: AbstractChannel, url: str, declare: Any
) -> None:
    await foreign.queue_declare("orders", durable=True)
    properties = Basic.Properties(message_id="1", headers={"x-delivery-count": 7})
    await foreign.basic_publish(b"1", routing_key="orders", properties=properties)
    first = await foreign.basic_get("orders")
    await foreign.basic_nack(first.delivery.delivery_tag)
    async with RabbitMQConsumer("orders", url=url, declare=declare, error_declare=False) as consumer:
        (delivery,) = await consumer.receive(timeout=20)
    assert delivery.redeliveries == 1


# --- what the broker tells of them ----------------------------------------------------------------


@pytest.mark.parametrize("declare", [True, False])
@pytest.mark.parametrize("ordered_by", [None, "queue"])
@pytest.mark.parametrize(
    ("length", "arguments"),
    [
        (95, {}),
        (95, {"x-message-ttl": 60_000, "x-dead-letter-exchange": "amq.direct", "x-single-active-consumer": True}),
        (95, {"x-dead-letter-exchange": "d" * 100, "x-dead-letter-routing-key": "two\nlines" * 20}),
        (5, {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "two\nlines"}),
        (5, {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "\u20ac" * 60}),
        (250, {"x-queue-type": "quorum"}),
    ],
)
async def test_a_queue_is_used_though_the_broker_cuts_off_what_it_says_of_it(
    foreign: AbstractChannel, url: str, length: int, arguments: dict[str, Any], ordered_by: Any, declare: Any
) -> None:
    name = "q" * length
    await foreign.queue_declare(name, durable=True, arguments=arguments)
    await foreign.queue_declare("error", durable=True)
    await foreign.basic_publish(b"x", routing_key=name)
    async with RabbitMQAdmin(url=url) as admin:
        assert [message.body for message in await admin.peek(name)] == [b"x"]
        assert (await admin.stats(name)).ready == 1
    async with RabbitMQConsumer(name, url=url, declare=declare, ordered_by=ordered_by) as receiver:
        (delivery,) = await take(receiver, 1)
        await delivery.ack()


def test_a_text_that_is_cut_off_within_a_character_does_not_end_the_connection() -> None:
    for method in (CHANNEL_CLOSE, CONNECTION_CLOSE):
        text = "gr\u00fcn".encode()[:3]
        payload = LONG.pack(method) + b"\x01\x96" + bytes((len(text),)) + text + b"\0\0\0\0"
        frame = HEAD.pack(METHOD, 1, len(payload)) + payload + b"\xce"
        assert readable(frame) == frame.replace(text, b"gr?")
        assert readable(frame.replace(text, b"grn")) == frame.replace(text, b"grn")


# --- what is made without declaring ---------------------------------------------------------------

DELAY = "streamtools.delay."


def _made(broker: RabbitMQAddress) -> set[str]:
    """Names of queues, exchanges and targets of bindings that are not the broker's own."""
    vhost = broker.url.rpartition("/")[2]
    queues = {row["name"] for row in broker.manage("GET", f"queues/{vhost}")}
    exchanges = {
        row["name"] for row in broker.manage("GET", f"exchanges/{vhost}") if row["name"][:4] not in ("", "amq.")
    }
    bindings = {
        f"{r['source']} to {r['destination']}" for r in broker.manage("GET", f"bindings/{vhost}") if r["source"]
    }
    return queues | exchanges | bindings


@pytest.mark.parametrize(
    ("delay", "ordered_by", "declare"),
    [
        (0, None, False),
        (0.2, "queue", False),
        (0.2, "key", False),
        (0.2, None, False),
        (0.2, None, "passive"),
    ],
)
async def test_without_declaring_no_retry_makes_anything(
    foreign: AbstractChannel,
    rabbitmq_vhost: RabbitMQAddress,
    caplog: pytest.LogCaptureFixture,
    delay: float,
    ordered_by: Any,
    declare: Any,
) -> None:
    for name in ("orders", "error"):
        await foreign.queue_declare(name, durable=True)
    consumer = RabbitMQConsumer("orders", url=rabbitmq_vhost.url, declare=declare, ordered_by=ordered_by)
    attempts: list[bytes] = []

    @consumer(retry=Retry(retries=1, delay=delay))
    async def fail_once(message: bytes) -> None:
        attempts.append(message)
        if len(attempts) == 1:
            raise ValueError("not now")

    running = asyncio.create_task(fail_once())
    await foreign.basic_publish(b"x", routing_key="orders")
    await wait_until(lambda: len(attempts) == 2)
    consumer.stop()
    await running
    assert _made(rabbitmq_vhost) == {"orders", "error"}
    waits = delay and ordered_by is None
    assert caplog.text.count("waits in this process for its retry") == bool(waits)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_retry_that_waits_in_the_process_is_on_time_and_others_are_handled_meanwhile(
    foreign: AbstractChannel, consumer: Any, url: str
) -> None:
    for name in ("orders", "error"):
        await foreign.queue_declare(name, durable=True)
    runs: list[tuple[bytes, float]] = []
    receiver = RabbitMQConsumer("orders", url=url, declare=False, retry=Retry(2, delay=0.3, backoff=1, jitter=0))

    @receiver()
    async def handle(message: bytes) -> None:
        runs.append((message, time.monotonic()))
        if message == b"bad":
            raise ValueError("not now")

    running = asyncio.create_task(handle())
    for body in (b"bad", b"1", b"2", b"3"):
        await foreign.basic_publish(body, routing_key="orders")
    (failed,) = await take(await consumer("error", declare=False), 1)
    assert [body for body, _ in runs] == [b"bad", b"1", b"2", b"3", b"bad", b"bad"]
    first, second, third = (when for body, when in runs if body == b"bad")
    assert second - first > 0.29 and third - second > 0.29
    assert failed.message.attempt == 3
    receiver.stop()
    await running


async def test_what_waits_for_its_retry_waits_on_over_a_reconnect(foreign: AbstractChannel, url: str) -> None:
    for name in ("orders", "error"):
        await foreign.queue_declare(name, durable=True)
    receiver = RabbitMQConsumer("orders", url=url, declare=False, retry=Retry(1, delay=1.5, jitter=0))
    attempts: list[int] = []

    @receiver()
    async def handle(message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt == 1:
            raise ValueError("not now")

    running = asyncio.create_task(handle())
    await foreign.basic_publish(b"x", routing_key="orders")
    await wait_until(lambda: receiver._says_early)
    assert receiver._subscription is not None
    receiver._subscription.channel.connection.write(
        ack_frame(receiver._subscription.channel.number, 1 << 40, multiple=False)
    )  # ends the channel
    await wait_until(lambda: receiver._opened == 2)
    await wait_until(lambda: len(attempts) == 2)
    assert attempts == [1, 2]
    receiver.stop()
    await running


async def test_what_waits_for_its_retry_goes_back_at_a_stop(foreign: AbstractChannel, url: str) -> None:
    for name in ("orders", "error"):
        await foreign.queue_declare(name, durable=True)
    receiver = RabbitMQConsumer("orders", url=url, declare=False, retry=Retry(1, delay=60))

    @receiver()
    async def handle(message: bytes) -> None:
        raise ValueError("not now")

    running = asyncio.create_task(handle())
    await foreign.basic_publish(b"x", routing_key="orders")
    await wait_until(lambda: receiver._says_early)
    receiver.stop()
    await running
    async with RabbitMQConsumer("orders", url=url, declare=False) as last:
        assert [delivery.message.body for delivery in await take(last, 1)] == [b"x"]


@pytest.mark.parametrize("declare", [False, "passive"])
async def test_a_delay_without_declaring_uses_what_stands_and_else_is_refused(
    foreign: AbstractChannel, rabbitmq_vhost: RabbitMQAddress, declare: Any
) -> None:
    await foreign.queue_declare("orders", durable=True)
    url = rabbitmq_vhost.url
    async with RabbitMQProducer("orders", url=url, declare=declare) as sender:
        for _ in range(2):
            with pytest.raises(SendError, match="without declare=True they are not created. Use") as caught:
                await sender.send(b"later", delay=0.2)
            assert caught.value.early == caught.value.refused != ()
        assert _made(rabbitmq_vhost) == {"orders"}
        async with RabbitMQProducer("others", url=url) as other:
            await other.send(b"", delay=3)
        before = _made(rabbitmq_vhost)
        await sender.send(b"later", delay=0.2)  # over the connection that has just made them
    async with RabbitMQProducer("orders", url=url, declare=declare) as sender:
        await sender.send(b"later", delay=0.2)
        with pytest.raises(SendError, match="delay"):
            await sender.send(b"later", delay=3600)  # nobody has made so much
    assert _made(rabbitmq_vhost) - before == {f"{DELAY}out to orders"}
    async with RabbitMQConsumer("orders", url=url, declare=False) as receiver:
        assert len(await take(receiver, 2)) == 2


async def test_a_handler_whose_delayed_message_nothing_can_hold_fails_with_that(
    foreign: AbstractChannel, consumer: Any, url: str
) -> None:
    for name in ("count", "error"):
        await foreign.queue_declare(name, durable=True)
    bus = Bus("count", url=url, declare=False, retry=Retry(retries=0))

    @bus.handler
    async def count(command: Count, context: MessageContext) -> None:
        await context.defer(Count(id=1), delay=5, to="count")

    async with bus:
        await bus.start()
        await bus.send(Count(id=0), to="count")
        (failed,) = await take(await consumer("error", declare=False), 1)
    assert failed.message.error is not None and "declare=True" in failed.message.error.reason


# --- queues that go and come ----------------------------------------------------------------------


@pytest.mark.parametrize("declare", [False, "passive"])
async def test_a_queue_that_is_deleted_is_waited_for(
    foreign: AbstractChannel, url: str, declare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("orders", "error"):
        await foreign.queue_declare(name, durable=True)
    consumer = RabbitMQConsumer("orders", url=url, declare=declare)
    handled: list[bytes] = []

    @consumer()
    async def handle(message: bytes) -> None:
        handled.append(message)

    running = asyncio.create_task(handle())
    for number in range(2):
        await foreign.basic_publish(b"%d" % number, routing_key="orders")
        await wait_until(lambda count=number + 1: len(handled) == count)  # type: ignore[misc]
        caplog.clear()
        await foreign.queue_delete("orders")
        # More than one try finds none.
        await wait_until(lambda: "the consumer waits for it" in caplog.text or running.done())
        await asyncio.wait({running}, timeout=1)
        assert not running.done()
        assert caplog.text.count("There is no queue 'orders'") == 1
        assert not consumer.connected
        await foreign.queue_declare("orders", durable=True)
    await foreign.basic_publish(b"last", routing_key="orders")
    await wait_until(lambda: handled == [b"0", b"1", b"last"])
    await consumer.close()
    await running

    await foreign.queue_delete("orders")
    with pytest.raises(QueueError, match="There is no queue 'orders'"):  # as it starts it is told at once
        await consumer.open()


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("declare", [True, "passive", False])
async def test_a_stream_is_refused_at_opening(foreign: AbstractChannel, url: str, declare: Any) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-queue-type": "stream"})
    with pytest.raises(QueueError, match="a stream is not a queue"):
        await RabbitMQConsumer("orders", url=url, declare=declare, error_declare=False).open()


async def test_a_stream_is_neither_counted_nor_shown_nor_emptied_and_can_be_deleted(
    foreign: AbstractChannel, url: str
) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-queue-type": "stream"})
    await foreign.basic_publish(b"x", routing_key="orders")
    async with RabbitMQAdmin(url=url) as admin:
        connection = await admin._get_connection()
        for ask in (admin.stats, admin.peek, admin.purge, admin.discard, admin.move):
            with pytest.raises(QueueError, match="a stream is not a queue"):
                await ask("orders")
        assert connection.lost is None  # as it was by a purge, for all who share the connection
        await admin.delete("orders")


def test_a_stream_is_not_made() -> None:
    with pytest.raises(ConfigurationError, match="a stream is not a queue"):
        RabbitMQConsumer("orders", url="amqp://localhost", arguments={"x-queue-type": "stream"})


# --- exchanges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        {"durable": False},
        {"durable": True, "arguments": {"alternate-exchange": "amq.fanout"}},
        {"durable": True, "auto_delete": True},
        {"durable": True, "exchange_type": "headers"},
    ],
)
async def test_an_exchange_of_others_is_used_as_it_is(
    foreign: AbstractChannel, consumer: Any, url: str, made: dict[str, Any]
) -> None:
    await foreign.exchange_declare("shop", **{"exchange_type": "topic", **made})
    receiver = await consumer(bindings=[Binding("a.*", Exchange("shop"))])
    async with Bus(None, url=url) as bus:
        await bus.publish({"id": 1}, "a.b", exchange=Exchange("shop"))
    assert (await take(receiver, 1))[0].message.body == b'{"id":1}'


async def test_an_internal_exchange_is_bound_to_and_says_that_it_takes_nothing(
    foreign: AbstractChannel, consumer: Any, url: str
) -> None:
    await foreign.exchange_declare("inner", exchange_type="topic", durable=True, internal=True)
    await foreign.exchange_declare("outer", exchange_type="topic", durable=True)
    await foreign.exchange_bind("inner", "outer", "#")
    receiver = await consumer(bindings=[Binding("a.*", Exchange("inner"))])
    async with Bus(None, url=url) as bus:
        with pytest.raises(SendError, match="internal exchange 'inner'"):
            await bus.publish({}, "a.b", exchange=Exchange("inner"))
        await bus.publish({"id": 1}, "a.b", exchange=Exchange("outer"))
    assert await take(receiver, 1)


# --- nothing is declared ----------------------------------------------------------------------------


@pytest.mark.parametrize("ordered_by", [None, "queue", "key"])
async def test_with_declare_false_nothing_is_made(
    rabbitmq_vhost: RabbitMQAddress, foreign: AbstractChannel, ordered_by: Any
) -> None:
    options: dict[str, Any] = {
        "url": rabbitmq_vhost.url,
        "declare": False,
        "ordered_by": ordered_by,
        "bindings": [Binding("a", Exchange("shop"))],
    }
    with pytest.raises(QueueError, match="no queue 'orders'"):
        await RabbitMQConsumer("orders", **options).open()
    assert _names(rabbitmq_vhost, "queues") == _names(rabbitmq_vhost, "exchanges") == set()

    await foreign.queue_declare("orders", durable=True)
    async with RabbitMQConsumer("orders", **options) as receiver:
        await foreign.basic_publish(b"x", routing_key="orders")
        (delivery,) = await receiver.receive(timeout=20)
        await delivery.ack()
        assert _names(rabbitmq_vhost, "queues") == {"orders"}
        assert _names(rabbitmq_vhost, "exchanges") == set()
