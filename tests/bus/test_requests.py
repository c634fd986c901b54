"""Replies and requests: who has which answer, and what is said where none comes."""

import asyncio
import logging
from typing import Any

import pytest
from pydantic import BaseModel

from streamtools import (
    ADMINS,
    Bus,
    Closed,
    Handler,
    Message,
    MessageContext,
    Producer,
    QueueError,
    RemoteError,
    RequestTimeout,
    Retry,
    SendError,
)
from streamtools.producer import PRODUCERS
from streamtools.testing.waiting import eventually, reaches
from tests.bus.conftest import MakeBus
from tests.bus.contracts import PlaceOrder, Price, Quote


class TestReply:
    async def test_what_is_sent_names_the_bus_s_queue_and_the_reply_comes_there(self, make: MakeBus) -> None:
        answers: list[Any] = []
        orders, prices = make("orders"), make("prices")

        @prices.handler
        async def quote(command: Quote, context: MessageContext) -> None:
            await context.reply({"price": command.id}, headers={"by": "prices"}, type="prices.Answer")

        @orders.handler(type="prices.Answer")
        async def answered(data: dict[str, int], context: MessageContext) -> None:
            answers.append((data, dict(context.headers), context.message))

        await prices.start()
        await orders.start()
        sent = await orders.send(Quote(id=5))
        await reaches(answers, 1)
        data, headers, message = answers[0]
        assert (data, headers) == ({"price": 5}, {"by": "prices"})
        assert (message.causation_id, message.correlation_id, message.intent) == (sent.id, sent.id, "reply")

    async def test_publish_and_defer_name_it_too(self, make: MakeBus, waiting: Any) -> None:
        bus = make("orders", subscriptions=["#"])
        await bus.start()
        await bus.publish({}, "a")
        await bus.defer(PlaceOrder(id=1), delay=0.01)
        assert [m.reply_to for m in await waiting("orders", 2)] == ["orders", "orders"]

    async def test_a_bus_that_only_sends_names_none_so_a_reply_is_an_error(self, make: MakeBus, failed: Any) -> None:
        bus = make("orders")

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            await bus.reply("done")

        await bus.start()
        await make(None).send(PlaceOrder(id=1))
        [message] = await failed(1)
        assert "has no reply-to" in message.error.reason

    async def test_to_a_queue_that_has_gone_never_fails_the_handler(
        self, make: MakeBus, url: str, nothing_waits: Any
    ) -> None:
        seen: list[Any] = []
        bus = make("orders")

        @bus.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            context.reply("done")
            seen.append(context.attempt)

        await bus.start()
        async with Producer("orders", url=url) as producer:
            await producer.send(PlaceOrder(id=1), type="orders.PlaceOrder", reply_to="gone")
        await reaches(seen, 1)
        await nothing_waits("orders")
        assert seen == [1]


class Answer(BaseModel):
    price: float


