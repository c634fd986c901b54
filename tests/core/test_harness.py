"""The harness: real handlers, no broker, and what became of each message."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from pydantic import BaseModel

from streamtools import (
    HTTP,
    PRODUCERS,
    RABBITMQ,
    Bus,
    ConfigurationError,
    ConsumerFactory,
    Delivery,
    Drop,
    Message,
    Producer,
    Reject,
    Retry,
    RetryLater,
)
from streamtools.errors import Closed
from streamtools.testing import Harness


class Order(BaseModel):
    id: int


async def test_a_handlers_work_is_seen_from_the_first_message_to_the_last_it_causes() -> None:
    # Given a service as it runs against RabbitMQ, with a producer made beside it
    consumers = ConsumerFactory(RABBITMQ, url="amqp://nobody:secret@nowhere.invalid", retry=Retry(delay=60))
    payments = PRODUCERS[RABBITMQ]("payments", url="amqp://nobody:secret@nowhere.invalid")
    ledger = PRODUCERS[HTTP]("http://nowhere.invalid/ledger")

    @consumers.route("orders", concurrency=4)
    async def order(msg: Order) -> str:
        await payments.send({"order": msg.id}, headers={"origin": "orders"}, key=str(msg.id))
        return f"order {msg.id}"

    @consumers.route("payments")
    async def payment(msg: dict[str, int], message: Message) -> None:
        if msg["order"] == 2 and message.attempt < 3:
            raise ConnectionError("the bank sleeps")
        if msg["order"] == 3:
            raise Reject("no such card")
        await ledger.send_many([msg, msg], method="PUT")

    async with Harness(consumers) as service:
        # When messages are sent
        for number in (1, 2, 3):
            await service.send("orders", {"id": number})
        await service.send("orders", {"id": "no number"})
        await service.settled()

        # Then everything is told
        assert service.handled("orders") == [{"id": 1}, {"id": 2}, {"id": 3}]
        assert service.results("orders") == ["order 1", "order 2", "order 3"]
        assert sorted(p["order"] for p in service.handled("payments")) == [1, 2]
        assert [(m.queue, m.attempt) for m in service.retried] == [("payments", 2), ("payments", 3)]
        assert service.retried[0].error is not None and service.retried[0].error.reason == "the bank sleeps"
        reasons = {m.error.queue: m.error.reason for m in service.rejected if m.error is not None}
        assert reasons["payments"] == "no such card" and "not a valid Order" in reasons["orders"]
        assert service.sent("payments") == [{"order": 1}, {"order": 2}, {"order": 3}]
        assert service.sent_messages("payments")[0].headers == {"origin": "orders"}
        assert len(service.sent("http://nowhere.invalid/ledger")) == 4
        assert len(service.sent()) == 7


async def test_retries_and_delays_cost_no_time_unless_they_shall() -> None:
    consumers = ConsumerFactory(url="sqlite://", retry=Retry(retries=3, delay=100))

    @consumers.route("orders")
    async def order(msg: str, message: Message) -> None:
        if message.attempt < 4:
            raise RetryLater(1000) if message.attempt == 1 else ValueError("not yet")

    @consumers.route("in order", ordered_by="queue")
    async def in_order(msg: str, message: Message) -> None:
        if message.attempt < 4:
            raise RetryLater(1000) if message.attempt == 1 else ValueError("not yet")

    async with Harness(consumers) as service:
        await service.send("orders", "a", delay=1000)
        await service.send("in order", "b")
        await service.settled()
        assert sorted(service.handled()) == ["a", "b"]
        assert sorted(m.attempt for m in service.retried) == [2, 2, 3, 3, 4, 4]

    consumers.handlers[0].options["retry"] = Retry(delay=0.2, jitter=0, backoff=1)
    start = time.monotonic()
    async with Harness(consumers.handlers[0], delays=True) as service:
        await service.send("orders", "a", delay=0.2)
        with pytest.raises(TimeoutError):
            service._timeout = 0.3
            await service.settled()
    assert time.monotonic() - start >= 0.3


async def test_what_hangs_is_named() -> None:
    consumers = ConsumerFactory(url="asyncio://")

    @consumers.route("orders")
    async def order(msg: str) -> None:
        await asyncio.Event().wait()

    async with Harness(consumers, timeout=0.1) as service:
        await service.send("orders", "a", id="first")
        await service.send("orders", "b", id="second")
        with pytest.raises(TimeoutError, match=r"order of 'orders': first, second \(1 at work\)"):
            await service.settled()


async def test_verdicts_of_every_kind_come_to_an_end() -> None:
    consumers = ConsumerFactory(url="asyncio://")
    kept: list[Delivery] = []

    @consumers.route("dropped")
    async def dropped(msg: str) -> None:
        raise Drop

    @consumers.route("kept", ack="manual")
    async def keep(msg: str, delivery: Delivery) -> None:
        kept.append(delivery)
        if len(kept) == 2:
            await kept[0].ack()
            await kept[1].reject("by hand")

    @consumers.route("at most once", ack="on_receive")
    async def at_most_once(msg: str) -> str:
        if msg == "fails":
            raise ValueError("lost")
        return "done"

    @consumers.route("error")
    async def failed(msg: Any, message: Message) -> None:
        assert message.error is not None

    async with Harness(consumers) as service:
        for queue, payload in [("dropped", "x"), ("kept", "a"), ("kept", "b"), ("at most once", "fails")]:
            await service.send(queue, payload)
        await service.send("at most once", "works")
        await service.settled()
        assert [m.body for m in service.dropped] == [b"x"]
        assert service.handled("kept") == ["a"]
        assert service.handled("at most once") == ["works"] and service.results("at most once") == ["done"]
        assert [m.body for m in service.rejected] == [b"b"]
        # A handler of the error queue has what was rejected.
        assert service.handled("error") == ["b"]


async def test_each_group_has_each_message() -> None:
    consumers = ConsumerFactory(url="asyncio://")

    @consumers.route("orders", group="billing")
    async def billing(msg: int) -> None: ...

    @consumers.route("orders", group="shipping")
    async def shipping(msg: int) -> None: ...

    async with Harness(consumers) as service:
        await service.send("orders", 1)
        await service.settled()
        assert service.handled("orders") == [1, 1]


async def test_after_the_block_producers_are_themselves_again() -> None:
    consumers = ConsumerFactory(url="asyncio://")
    outside = Producer("elsewhere", url="asyncio://outside")

    @consumers.route("orders")
    async def order(msg: int) -> None:
        await outside.send(msg)

    async with Harness(consumers) as service:
        await service.send("orders", 1)
        await service.settled()
        assert service.sent("elsewhere") == [1]
        await outside.close()
        with pytest.raises(Closed):
            await outside.send(2)
    await outside.open()
    await outside.send(3)
    from streamtools import Consumer

    async with Consumer("elsewhere", url="asyncio://outside") as consumer:
        [delivery] = await consumer.receive(5, timeout=0)
        assert delivery.message.body == b"3"


async def test_a_second_harness_at_the_same_time_says_so_and_disturbs_nothing() -> None:
    consumers, others = ConsumerFactory(url="asyncio://"), ConsumerFactory(url="asyncio://")

    @consumers.route("orders")
    async def order(msg: int) -> None: ...

    @others.route("others")
    async def other(msg: int) -> None: ...

    async def use(*sources: ConsumerFactory) -> list[Any]:
        async with Harness(*sources) as service:
            await service.send("others", 1)
            await service.settled()
            return service.handled()

    async with Harness(consumers) as service:
        for again in (use(others), asyncio.to_thread(asyncio.run, use(others))):
            with pytest.raises(ConfigurationError, match="Another harness is in use"):
                await again
        await Producer("orders").send(2)
        await service.settled()
        assert service.handled() == service.sent() == [2]
    assert await use(consumers, others) == await asyncio.to_thread(asyncio.run, use(others)) == [1]


async def test_a_mistake_of_the_test_is_a_clear_error() -> None:
    consumers = ConsumerFactory(url="asyncio://")

    @consumers.route("orders")
    async def order(msg: int) -> None: ...

    async with Harness(consumers) as service:
        with pytest.raises(ConfigurationError, match="Did you mean 'orders'"):
            await service.send("order", 1)

    @consumers.route("orders", method="GET")
    async def get_order(msg: int) -> None: ...

    with pytest.raises(ConfigurationError, match="order and .*get_order are both routed from 'orders'"):
        Harness(consumers)


async def test_a_handler_that_cannot_be_bound_fails_at_the_start() -> None:
    consumers = ConsumerFactory(url="asyncio://")

    @consumers.route("orders")
    async def order() -> None: ...

    with pytest.raises(ConfigurationError, match="takes no message"):
        async with Harness(consumers):
            pass
    assert Producer._deliver.__module__ == "streamtools.producer"


async def test_a_routed_method_runs_with_its_object() -> None:
    consumers = ConsumerFactory(url="asyncio://")

    class Service:
        def __init__(self) -> None:
            self.seen: list[int] = []

        @consumers.route("orders")
        async def order(self, msg: int) -> None:
            self.seen.append(msg)

    service = Service()
    async with Harness(service.order) as running:  # type: ignore[arg-type]
        await running.send("orders", 5)
        await running.settled()
    assert service.seen == [5]


def test_what_is_no_handler_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ConfigurationError, match="factories, routed handlers and buses, but not <AsyncIOProducer"):
        Harness(Producer("orders", url="asyncio://"))  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["producer", "outbox", "bus"])
async def test_a_handler_that_defers_to_itself_does_not_spin(by: str) -> None:
    factory, bus = ConsumerFactory(url="asyncio://"), Bus("polls", url="asyncio://")
    producer = Producer("polls", url="asyncio://", outbox=by == "outbox")

    async def poll(msg: dict[str, int]) -> None:
        again = {"n": msg["n"] + 1}
        await (bus.defer(again, delay=60, to="polls") if by == "bus" else producer.send(again, delay=60))

    if by == "bus":
        bus.handler(poll)
    else:
        factory.route("polls")(poll)
    async with Harness(bus if by == "bus" else factory) as service:
        await service.send("polls", {"n": 0})
        await service.settled()
        handled, deferred = service.handled("polls"), service.deferred("polls")
    assert [each["n"] for each in handled] == list(range(11))
    assert deferred[-1] == {"n": 11}, "the last one is kept, and not run"


async def test_a_chain_of_deferred_messages_comes_to_its_end() -> None:
    factory = ConsumerFactory(url="asyncio://")
    producer = Producer("steps", url="asyncio://")

    @factory.route("steps")
    async def step(msg: int) -> None:
        if msg < 5:
            await producer.send(msg + 1, delay=3600)

    async with Harness(factory) as service:
        for _ in range(3):
            await service.send("steps", 0)
        await service.settled()
        assert sorted(service.handled("steps")) == sorted([0, 1, 2, 3, 4, 5] * 3)


async def test_what_is_retried_for_ever_does_not_spin() -> None:
    runs: list[int] = []
    factory = ConsumerFactory(url="asyncio://", retry=Retry(retries=None, delay=60))

    @factory.route("orders")
    async def handle(msg: int) -> None:
        runs.append(msg)
        raise RuntimeError("never")

    async with Harness(factory, timeout=1) as service:
        await service.send("orders", 1)
        with pytest.raises(TimeoutError, match="Not settled"):
            await service.settled()
    assert len(runs) == 101


async def test_what_is_handled_is_counted_once_its_coroutine_has_run() -> None:
    done: list[int] = []

    async def work(msg: int) -> None:
        await asyncio.sleep(0.01)
        done.append(msg)

    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(lambda msg: work(msg))  # noqa: PLW0108
    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        assert service.handled("orders") == done == [1]
