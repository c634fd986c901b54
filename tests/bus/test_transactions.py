"""Transactions: in order, all or nothing; inside a handler by themselves; what a refused message means there."""

import asyncio
from typing import Any

import pytest

from streamtools import Bus, Delivery, Message, MessageContext, RemoteError, Retry, SendError
from streamtools.testing.waiting import eventually, reaches
from tests.bus.conftest import SOON, MakeBus
from tests.bus.contracts import Bill, OrderPlaced, PlaceOrder

SINK = "sink"


@pytest.fixture
async def bus(make: MakeBus) -> Bus:
    """A bus that sends into a queue without handlers."""
    await make(SINK, subscriptions=["#"]).declare()
    return make("orders")


def numbers(messages: list[Message]) -> list[int]:
    """The bodies."""
    return [int(message.body) for message in messages]


class TestBlocks:
    async def test_a_hundred_arrive_in_the_order_they_were_made(self, bus: Bus, waiting: Any) -> None:
        async with bus.transaction() as tx:
            for n in range(100):
                await (tx.publish(n, "a.b") if n % 3 else tx.send(n, SINK))
        assert numbers(await waiting(SINK, 100)) == list(range(100))

    async def test_one_that_raises_after_99_sends_nothing(self, bus: Bus, depth: Any, waiting: Any) -> None:
        with pytest.raises(ValueError, match="the hundredth"):
            async with bus.transaction():
                for n in range(99):
                    await bus.send(n, SINK)
                raise ValueError("the hundredth")
        assert await depth(SINK) == 0
        await bus.send(100, SINK)
        assert numbers(await waiting(SINK, 1)) == [100]

    async def test_one_that_is_cancelled_sends_nothing(self, bus: Bus, depth: Any) -> None:
        inside = asyncio.Event()

        async def work() -> None:
            async with bus.transaction():
                await bus.send(1, SINK)
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await depth(SINK) == 0

    async def test_nothing_leaves_before_its_end_but_what_is_to_leave_at_once(self, bus: Bus, waiting: Any) -> None:
        async with bus.transaction():
            await bus.send(1, SINK)
            await bus.send(2, SINK, immediately=True)
            await bus.publish(3, "a", immediately=True)
            await bus.defer(4, delay=0.01, to=SINK, immediately=True)
            assert numbers(await waiting(SINK, 3)) == [2, 3, 4]
        assert numbers(await waiting(SINK, 1)) == [1]

    async def test_a_block_inside_another_leaves_with_it(self, bus: Bus, waiting: Any, depth: Any) -> None:
        async with bus.transaction():
            await bus.send(1, SINK)
            with pytest.raises(ValueError, match="inner"):
                async with bus.transaction():
                    await bus.send(2, SINK)
                    raise ValueError("inner")
            async with bus.transaction():
                await bus.send(3, SINK)
            assert await depth(SINK) == 0
            await bus.send(4, SINK)
        assert numbers(await waiting(SINK, 3)) == [1, 3, 4]

    async def test_belongs_to_its_task(self, bus: Bus, waiting: Any) -> None:
        async def another() -> None:
            await started.wait()
            await bus.send(2, SINK)

        started = asyncio.Event()
        task = asyncio.create_task(another())
        async with bus.transaction():
            await bus.send(1, SINK)
            started.set()
            await task
            assert numbers(await waiting(SINK, 1)) == [2]
        assert numbers(await waiting(SINK, 1)) == [1]

    async def test_a_task_that_is_started_within_it_has_part_in_it(self, bus: Bus, waiting: Any, depth: Any) -> None:
        async with bus.transaction():
            await asyncio.gather(bus.send(1, SINK), bus.send(2, SINK))
            assert await depth(SINK) == 0
        assert numbers(await waiting(SINK, 2)) == [1, 2]

    async def test_what_is_sent_after_its_end_by_a_task_of_it_leaves_at_once(self, bus: Bus, waiting: Any) -> None:
        over = asyncio.Event()

        async def later() -> None:
            await over.wait()
            await bus.send(2, SINK)

        async with bus.transaction():
            task = asyncio.create_task(later())
        over.set()
        await task
        assert numbers(await waiting(SINK, 1)) == [2]

    async def test_some_that_are_refused_are_named_and_the_others_are_held(self, bus: Bus, depth: Any) -> None:
        with pytest.raises(SendError) as caught:
            async with bus.transaction():
                await bus.send(1, SINK)
                refused = await bus.send(2, "nowhere")
        assert refused.id in caught.value.refused

    async def test_what_another_bus_sends_meanwhile_leaves_at_the_end_too_by_its_own_way(
        self, bus: Bus, make: MakeBus, waiting: Any, depth: Any
    ) -> None:
        ways: list[str] = []

        async def seen(message: Message, call_next: Any) -> None:
            ways.append(message.source or "")
            await call_next(message)

        other = make("other", outgoing=[seen])
        with pytest.raises(ValueError, match="no"):
            async with bus.transaction():
                await other.send(1, SINK)
                raise ValueError("no")
        async with bus.transaction():
            await other.send(2, SINK)
            await bus.send(3, SINK)
            async with bus.transaction():
                await other.send(4, SINK)
            assert await depth(SINK) == 0
        assert sorted(numbers(await waiting(SINK, 3))) == [2, 3, 4]
        assert ways == ["other", "other"]


