"""Users who may do little: what each use needs, and what happens where it is missing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from aiormq.abc import AbstractChannel

from streamtools import Binding, Bus, Command, Consumer, Event, Exchange, MessageContext, Producer, Retry
from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQConsumer, RabbitMQProducer
from streamtools.errors import QueueError, SendError
from tests.brokers.address import RabbitMQAddress
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until

#: Nothing may be made, written or read.
NOTHING = {"configure": "^$", "write": "^$", "read": "^$"}
#: The pattern of the default exchange.
DEFAULT = "amq\\.default"
MakeUser = Callable[..., str]


class Forbidden(Command, name="permissions.Forbidden"):
    """Publishes where its user may not."""

    id: int


class Allowed(Command, name="permissions.Allowed"):
    """Publishes where its user may."""

    id: int


class Happened(Event, name="permissions.Happened"):
    """What they publish."""

    id: int


@pytest.fixture
def user(rabbitmq_vhost: RabbitMQAddress) -> Iterator[MakeUser]:
    """Makes a user of the test's virtual host with these permissions; the URL to it."""
    vhost = rabbitmq_vhost.url.rpartition("/")[2]
    made: list[str] = []

    def make(*, topics: dict[str, str] | None = None, **patterns: str) -> str:
        name = f"little-{secrets.token_hex(4)}"
        made.append(name)
        rabbitmq_vhost.manage("PUT", f"users/{name}", {"password": "little", "tags": ""})
        rabbitmq_vhost.manage("PUT", f"permissions/{vhost}/{name}", {**NOTHING, **patterns})
        for exchange, pattern in (topics or {}).items():
            rights = {"exchange": exchange, "write": pattern, "read": ".*"}
            rabbitmq_vhost.manage("PUT", f"topic-permissions/{vhost}/{name}", rights)
        return rabbitmq_vhost.url.replace("guest:guest@", f"{quote(name)}:little@")

    yield make
    for name in made:
        rabbitmq_vhost.manage("DELETE", f"users/{name}")


@pytest.fixture
async def made(url: str) -> None:
    """The queues that a service has, and the chain of delays, made by somebody who may."""
    async with RabbitMQConsumer("orders", url=url), RabbitMQProducer("orders", url=url) as producer:
        await producer.send(b"", delay=3600)  # it makes the chain, and arrives in no test
    async with RabbitMQAdmin(url=url) as admin:
        await admin.purge("orders")


# --- what each use needs --------------------------------------------------------------------------


async def test_sending_to_a_queue_that_is_there_needs_to_write_to_the_default_exchange(
    made: None, user: MakeUser, consumer: Any
) -> None:
    async with Producer("orders", url=user(write=DEFAULT)) as producer:
        await producer.send(b"x")
    assert await take(await consumer(), 1)


async def test_receiving_from_a_queue_that_is_there_needs_to_read_it(
    made: None, user: MakeUser, producer: Any
) -> None:
    await (await producer()).send(b"x")
    async with Consumer("orders", url=user(read="orders")) as receiver:
        (delivery,) = await receiver.receive(timeout=20)
        await delivery.ack()


async def test_retries_and_the_error_queue_need_to_write_to_the_default_exchange(
    made: None, user: MakeUser, producer: Any, consumer: Any
) -> None:
    attempts: list[int] = []
    receiver = Consumer("orders", url=user(read="orders", write=DEFAULT), retry=Retry(retries=1, delay=0))

    @receiver()
    async def handle(message: int) -> None:
        attempts.append(message)
        raise ValueError("never")

    running = asyncio.create_task(handle())
    await (await producer()).send(1)
    assert await take(await consumer("error"), 1)
    assert attempts == [1, 1]
    receiver.stop()
    await running