class TestRequest:
    async def test_what_the_handler_returns_or_replies_is_the_answer(self, make: MakeBus) -> None:
        prices = make("prices")

        @prices.handler
        async def quote(command: Quote, context: MessageContext) -> Any:
            if command.id == 1:
                return Price(amount=1.5)
            if command.id == 2:
                await context.reply({"price": 2.5})
            return None

        await prices.start()
        asker = make(None)
        assert await asker.request(Quote(id=1)) == {"amount": 1.5}
        asker.route(Quote, "prices")
        assert await asker.request(Quote(id=2), returns=Answer) == Answer(price=2.5)
        assert await asker.request(Quote(id=3)) is None

    @pytest.mark.parametrize("how", ["context", "bus", "transaction"])
    async def test_a_handler_that_replies_itself_has_replied(self, make: MakeBus, how: str) -> None:
        sent: list[str | None] = []

        async def note(message: Message, call_next: Handler) -> None:
            sent.append(message.intent)
            await call_next(message)

        prices = make("prices", outgoing=[note])

        @prices.handler
        async def quote(command: Quote, context: MessageContext) -> int:
            if how == "context":
                context.reply(1)
            elif how == "bus":
                await prices.reply(1)
            else:
                async with prices.transaction():
                    await prices.reply(1)
            return 2

        await prices.start()
        assert await make(None).request(Quote(id=1), timeout=20) == 1
        assert sent == ["reply"]

    async def test_a_failure_that_cannot_be_answered_is_in_the_error_queue_all_the_same(
        self, make: MakeBus, failed: Any
    ) -> None:
        async def mute(message: Message, call_next: Handler) -> None:
            raise PermissionError("not a word")

        prices = make("prices", outgoing=[mute])

        @prices.handler
        async def quote(command: Quote) -> None:
            raise ValueError("unlucky")

        await prices.start()
        asking = asyncio.create_task(make(None).request(Quote(id=1), timeout=60))
        [message] = await failed(1)
        asking.cancel()
        assert message.error.reason == "unlucky"

    async def test_the_reply_queue_goes_with_the_bus(self, make: MakeBus, url: str) -> None:
        prices, asker = make("prices"), make(None)
        prices.register(Quote, lambda command: command.id)
        await prices.start()
        await asker.request(Quote(id=1), timeout=20)
        await asker.stop()
        async with ADMINS[PRODUCERS.protocol(url)](url=url) as admin:
            with pytest.raises(QueueError):
                await admin.stats(asker._transport.connections.here().requests.queue)

    async def test_a_contract_that_the_asker_knows_is_the_type_of_the_answer(self, make: MakeBus) -> None:
        prices, orders = make("prices"), make("orders")
        prices.register(Quote, lambda command: Price(amount=command.id))
        orders.register(Price, lambda event: None)
        await prices.start()
        await orders.start()
        assert await orders.request(Quote(id=4)) == Price(amount=4)

    async def test_the_reply_queue_of_a_long_name_has_a_name_too(self) -> None:
        name = "ä" * 127
        async with Bus(name, url="asyncio://") as bus:
            assert len(bus._transport.connections.here().requests.queue.encode()) <= 255
            with pytest.raises(RequestTimeout):
                await bus.request({}, name, timeout=0.01)

    async def test_many_at_once_each_have_their_own_answer(self, make: MakeBus) -> None:
        prices = make("prices", concurrency=10)
        prices.register(Quote, lambda command: command.id * 2)
        await prices.start()
        asker = make(None)
        answers = await asyncio.gather(*(asker.request(Quote(id=n), timeout=60) for n in range(1000)))
        assert answers == [n * 2 for n in range(1000)]

    async def test_a_handler_that_failed_for_good_is_told(self, make: MakeBus) -> None:
        runs: list[int] = []
        prices = make("prices", failure_texts=True)

        @prices.handler
        async def quote(command: Quote) -> None:
            runs.append(command.id)
            raise ValueError("unlucky")

        await prices.start()
        asker = make(None)
        with pytest.raises(RemoteError, match="failed at 'prices': ValueError: unlucky") as caught:
            await asker.request(Quote(id=13))
        assert (caught.value.exception, caught.value.reason) == ("ValueError", "unlucky")
        with pytest.raises(RemoteError, match="There is no handler for 'nonsense'"):
            await asker.request({"id": 1}, "prices", type="nonsense")
        assert runs == [13]

    async def test_where_nobody_answers_it_times_out(self, make: MakeBus) -> None:
        await make("prices").declare()
        echo, asker = make("echo"), make(None)
        echo.register(Quote, lambda command: command.id)
        await echo.start()
        assert await asker.request(Quote(id=5), "echo", timeout=60) == 5  # the reply queue is there
        with pytest.raises(RequestTimeout, match=r"No reply from 'prices' within 0\.5 s"):
            await asker.request(Quote(id=1), timeout=0.5)
        with pytest.raises(SendError, match="no (queue|topic) 'nowhere'"):
            await make(None).request(Quote(id=1), "nowhere", timeout=20)

    async def test_one_that_nobody_waits_for_any_more_is_not_handled(self, make: MakeBus) -> None:
        seen: list[Any] = []
        prices = make("prices")
        await prices.declare()
        with pytest.raises(RequestTimeout):
            await make(None).request(Quote(id=1), timeout=0.2)
        prices.register(Quote, seen.append)
        await prices.start()
        await prices.send(Quote(id=2))
        await reaches(seen, 1)
        assert seen == [Quote(id=2)]

    async def test_a_late_reply_is_dropped_with_a_log_line(
        self, make: MakeBus, caplog: pytest.LogCaptureFixture
    ) -> None:
        begun, go = asyncio.Event(), asyncio.Event()
        prices = make("prices", concurrency=2)

        @prices.handler
        async def quote(command: Quote) -> int:
            if command.id == 1:
                begun.set()
                await go.wait()
            return command.id

        await prices.start()
        asker = make("asker")
        with caplog.at_level(logging.INFO, "streamtools"):
            asking = asyncio.create_task(asker.request(Quote(id=1), timeout=60))
            await begun.wait()
            asking.cancel()  # as a timeout does, at a time of our choice
            go.set()
            await eventually(lambda: "A reply came late and is dropped" in caplog.text)
        assert await asker.request(Quote(id=2), timeout=20) == 2

    async def test_one_that_is_given_up_takes_nothing_from_the_others(self, make: MakeBus) -> None:
        prices = make("prices")
        prices.register(Quote, lambda command: command.id)
        await prices.start()
        asker = make(None)
        first = asyncio.create_task(asker.request(Quote(id=1)))
        second = asyncio.create_task(asker.request(Quote(id=2), timeout=20))
        await asyncio.sleep(0)
        first.cancel()  # while the reply queue is being made
        assert await second == 2
        with pytest.raises(asyncio.CancelledError):
            await first

    async def test_who_waits_when_the_bus_is_stopped_is_told(self, make: MakeBus) -> None:
        await make("prices").declare()
        asker = make("asker")
        waiting = asyncio.create_task(asker.request(Quote(id=1), timeout=60))
        requests = asker._transport.connections.here().requests
        await eventually(lambda: requests._consumer is not None and requests._consumer.connected)
        await asker.stop()
        with pytest.raises(Closed):
            await waiting
        await asker.start()

    async def test_a_late_reply_is_not_for_another_question_of_the_next_attempt(
        self, make: MakeBus, caplog: pytest.LogCaptureFixture
    ) -> None:
        prices, orders = make("prices", concurrency=2), make("orders", retry=Retry(retries=1, delay=0, jitter=0))
        answers: list[Any] = []
        begun, asked_again, dropped = asyncio.Event(), asyncio.Event(), asyncio.Event()

        @prices.handler
        async def quote(command: Quote) -> int:
            if command.id == 1:
                begun.set()
                await asked_again.wait()
            else:
                asked_again.set()
                await dropped.wait()
            return command.id

        @orders.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            asking = asyncio.create_task(orders.request(Quote(id=context.attempt), timeout=60))
            if context.attempt == 1:
                await begun.wait()
                asking.cancel()  # as a timeout does, at a time of our choice
            answers.append(await asking)

        await prices.start()
        await orders.start()
        with caplog.at_level(logging.INFO, "streamtools"):
            await orders.send(PlaceOrder(id=1))
            await eventually(lambda: answers or "A reply came late and is dropped" in caplog.text)
        dropped.set()
        await reaches(answers, 1)
        assert answers == [2]

    async def test_inside_a_handler_it_leaves_at_once(self, make: MakeBus) -> None:
        prices, orders, seen = make("prices"), make("orders"), []
        prices.register(Quote, lambda command: command.id * 2)

        @orders.handler
        async def place(command: PlaceOrder, bus: Bus) -> None:
            seen.append(await bus.request(Quote(id=command.id)))

        await prices.start()
        await orders.start()
        await orders.send(PlaceOrder(id=21))
        await reaches(seen, 1)
        assert seen == [42]
