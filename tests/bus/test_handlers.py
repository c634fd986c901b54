"""Handlers: several for an event, what their context is, and what becomes of their failures."""

import asyncio
import inspect
import socket
from typing import Any

import pytest

from streamtools import (
    ADMINS,
    Bus,
    ConfigurationError,
    ConsumerRunner,
    Delivery,
    Drop,
    FeatureError,
    HandlerError,
    Message,
    MessageContext,
    Producer,
    Reject,
    Retry,
    Verdict,
)
from streamtools.producer import PRODUCERS
from streamtools.redrive import redrive
from streamtools.testing.waiting import eventually, reaches
from streamtools.verdicts import ACK, DROP
from tests.bus.conftest import SOON, MakeBus
from tests.bus.contracts import OrderPlaced, PlaceOrder, Quote


class TestSeveral:
    async def test_each_is_retried_by_itself(self, make: MakeBus, nothing_waits: Any) -> None:
        runs: list[tuple[str, int]] = []
        bus = make(retry=SOON)

        @bus.handler
        async def works(event: OrderPlaced, context: MessageContext) -> None:
            runs.append(("works", context.attempt))

        @bus.handler
        async def fails_once(event: OrderPlaced, context: MessageContext) -> None:
            runs.append(("fails once", context.attempt))
            if context.attempt == 1:
                raise ValueError("once")

        @bus.handler
        def fails_twice(event: OrderPlaced, context: MessageContext) -> None:
            runs.append(("fails twice", context.attempt))
            if context.attempt < 3:
                raise ValueError("twice")

        await bus.start()
        await bus.publish(OrderPlaced(id=1))
        await reaches(runs, 6)
        await nothing_waits("orders")
        assert sorted(runs) == [
            ("fails once", 1), ("fails once", 2),
            ("fails twice", 1), ("fails twice", 2), ("fails twice", 3),
            ("works", 1),
        ]  # fmt: skip

    @pytest.mark.parametrize("at", ["one", "two"])
    async def test_stopping_in_the_midst_gives_back_what_is_not_done(
        self, make: MakeBus, nothing_waits: Any, at: str
    ) -> None:
        begun, stopped, runs = asyncio.Event(), False, list[str]()
        bus = make()

        async def run(name: str) -> None:
            runs.append(name)
            if name == at and not stopped:
                begun.set()
                await asyncio.Event().wait()

        @bus.handler
        async def one(event: OrderPlaced) -> None:
            await run("one")

        @bus.handler
        async def two(event: OrderPlaced) -> None:
            await run("two")

        async with ConsumerRunner(bus, shutdown_timeout=0.1):
            await bus.publish(OrderPlaced(id=1))
            await begun.wait()
        stopped, before = True, [*runs]
        await bus.start()
        done = {"one"} if at == "two" else set[str]()
        await eventually(lambda: set(runs[len(before) :]) == {"one", "two"} - done)
        await nothing_waits("orders")
        assert runs.count("one") == (1 if at == "two" else 2)

    async def test_redrive_runs_only_the_handler_that_failed(
        self, make: MakeBus, url: str, nothing_waits: Any, depth: Any
    ) -> None:
        runs: list[str] = []
        mended = False
        bus = make()

        @bus.handler
        async def works(event: OrderPlaced) -> None:
            runs.append("works")

        @bus.handler
        async def broken(event: OrderPlaced, context: MessageContext) -> None:
            runs.append("broken")
            if not mended:
                raise ValueError("broken")

        await bus.start()
        sent = await bus.publish(OrderPlaced(id=1), headers={"tenant": "a"})

        async def one_failed() -> bool:
            return await depth("error") == 1

        await eventually(one_failed)
        mended = True
        async with ADMINS[PRODUCERS.protocol(url)](url=url) as admin:
            [message] = await admin.peek("error")
            assert message.handler is not None and message.handler.endswith("broken")
            assert message.error is not None and message.error.handler == message.handler
            assert (message.id, message.correlation_id, dict(message.headers)) == (sent.id, sent.id, {"tenant": "a"})
            assert await redrive(admin, "error", failed_in=["orders"]) == 1
        await reaches(runs, 3)
        await nothing_waits("orders")
        assert runs == ["works", "broken", "broken"]

    async def test_two_that_fail_leave_two_copies_each_for_its_own(self, make: MakeBus, failed: Any) -> None:
        bus = make()

        @bus.handler
        async def one(event: OrderPlaced) -> None:
            raise ValueError("one")

        @bus.handler
        async def two(event: OrderPlaced) -> None:
            raise KeyError("two")

        await bus.start()
        sent = await bus.publish(OrderPlaced(id=1))
        found = await failed(2)
        assert {m.id for m in found} == {sent.id}
        assert {m.handler.rpartition(".")[2]: m.error.exception for m in found} == {
            "one": "ValueError",
            "two": "KeyError",
        }

    async def test_each_has_its_own_policy(self, make: MakeBus, failed: Any) -> None:
        runs: list[str] = []
        bus = make(retry=Retry(retries=1, delay=0, jitter=0))

        @bus.handler(retry=Retry(retries=3, delay=0, jitter=0))
        async def often(event: OrderPlaced) -> None:
            runs.append("often")
            raise ValueError

        @bus.handler
        async def twice(event: OrderPlaced) -> None:
            runs.append("twice")
            raise ValueError

        await bus.start()
        await bus.publish(OrderPlaced(id=1))
        await failed(2)
        assert (runs.count("often"), runs.count("twice")) == (4, 2)

    async def test_a_copy_for_a_handler_that_was_renamed_is_for_all(self, make: MakeBus, url: str) -> None:
        seen: list[str] = []
        bus = make()

        @bus.handler
        async def one(event: OrderPlaced) -> None:
            seen.append("one")

        @bus.handler
        async def two(event: OrderPlaced) -> None:
            seen.append("two")

        await bus.start()
        async with Producer("orders", url=url) as producer:
            await producer.send_messages(
                [Message(body=b'{"id":1}', queue="orders", id="1", type="orders.OrderPlaced", handler="gone")]
            )
        await eventually(lambda: sorted(seen) == ["one", "two"])

    @pytest.mark.parametrize("how", ["a Delivery", "manual"])
    async def test_none_of_them_settles_the_message_of_all_by_hand(self, make: MakeBus, how: str) -> None:
        bus = make(**({"ack": "manual"} if how == "manual" else {}))

        async def one(event: OrderPlaced, delivery: Delivery) -> None: ...
        async def two(event: OrderPlaced) -> None: ...

        class Three:
            async def handle(self, event: OrderPlaced) -> None: ...

        for handler in (two, Three, *([one] if how == "a Delivery" else [])):
            bus.register(OrderPlaced, handler)
        with pytest.raises(ConfigurationError, match="settles it by hand: take Message instead of Delivery"):
            await bus.start()

    async def test_where_a_failed_message_stays_with_its_sender_there_is_one(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            bus = Bus("orders", url=f"http://127.0.0.1:{free.getsockname()[1]}")

        @bus.handler
        async def one(data: dict[str, int]) -> None: ...
        @bus.handler
        async def two(data: dict[str, int]) -> None: ...

        with pytest.raises(FeatureError, match="one and .*two both handle what has no other handler"):
            await bus.start()

    async def test_copies_for_several_handlers_are_each_run_over_a_lost_connection(self) -> None:
        """Their ids and attempts are the same: what one made of its copy is not taken for the other's."""
        from streamtools.engine.settler import _name

        message = Message(body=b"", queue="q", id="1", attempt=2)
        assert _name(message.replace(handler="one")) != _name(message.replace(handler="two"))


class TestContext:
    @pytest.mark.parametrize("kind", ["async", "def"])
    async def test_knows_its_message_and_sends_on(self, make: MakeBus, waiting: Any, kind: str) -> None:
        seen: list[Any] = []
        bus = make(client_id="orders-1", subscriptions=["other.#"])
        await make("billing", subscriptions=["orders.#"]).declare()

        def work(context: MessageContext) -> None:
            seen.append(
                (dict(context.headers), context.correlation_id, context.source, context.attempt, context.message)
            )
            context.send({"n": 1}, "billing")
            context.publish(OrderPlaced(id=2))
            context.defer({"n": 3}, delay=0.01, to="billing")
            context.reply({"n": 4})

        if kind == "def":

            @bus.handler
            def place(command: PlaceOrder, context: MessageContext) -> None:
                work(context)
        else:

            @bus.handler
            async def place_async(command: PlaceOrder, context: MessageContext) -> None:
                work(context)
                assert (await context.send({"n": 5}, "billing")).queue == "billing"

        await bus.start()
        asker = make("asker")
        await asker.declare()
        sent = await asker.send(PlaceOrder(id=1), "orders", headers={"a": "b"})
        await reaches(seen, 1)
        headers, correlation, source, attempt, message = seen[0]
        assert (headers, correlation, source, attempt) == ({"a": "b"}, sent.id, "asker", 1)
        found = [*await waiting("billing", 3 if kind == "def" else 4), *await waiting("asker", 1)]
        assert {m.causation_id for m in found} == {sent.id}
        assert {m.correlation_id for m in found} == {sent.id}
        assert {m.source for m in found} == {"orders-1"}

    async def test_its_verbs_have_the_parameters_of_the_bus_s(self) -> None:
        for verb in ("send", "publish", "defer", "reply"):
            own, bus_s = (inspect.signature(getattr(cls, verb)).parameters for cls in (MessageContext, Bus))
            assert [*own] == [name for name in bus_s if name != "immediately"]

    async def test_publishes_to_nobody_where_the_bus_may(self, make: MakeBus, nothing_waits: Any, depth: Any) -> None:
        seen: list[int] = []
        bus = make(mandatory=False)

        @bus.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            context.publish(OrderPlaced(id=1))
            seen.append(context.attempt)

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        await reaches(seen, 1)
        await nothing_waits("orders")
        assert await depth("error") == 0

    async def test_after_its_handler_it_sends_no_more(self, make: MakeBus) -> None:
        kept: list[MessageContext] = []
        bus = make()

        @bus.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            kept.append(context)

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        await reaches(kept, 1)
        with pytest.raises(HandlerError, match="has ended"):
            kept[0].send({"n": 1}, "orders")

    @pytest.mark.parametrize("verb", ["send", "publish", "reply"])
    async def test_the_rules_hold_here_too(self, make: MakeBus, failed: Any, verb: str) -> None:
        bus = make()

        @bus.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            if verb == "send":
                context.send(OrderPlaced(id=1), "orders")
            elif verb == "publish":
                context.publish(PlaceOrder(id=1))
            else:
                context.reply("x")

        await bus.start()
        await make(None).send(PlaceOrder(id=1))
        [message] = await failed(1)
        texts = {"send": "an event is not sent", "publish": "a command is not published", "reply": "has no reply-to"}
        assert texts[verb] in message.error.reason


class TestHeaders:
    async def test_a_conversation_keeps_its_correlation_and_each_message_its_cause(
        self, make: MakeBus, depth: Any, url: str
    ) -> None:
        seen: dict[str, Message] = {}
        orders = make("orders", retry=Retry(retries=1, delay=0, jitter=0))
        billing = make("billing")
        broken = True

        @orders.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            seen["placed"] = context.message
            if context.attempt == 1:
                raise ValueError
            await orders.publish(OrderPlaced(id=1), headers={"step": "2"})

        @billing.handler
        async def bill(event: OrderPlaced, context: MessageContext) -> None:
            seen["billed"] = context.message
            await context.defer(Quote(id=1), delay=0.05, to="billing")

        @billing.handler
        async def quote(command: Quote, context: MessageContext) -> None:
            seen["quoted"] = context.message
            if broken:
                raise ValueError("broken")
            await context.reply({"price": 1})

        @billing.handler(type="x.Paid")
        async def paid(data: dict[str, int]) -> None: ...

        @billing.handler
        async def answered(data: dict[str, int], message: Message) -> None:
            seen["answered"] = message

        await orders.start()
        await billing.start()
        first = await orders.send(PlaceOrder(id=1))

        async def one_failed() -> bool:
            return await depth("error") == 1

        await eventually(one_failed)
        broken = False
        async with ADMINS[PRODUCERS.protocol(url)](url=url) as admin:
            [rejected] = await admin.peek("error")
            assert await redrive(admin, "error", failed_in=["billing"]) == 1
        await eventually(lambda: "answered" in seen)
        assert {m.correlation_id for m in (*seen.values(), rejected)} == {first.id}
        assert seen["placed"].causation_id is None
        assert seen["billed"].causation_id == seen["placed"].id == first.id
        assert seen["quoted"].causation_id == seen["billed"].id
        assert rejected.id == seen["quoted"].id
        assert seen["answered"].causation_id == seen["quoted"].id
        assert dict(seen["billed"].headers) == {"step": "2"}
        assert seen["quoted"].attempt == 1


class TestFailures:
    async def test_errors_are_matched_by_their_class(self, make: MakeBus, failed: Any) -> None:
        runs: list[str] = []
        soon = {"delay": 0, "jitter": 0}
        bus = make(retry=Retry(retries=1, **soon, errors={
            LookupError: Retry(retries=0), OSError: Retry(retries=3, **soon), TimeoutError: Retry(retries=2, **soon),
        }))  # fmt: skip
        errors: dict[str, type[Exception]] = {
            "key": KeyError,
            "os": OSError,
            "time": TimeoutError,
            "value": ValueError,
        }

        @bus.handler(type="fail")
        async def fail(kind: str) -> None:
            runs.append(kind)
            raise errors[kind]

        await bus.start()
        for kind in errors:
            await bus.send(kind, "orders", type="fail")
        found = {m.error.exception: m.error.attempts for m in await failed(4)}
        assert found == {"KeyError": 1, "OSError": 4, "TimeoutError": 3, "ValueError": 2}
        assert len(runs) == 10

    async def test_signals_mean_what_they_mean_anywhere(self, make: MakeBus, failed: Any, nothing_waits: Any) -> None:
        bus = make(retry=SOON)

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            raise Reject("sold out") if command.id else Drop

        await bus.start()
        await bus.send(PlaceOrder(id=0))
        await bus.send(PlaceOrder(id=1))
        [message] = await failed(1)
        assert message.error.reason == "sold out"
        await nothing_waits("orders")

    @pytest.mark.parametrize(
        ("answer", "left"), [(ACK, 0), (DROP, 0), (Verdict.reject("by me"), 1), (None, 1), ("nonsense", 1)]
    )
    async def test_an_error_handler_decides(
        self, make: MakeBus, depth: Any, nothing_waits: Any, answer: Any, left: int
    ) -> None:
        asked: list[tuple[str | None, str, int]] = []

        async def decide(message: Message, error: BaseException, attempt: int) -> Any:
            asked.append((message.type, str(error), attempt))
            return answer

        bus = make(on_error=decide)

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            raise ValueError("no")

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        await reaches(asked, 1)
        await nothing_waits("orders")

        async def as_expected() -> bool:
            return await depth("error") == left

        await eventually(as_expected)
        assert asked == [("orders.PlaceOrder", "no", 1)]

    async def test_an_error_handler_may_ask_for_a_retry_and_one_that_fails_leaves_it_to_the_policy(
        self, make: MakeBus, failed: Any
    ) -> None:
        attempts: list[int] = []

        async def decide(message: Message, error: BaseException, attempt: int) -> Verdict:
            attempts.append(attempt)
            if attempt < 3:
                return Verdict.retry(0)
            raise RuntimeError("the error handler itself")

        bus = make(on_error=decide)

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            raise ValueError("no")

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        [message] = await failed(1)
        assert attempts == [1, 2, 3]
        assert message.error.exception == "ValueError"


async def test_handlers_run_as_many_at_once_as_asked(make: MakeBus) -> None:
    at_work = asyncio.Semaphore(0)
    go = asyncio.Event()
    bus = make(concurrency=3)

    @bus.handler
    async def place(command: PlaceOrder) -> None:
        at_work.release()
        await go.wait()

    await bus.start()
    for n in range(3):
        await bus.send(PlaceOrder(id=n))
    async with asyncio.timeout(20):
        for _ in range(3):
            await at_work.acquire()
    go.set()