async def test_delays_need_no_right_to_make_anything_where_the_chain_stands(
    made: None, user: MakeUser, producer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = user(read="orders|streamtools\\.delay\\.out", write=f"{DEFAULT}|orders|streamtools\\.delay\\..*")
    attempts: list[int] = []
    receiver = Consumer("orders", url=url, retry=Retry(retries=2, delay=0.1, backoff=2))

    @receiver()
    async def handle(message: int) -> None:
        attempts.append(message)
        if len(attempts) < 3:
            raise ValueError("not yet")

    running = asyncio.create_task(handle())
    await (await producer()).send(1)
    await wait_until(lambda: attempts == [1, 1, 1])
    receiver.stop()
    await running
    async with Producer("orders", url=url) as sender, Consumer("orders", url=url) as reader:
        await sender.send(b"later", delay=0.3)
        (delivery,) = await reader.receive(timeout=20)
        await delivery.ack()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("stands", "read", "write"),
    [
        (False, "orders", DEFAULT),
        (True, "orders|streamtools\\.delay\\.out", f"{DEFAULT}|orders"),
        (True, "orders", f"{DEFAULT}|streamtools\\.delay\\..*"),
    ],
    ids=["missing", "may not be sent to", "may not be bound"],
)
async def test_a_retry_whose_delay_the_broker_may_not_hold_waits_in_the_process(
    user: MakeUser,
    url: str,
    producer: Any,
    caplog: pytest.LogCaptureFixture,
    stands: bool,
    read: str,
    write: str,
) -> None:
    async with RabbitMQConsumer("orders", url=url):
        pass
    sender = await producer()
    if stands:
        await (await producer("others")).send(b"", delay=3)
    attempts: list[int] = []
    receiver = Consumer("orders", url=user(read=read, write=write), retry=Retry(retries=2, delay=0.1))

    @receiver()
    async def handle(message: int) -> None:
        attempts.append(message)
        if attempts.count(message) < 3:
            raise ValueError("not yet")

    running = asyncio.create_task(handle())
    await sender.send_many(range(3))
    await wait_until(lambda: sorted(attempts) == [0, 0, 0, 1, 1, 1, 2, 2, 2])
    receiver.stop()
    await running
    assert caplog.text.count("waits in this process for its retry") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_delay_without_the_chain_and_the_right_to_make_it_says_what_is_missing(
    user: MakeUser, consumer: Any
) -> None:
    await consumer()
    async with Producer("orders", url=user(write=".*", read=".*")) as sender:
        with pytest.raises(SendError, match=r"streamtools\.undeliverable.*may not declare them"):
            await sender.send(b"later", delay=0.3)
        await sender.send(b"now")


async def test_making_queues_needs_to_configure_them_and_to_write_to_where_they_dead_letter(
    user: MakeUser,
) -> None:
    url = user(
        configure="orders|error|streamtools\\.undeliverable",
        read="orders|error",
        write=DEFAULT,
    )
    async with Consumer("orders", url=url) as receiver, Producer("orders", url=url) as sender:
        await sender.send(b"x")
        assert await receiver.receive(timeout=20)


async def test_a_binding_needs_to_write_to_the_queue_and_to_read_the_exchange(
    made: None, user: MakeUser, foreign: AbstractChannel
) -> None:
    await foreign.exchange_declare("shop", exchange_type="topic", durable=True)
    url = user(read="orders|shop", write="orders")
    binding = Binding("a.*", Exchange("shop"))
    async with Consumer("orders", url=url, bindings=[binding]) as receiver:
        await foreign.basic_publish(b"x", exchange="shop", routing_key="a.b")
        assert await receiver.receive(timeout=20)


@pytest.mark.parametrize("ordered_by", ["queue", "key"])
async def test_an_ordered_queue_of_others_needs_no_right_to_make_anything(
    user: MakeUser, foreign: AbstractChannel, ordered_by: Any
) -> None:
    arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True}
    await foreign.queue_declare("orders", durable=True, arguments=arguments)
    await foreign.queue_declare("error", durable=True)
    async with Consumer("orders", url=user(read="orders"), ordered_by=ordered_by) as receiver:
        await foreign.basic_publish(b"x", routing_key="orders")
        assert await receiver.receive(timeout=20)


async def test_what_may_not_be_consumed_ends_at_once_and_says_so(made: None, user: MakeUser) -> None:
    with pytest.raises(QueueError, match=r"does not allow it.*'orders'"):
        await Consumer("orders", url=user()).open()


async def test_what_may_not_be_sent_is_refused_at_once_and_the_connection_stays(made: None, user: MakeUser) -> None:
    async with RabbitMQProducer("orders", url=user()) as sender:
        for _ in range(2):
            with pytest.raises(SendError, match=r"amq\.default") as caught:
                await sender.send_many([b"x"] * 5)
            assert len(caught.value.refused) == 5
        assert sender._opened == 1


# --- one that may not costs the others nothing ----------------------------------------------------


