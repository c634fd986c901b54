"""A bus in the harness: its real handlers, without a broker, whatever its address."""

import asyncio
from typing import Any

import pytest

from streamtools import (
    Bus,
    ConfigurationError,
    Exchange,
    FeatureError,
    Message,
    MessageContext,
    Reject,
    RemoteError,
    RequestTimeout,
    Retry,
)
from streamtools.testing import Harness
from tests.bus.contracts import Bill, OrderPlaced, OrderShipped, PlaceOrder, Price, Quote

NOWHERE = "amqp://nobody:secret@nowhere.invalid"


def shop(**options: Any) -> Bus:
    """A service as it runs against RabbitMQ."""
    bus = Bus("orders", **{"url": NOWHERE, "retry": Retry(retries=3, delay=60), "queue_type": "classic", **options})

    @bus.handler
    async def place(command: PlaceOrder, context: MessageContext) -> str:
        context.publish(OrderPlaced(id=command.id), headers={"tenant": "a"})
        context.send(Bill(id=command.id))
        context.defer(PlaceOrder(id=command.id + 100), delay=3600, to="elsewhere")
        if command.id == 2 and context.attempt < 3:
            raise ConnectionError("not yet")
        if command.id == 3:
            raise Reject("sold out")
        return "placed"

    return bus


async def test_what_a_handler_did_is_told_by_what_it_was() -> None:
    async with Harness(shop()) as service:
        await service.send("orders", PlaceOrder(id=1))
        await service.settled()
        assert service.handled() == [{"id": 1}]
        assert service.handled(PlaceOrder) == [PlaceOrder(id=1)]
        assert service.results("orders") == ["placed"]
        assert service.published() == [{"id": 1}]
        assert service.published(OrderPlaced) == [OrderPlaced(id=1)]
        assert service.sent("billing") == [{"id": 1}]
        assert service.sent(Bill) == [Bill(id=1)]
        assert service.deferred(PlaceOrder) == service.sent(PlaceOrder) == [PlaceOrder(id=101)]
        assert service.replied() == []
        [bill] = service.sent_messages(Bill)
        assert (bill.queue, bill.intent, bill.source) == ("billing", "command", "orders")


async def test_a_failed_attempt_sends_nothing_and_retries_take_no_time() -> None:
    async with Harness(shop()) as service:
        await service.send("orders", PlaceOrder(id=2))
        await service.send("orders", PlaceOrder(id=3))
        await service.settled()
        assert service.published(OrderPlaced) == [OrderPlaced(id=2)]
        assert [m.attempt for m in service.retried] == [2, 3]
        [rejected] = service.rejected
        assert rejected.error is not None and rejected.error.reason == "sold out"


async def test_buses_hear_each_other_by_topic_and_by_queue() -> None:
    billing, audit, seen = (
        Bus("billing", url="sqlite:///none/such.db"),
        Bus("audit", url="kafka://nowhere"),
        list[str](),
    )

    @billing.handler
    async def bill(command: Bill, context: MessageContext) -> None:
        context.publish(OrderShipped(id=command.id))

    @audit.handler
    async def note(data: dict[str, int], message: Message) -> None:
        seen.append(f"{message.type} {data['id']} {message.headers.get('tenant')}")

    orders = shop()
    async with Harness(orders, billing, audit) as service:
        await audit.subscribe("orders.*", "shipping.#")
        await orders.send(PlaceOrder(id=1))
        await service.settled()
        assert sorted(seen) == ["orders.OrderPlaced 1 a", "orders.OrderShipped 1 None"]
        assert service.handled("billing") == [{"id": 1}]
        await audit.unsubscribe("orders.*")
        await orders.publish(OrderPlaced(id=2))
        await service.settled()
        assert len(seen) == 2
        assert service.published(OrderPlaced) == [OrderPlaced(id=1), OrderPlaced(id=2)]
    assert (orders._transport.url, audit._transport.url) == (NOWHERE, "kafka://nowhere")