class TestHandlers:
    """Inside a handler a transaction is the default."""

    async def test_one_that_fails_twice_and_then_succeeds_has_sent_its_messages_once(
        self, bus: Bus, make: MakeBus, waiting: Any, nothing_waits: Any
    ) -> None:
        ids: list[list[str]] = []
        service = make("service", retry=SOON)

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            receipts = [await context.send(1, SINK), await service.publish(2, "a.b")]
            receipts.append(await service.defer(3, delay=0.01, to=SINK))
            async with service.transaction():
                receipts.append(await service.send(4, SINK))
            ids.append([receipt.id for receipt in receipts])
            if context.attempt < 3:
                raise ValueError("not yet")

        await service.start()
        await bus.send(PlaceOrder(id=1), "service")
        found = await waiting(SINK, 4)
        await nothing_waits("service")
        assert sorted(numbers(found)) == [1, 2, 3, 4]
        assert [n for n in numbers(found) if n != 3] == [1, 2, 4]
        assert len(ids) == 3 and ids[0] == ids[1] == ids[2]
        assert len(set(ids[0])) == 4
        assert {message.id for message in found} == set(ids[0])
        await nothing_waits(SINK)

    async def test_what_is_to_leave_at_once_leaves_with_each_attempt_under_one_id(
        self, bus: Bus, make: MakeBus, waiting: Any
    ) -> None:
        service = make("service", retry=Retry(retries=1, delay=0, jitter=0))

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            await service.send(context.attempt, SINK, immediately=True)
            if context.attempt == 1:
                raise ValueError("once")

        await service.start()
        await bus.send(PlaceOrder(id=1), "service")
        found = await waiting(SINK, 2)
        assert numbers(found) == [1, 2]
        assert len({message.id for message in found}) == 1

    async def test_handlers_of_one_event_send_under_different_ids(self, make: MakeBus, waiting: Any) -> None:
        service = make("service")
        await make(SINK).declare()

        @service.handler
        async def one(event: OrderPlaced, context: MessageContext) -> None:
            context.send(1, SINK)

        @service.handler
        async def two(event: OrderPlaced, context: MessageContext) -> None:
            context.send(2, SINK)

        await service.start()
        await service.publish(OrderPlaced(id=1))
        assert len({message.id for message in await waiting(SINK, 2)}) == 2

    async def test_another_bus_used_inside_a_handler_sends_when_it_has_succeeded(
        self, bus: Bus, make: MakeBus, waiting: Any
    ) -> None:
        service, other = make("service", retry=SOON), make(None, client_id="other")

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            await other.send(context.attempt, SINK)
            if context.attempt < 3:
                raise ValueError("not yet")

        await service.start()
        await bus.send(PlaceOrder(id=1), "service")
        [message] = await waiting(SINK, 1)
        assert (numbers([message]), message.source) == ([3], "other")

    @pytest.mark.parametrize("what", ["nobody hears it", "no such queue", "by another bus"])
    async def test_what_is_refused_has_the_message_retried_and_then_rejected(
        self, bus: Bus, make: MakeBus, waiting: Any, failed: Any, nothing_waits: Any, what: str
    ) -> None:
        attempts: list[int] = []
        service, other = make("service", retry=SOON), make(None)

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            attempts.append(context.attempt)
            if what == "nobody hears it":
                context.publish(OrderPlaced(id=1))
            elif what == "no such queue":
                context.send(1, "nowhere")
            else:
                await other.send(1, "nowhere")

        await service.start()
        await bus.unsubscribe("#", queue=SINK)  # which would hear it
        await bus.send(PlaceOrder(id=1), "service")
        await bus.send(PlaceOrder(id=2), "service")
        found = await failed(2)
        await nothing_waits("service")
        assert sorted(attempts) == [1, 1, 2, 2, 3, 3]
        for message in found:
            assert message.error.exception.endswith("SendError")
            assert "No queue is bound" in message.error.reason or "'nowhere'" in message.error.reason

    async def test_a_refused_message_of_one_handler_leaves_its_siblings_alone(
        self, make: MakeBus, waiting: Any, failed: Any, nothing_waits: Any
    ) -> None:
        runs: list[str] = []
        service = make("service", retry=SOON)
        await make(SINK).declare()

        @service.handler
        async def works(event: OrderPlaced, context: MessageContext) -> None:
            runs.append("works")
            context.send(1, SINK)

        @service.handler
        async def fails(event: OrderPlaced, context: MessageContext) -> None:
            runs.append("fails")
            context.send(2, "nowhere")

        @service.handler
        async def raises(event: OrderPlaced, context: MessageContext) -> None:
            runs.append("raises")
            if context.attempt == 1:
                raise ValueError("once")

        await service.start()
        await service.publish(OrderPlaced(id=1))
        [message] = await failed(1)
        await nothing_waits("service")
        assert message.handler is not None and message.handler.endswith("fails")
        assert [runs.count(name) for name in ("works", "fails", "raises")] == [1, 3, 2]
        assert numbers(await waiting(SINK, 1)) == [1]

    async def test_many_refused_at_once_are_each_retried_and_rejected(
        self, bus: Bus, make: MakeBus, failed: Any, nothing_waits: Any
    ) -> None:
        service = make("service", concurrency=20, retry=Retry(retries=1, delay=0, jitter=0))

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            context.send(command.id, "nowhere" if command.id % 2 else SINK)

        await service.start()
        async with bus.transaction():
            for n in range(60):
                await bus.send(PlaceOrder(id=n), "service")
        assert len(await failed(30)) == 30
        await nothing_waits("service")

    async def test_a_request_whose_handler_sends_nowhere_is_answered(self, bus: Bus, make: MakeBus) -> None:
        service = make("service")

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> int:
            context.send(1, "nowhere")
            return 5

        await service.start()
        with pytest.raises(RemoteError, match="SendError"):
            await bus.request(PlaceOrder(id=1), "service", timeout=20)

    @pytest.mark.parametrize("how", ["by hand", "on receive"])
    async def test_where_the_acknowledgement_is_given_already_it_leaves_at_once(
        self, bus: Bus, make: MakeBus, waiting: Any, how: str
    ) -> None:
        service = make("service", **({"ack": "on_receive"} if how == "on receive" else {}))

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext, delivery: Delivery) -> None:
            context.send(1, SINK)
            if how == "by hand":
                await delivery.ack()
            context.send(2, SINK)

        await service.start()
        await bus.send(PlaceOrder(id=1), "service")
        assert numbers(await waiting(SINK, 2)) == [1, 2]

    async def test_messages_leave_before_theirs_is_acknowledged(self, make: MakeBus, nothing_waits: Any) -> None:
        """A chain of handlers: each hop is there once the one before is done."""
        seen: list[int] = []
        service = make("orders", concurrency=4)
        billing = make("billing", concurrency=4)

        @service.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            context.send(Bill(id=command.id))

        @billing.handler
        async def bill(command: Bill, context: MessageContext) -> None:
            seen.append(command.id)
            if command.id < 50:
                context.send(PlaceOrder(id=command.id + 1))

        await service.start()
        await billing.start()
        await service.send(PlaceOrder(id=1))
        await reaches(seen, 50)
        await nothing_waits("orders")
        await eventually(lambda: seen == list(range(1, 51)))