@pytest.mark.parametrize("kind", ["exchange", "topic", "internal"])
async def test_a_handler_that_publishes_where_it_may_not_fails_alone(
    user: MakeUser, foreign: AbstractChannel, consumer: Any, kind: str
) -> None:
    internal = kind == "internal"
    await foreign.exchange_declare("forbidden", exchange_type="topic", durable=True, internal=internal)
    await foreign.exchange_declare("shop", exchange_type="topic", durable=True)
    await foreign.queue_declare("seen", durable=True)
    for exchange in ("shop", "forbidden"):
        await foreign.queue_bind("seen", exchange, "#")
    write = ".*" if kind != "exchange" else "^(?!forbidden).*$"
    topics = {"forbidden": "^allowed\\."} if kind == "topic" else None
    url = user(configure=".*", read=".*", write=write, topics=topics)
    handled: list[int] = []
    bus = Bus("orders", url=url, retry=Retry(retries=1, delay=0), concurrency=8)

    @bus.handler
    async def forbid(command: Forbidden, context: MessageContext) -> None:
        await context.publish(Happened(id=command.id), "closed.topic", exchange=Exchange("forbidden"))

    @bus.handler
    async def allow(command: Allowed, context: MessageContext) -> None:
        handled.append(command.id)
        await context.publish(Happened(id=command.id), exchange=Exchange("shop"))

    async with bus:
        await bus.start()
        for number in range(60):
            await bus.send(Forbidden(id=number) if number % 10 == 5 else Allowed(id=number), to="orders")
        failed = await take(await consumer("error"), 6)
        await wait_until(lambda: len(handled) >= 54)
        events = await take(await consumer("seen", ordered_by=None), 54)
        assert sorted(handled) == [number for number in range(60) if number % 10 != 5]
        assert len({delivery.message.id for delivery in events}) == 54
        assert not await (await consumer("seen")).receive(timeout=0.3)
        for delivery in failed:
            assert delivery.message.error is not None
            assert "forbidden" in delivery.message.error.reason
            assert delivery.message.attempt == 2


@pytest.mark.parametrize("bad", [0, 3])
async def test_a_reader_whose_copies_may_not_be_sent_holds_them_says_so_once_and_goes_on(
    made: None,
    user: MakeUser,
    producer: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    bad: int,
) -> None:
    monkeypatch.setattr("streamtools.engine.settler.REFUSED_DELAY", 0.05)
    handled: list[int] = []
    receiver = RabbitMQConsumer("orders", url=user(read="orders"), retry=Retry(retries=0))

    @receiver()
    async def handle(message: int) -> None:
        if message == bad:
            raise ValueError("a copy is to be sent")
        handled.append(message)

    tries = 0
    perform = "streamtools.engine.settling.OneSettlement.perform"
    from streamtools.engine.settling import OneSettlement  # noqa: PLC0415

    original = OneSettlement.perform

    async def count(self: OneSettlement) -> None:
        nonlocal tries
        tries += 1
        await original(self)

    monkeypatch.setattr(perform, count)
    running = asyncio.create_task(handle())
    sender = await producer()
    for number in range(20):
        await sender.send(number)
    await wait_until(lambda: len(handled) == 19 and tries >= 4)
    held = [record for record in caplog.records if "is held back" in record.getMessage() and record.levelno >= 30]
    assert len(held) == 1
    assert "amq.default" in held[0].getMessage()
    assert receiver._opened == 1
    receiver.stop()
    await running
    assert sorted(handled) == [number for number in range(20) if number != bad]  # each once
    async with Consumer("orders", url=sender.settings) as last:  # nothing is lost
        (delivery,) = await last.receive(timeout=20)
        assert delivery.message.body == b"%d" % bad
        await delivery.ack()


async def test_a_stream_that_may_not_be_looked_at_is_refused_at_its_first_message(
    foreign: AbstractChannel, user: MakeUser
) -> None:
    await foreign.queue_declare("orders", durable=True, arguments={"x-queue-type": "stream"})
    consumer = Consumer("orders", url=user(read="orders"), declare=False)

    @consumer()
    async def handle(message: bytes) -> None: ...

    running = asyncio.create_task(handle())
    await wait_until(lambda: consumer.connected or running.done())
    while not running.done():
        await foreign.basic_publish(b"x", routing_key="orders")
        await asyncio.wait([running], timeout=0.1)
    with pytest.raises(QueueError, match="a stream is not a queue"):
        await running