async def test_several_handlers_of_one_event_are_each_told_and_retried_alone() -> None:
    bus, runs = Bus("orders", url=NOWHERE, retry=Retry(retries=1, delay=60)), list[str]()

    @bus.handler
    async def works(event: OrderPlaced, context: MessageContext) -> str:
        runs.append("works")
        return "worked"

    @bus.handler(retry=Retry(retries=2, delay=60))
    async def fails_once(event: OrderPlaced, context: MessageContext) -> str:
        runs.append("fails")
        if context.attempt == 1:
            raise ValueError("once")
        return "worked late"

    @bus.handler
    async def never(event: OrderPlaced) -> None:
        runs.append("never")
        raise ValueError("never")

    async with Harness(bus) as service:
        await bus.publish(OrderPlaced(id=1))
        await service.settled()
        assert (runs.count("works"), runs.count("fails"), runs.count("never")) == (1, 2, 2)
        assert service.results() == ["worked", "worked late"]
        [rejected] = service.rejected
        assert rejected.handler is not None and rejected.handler.endswith("never")


async def test_requests_are_answered() -> None:
    prices, asker = Bus("prices", url=NOWHERE, retry=Retry(retries=0)), Bus(None, url="http://nowhere.invalid")

    @prices.handler
    async def quote(command: Quote, context: MessageContext) -> Price:
        if command.id == 13:
            raise ValueError("unlucky")
        return Price(amount=command.id)

    async with Harness(prices, asker) as service:
        for bus in (prices, asker):
            assert await bus.request(Quote(id=4), returns=Price) == Price(amount=4)
        with pytest.raises(RemoteError, match="ValueError"):
            await asker.request(Quote(id=13))
        with pytest.raises(RequestTimeout):
            await asker.request(Quote(id=1), "nobody", timeout=0.01)
        await service.settled()
        assert service.replied(Price) == [Price(amount=4), Price(amount=4)]
        with pytest.raises(FeatureError, match="'http' has no exchanges"):
            await asker.publish(OrderPlaced(id=1))


async def test_transactions_gather_and_exchanges_are_those_of_the_bus() -> None:
    printers, bus = Exchange("printers", type="direct"), Bus("office", url=NOWHERE)
    bus.register(PlaceOrder, lambda command: command.id, exchange=printers)
    async with Harness(bus) as service:
        with pytest.raises(ValueError, match="no"):
            async with bus.transaction():
                await bus.send(PlaceOrder(id=1), "office")
                raise ValueError("no")
        async with bus.transaction():
            await bus.send(PlaceOrder(id=2), "office", exchange=printers)
            await bus.send(PlaceOrder(id=3), "other", exchange=printers)
        await service.settled()
        assert service.results() == [2]
        assert service.sent() == [{"id": 2}, {"id": 3}]


async def test_to_start_and_stop_does_nothing_here_and_everything_again_afterwards() -> None:
    bus = Bus("orders", url="asyncio://")
    bus.register(PlaceOrder, lambda command: command.id)
    async with Harness(bus) as service:
        async with bus:
            await bus.send(PlaceOrder(id=1))
            await bus.declare()
        await service.settled()
        assert service.results() == [1]
    async with bus:
        assert await bus.request(PlaceOrder(id=2), "orders") == 2


async def test_a_bus_in_it_twice_or_a_queue_of_two_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="both routed from 'orders'"):
        Harness(shop(), shop())


async def test_what_waits_by_delay_waits_where_it_shall() -> None:
    bus, at = Bus("orders", url=NOWHERE), list[float]()

    @bus.handler
    async def place(command: PlaceOrder) -> None:
        at.append(asyncio.get_running_loop().time())

    async with Harness(bus, delays=True) as service:
        begun = asyncio.get_running_loop().time()
        await bus.defer(PlaceOrder(id=1), delay=0.1)
        await service.settled()
        assert at[0] - begun >= 0.099
        assert service.deferred() == [{"id": 1}]
