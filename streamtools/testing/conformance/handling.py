"""Cases of handling: kinds of handlers, concurrency, acknowledgement, stopping."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from streamtools.delivery import Delivery
from streamtools.message import Message
from streamtools.testing.conformance.cases import Cases, except_with
from streamtools.testing.conformance.payloads import Order, Parcel, Payment
from streamtools.testing.conformance.stage import NEVER, Gate, Inbox, Stage, gather
from streamtools.testing.waiting import TIMEOUT, eventually, reaches
from streamtools.types import Handler


class HandlingCases(Cases):
    """The promises of a consumer with a handler."""

    async def test_the_annotation_decides_what_a_handler_is_given(self, stage: Stage) -> None:
        seen: list[Any] = []

        async def model(msg: Order) -> None:
            seen.append(msg)

        async def data(msg: Payment) -> None:
            seen.append(msg)

        async def typed(msg: Parcel) -> None:
            seen.append(msg)

        async def raw(msg: bytes) -> None:
            seen.append(msg)

        sent: list[tuple[Callable[..., Any], Any]] = [
            (model, Order(id=1)),
            (data, Payment(1, 2.5)),
            (typed, {"order": 1, "weight": 2.0}),
            (raw, b"\xff"),
        ]
        for number, (handler, payload) in enumerate(sent, 1):
            async with stage.running(handler):
                await stage.send(payload)
                await reaches(seen, number)
        assert seen == [payload for _, payload in sent]

    async def test_further_parameters_are_filled_by_type(self, stage: Stage) -> None:
        seen: list[Any] = []

        async def handler(msg: int, message: Message, delivery: Delivery, spare: str = "default") -> None:
            seen.append((msg, message.id, delivery.message.id, spare))

        async with stage.running(handler):
            await stage.send(5, id="five")
            await eventually(lambda: seen)
        assert seen == [(5, "five", "five", "default")]

    async def test_a_def_handler_runs_in_a_thread_and_does_not_hold_up_the_loop(self, stage: Stage) -> None:
        go, seen = threading.Event(), []

        def handler(msg: int) -> None:
            assert go.wait(TIMEOUT)
            seen.append((msg, threading.current_thread() is threading.main_thread()))

        async with stage.running(handler, concurrency=4):
            await gather(*(stage.send(number) for number in range(4)))
            go.set()
            await eventually(lambda: len(seen) == 4)
        assert sorted(seen) == [(number, False) for number in range(4)]

    async def test_a_bound_method_is_a_handler(self, stage: Stage) -> None:
        class Service:
            def __init__(self) -> None:
                self.seen: list[int] = []

            async def handle(self, msg: int) -> None:
                self.seen.append(msg)

        service = Service()
        async with stage.running(service.handle):
            await stage.send(1)
            await eventually(lambda: service.seen == [1])

    async def test_middleware_surrounds_the_handler_outermost_first(self, stage: Stage) -> None:
        order: list[str] = []

        async def outer(message: Message, call_next: Handler) -> Any:
            order.append("outer")
            return await call_next(message)

        async def inner(message: Message, call_next: Handler) -> Any:
            order.append("inner")
            return await call_next(message.replace(body=b"changed"))

        async def handler(msg: bytes) -> None:
            order.append(msg.decode())

        async with stage.running(handler, middleware=[outer, inner]):
            await stage.send("original")
            await eventually(lambda: len(order) == 3)
        assert order == ["outer", "inner", "changed"]

    async def test_middleware_that_raises_has_its_message_rejected(self, stage: Stage) -> None:
        async def broken(message: Message, call_next: Handler) -> Any:
            raise RuntimeError("middleware is broken")

        inbox = Inbox()
        async with stage.running(inbox, middleware=[broken], retry=NEVER):
            message = await stage.rejected(await stage.send(1))
        assert inbox.items == []
        assert message is None or (message.error is not None and message.error.reason == "middleware is broken")

    # --- at once --------------------------------------------------------------------------------

    async def test_handlers_run_at_once_up_to_the_concurrency(self, stage: Stage) -> None:
        gate = Gate()
        async with stage.running(gate, concurrency=4):
            for number in range(12):
                await stage.send(number)
            await gate.holds(4)
            for _ in range(20):  # a fifth would have started by now
                await asyncio.sleep(0)
            assert len(gate.entered) == 4
            gate.opened.set()
            await eventually(lambda: len(gate.left) == 12)
        assert sorted(gate.left) == list(range(12))

    async def test_one_at_a_time_is_first_in_first_out(self, stage: Stage) -> None:
        seen: list[int] = []

        async def handler(msg: int) -> None:
            await asyncio.sleep(0)
            seen.append(msg)

        async with stage.running(handler, concurrency=1):
            await stage.send_many(range(100))
            await eventually(lambda: len(seen) == 100)
        assert seen == list(range(100))

    async def test_a_failure_does_not_stop_the_others(self, stage: Stage) -> None:
        seen: list[int] = []
        run: set[int] = set()

        async def handler(msg: int) -> None:
            run.add(msg)
            if msg % 3 == 0:
                raise ValueError(f"{msg} is divisible by 3")
            seen.append(msg)

        async with stage.running(handler, retry=NEVER, concurrency=3):
            await gather(*(stage.send(number) for number in range(12)))
            await eventually(lambda: len(run) == 12 and len(seen) == 8)
        assert sorted(seen) == [n for n in range(12) if n % 3]
        if self.features.error_queue:
            assert sorted(int(m.body or b"") for m in await stage.errors(4)) == [0, 3, 6, 9]

    # --- acknowledging --------------------------------------------------------------------------

    async def test_acknowledged_on_receive_a_failure_changes_nothing(self, stage: Stage) -> None:
        inbox = Inbox(lambda msg: 1 / 0 if msg == "fails" else None)
        async with stage.running(inbox, ack="on_receive"):
            await stage.send("fails")
            await stage.send("works")
            assert await inbox.holds(2) == ["fails", "works"]
        await stage.nothing_waits()

    async def test_acknowledged_on_receive_nothing_comes_back(self, stage: Stage) -> None:
        gate = Gate()
        async with stage.running(gate, ack="on_receive", grace=0.05):
            await stage.send("at most once")
            await gate.holds(1)
        await stage.nothing_waits()
        assert (gate.entered, gate.left) == (["at most once"], [])

    @except_with("reply", "the handler's value is the answer")
    async def test_a_value_that_nobody_waits_for_is_no_failure(self, stage: Stage) -> None:
        inbox = Inbox(lambda msg: object())
        async with stage.running(inbox, retry=NEVER):
            await stage.send("x")
            await inbox.holds(1)
        await stage.nothing_waits()
        await stage.nothing_waits(f"{stage.queue}.error")

    async def test_by_hand_a_handler_settles_later_and_in_batches(self, stage: Stage) -> None:
        kept: list[Delivery] = []

        async def handler(msg: int, delivery: Delivery) -> None:
            kept.append(delivery)
            if len(kept) == 3:
                for held in kept:
                    await held.ack()

        async with stage.running(handler, ack="manual"):
            for number in range(3):
                await stage.send(number)
            await eventually(lambda: len(kept) == 3 and all(d.settled for d in kept))
        await stage.nothing_waits()

    async def test_by_hand_what_is_not_settled_comes_back(self, stage: Stage) -> None:
        kept: list[Delivery] = []

        async def handler(msg: str, delivery: Delivery) -> None:
            kept.append(delivery)

        async with stage.running(handler, ack="manual", grace=0.05):
            await stage.send("kept")
            await eventually(lambda: kept)
        again = Inbox()
        async with stage.running(again):
            assert await again.holds(1) == ["kept"]

    async def test_by_hand_a_handler_that_raises_is_retried_by_the_policy(self, stage: Stage) -> None:
        attempts: list[int] = []

        async def handler(msg: Message, delivery: Delivery) -> None:
            attempts.append(msg.attempt)
            if msg.attempt < 3:
                raise ValueError("not yet")
            await delivery.ack()

        async with stage.running(handler, ack="manual"):
            await stage.send("x")
            await eventually(lambda: len(attempts) == 3)
        assert attempts == [1, 2, 3]

    # --- stopping -------------------------------------------------------------------------------

    async def test_stop_lets_handlers_finish_and_gives_the_rest_back(self, stage: Stage) -> None:
        gate, inbox = Gate(), Inbox()
        first = stage.new_consumer(concurrency=2, prefetch=6)
        task = await stage.start(first, gate)
        for number in range(10):
            await stage.send(number)
        await gate.holds(2)
        # When it is told to stop, those at work finish
        first.stop(TIMEOUT)
        gate.opened.set()
        await gather(task)
        # Then the next consumer has all the others, and none twice
        async with stage.running(inbox, concurrency=2):
            await eventually(lambda: len(gate.left) + len(inbox.items) >= 10)
        assert sorted(gate.entered) == sorted(gate.left)
        assert Counter(gate.left + inbox.items) == Counter(range(10))

    async def test_a_handler_that_does_not_finish_in_time_is_cancelled_and_its_message_comes_back(
        self, stage: Stage
    ) -> None:
        gate, inbox = Gate(), Inbox()
        start = time.monotonic()
        async with stage.running(gate, grace=0.05):
            await stage.send("slow")
            await gate.holds(1)
        assert time.monotonic() - start < TIMEOUT
        assert gate.left == []
        async with stage.running(inbox):
            assert await inbox.holds(1) == ["slow"]

    async def test_when_the_loop_is_cancelled_what_is_in_hand_comes_back(self, stage: Stage) -> None:
        gate, inbox = Gate(), Inbox()
        task = await stage.start(stage.new_consumer(), gate)
        for payload in ("a", "b"):
            await stage.send(payload)
        await gate.holds(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gather(task)
        async with stage.running(inbox):
            assert sorted(await inbox.holds(2)) == ["a", "b"]

    async def test_close_from_elsewhere_ends_the_loop_and_loses_nothing(self, stage: Stage) -> None:
        gate, inbox = Gate(), Inbox()
        consumer = stage.new_consumer()
        task = await stage.start(consumer, gate)
        await stage.send("a")
        await gate.holds(1)
        closing = asyncio.create_task(consumer.close())
        gate.opened.set()
        await gather(closing, task)
        async with stage.running(inbox):
            await stage.send("b")
            await eventually(lambda: "b" in inbox.items)
        assert "a" in [*gate.left, *inbox.items]

    @except_with("listens", "two consumers of one queue cannot listen on one port")
    async def test_nothing_is_lost_or_done_twice_while_consumers_come_and_go(self, stage: Stage) -> None:
        done: list[int] = []

        async def handler(msg: int) -> None:
            await asyncio.sleep(0)
            done.append(msg)

        sending = asyncio.create_task((await stage.producer()).send_many(range(300)))
        async with stage.running(handler, concurrency=3, prefetch=20):
            while len(done) < 300:
                async with stage.running(handler, concurrency=3, prefetch=20):
                    await reaches(done, min(300, len(done) + 40))
        await gather(sending)
        assert sorted(done) == list(range(300))

    async def test_the_loop_runs_again_after_it_was_stopped(self, stage: Stage) -> None:
        inbox = Inbox()
        consumer = stage.new_consumer()
        for number in range(2):
            task = await stage.start(consumer, inbox)
            await stage.send(number)
            await inbox.holds(number + 1)
            consumer.stop()
            await gather(task)
        assert inbox.items == [0, 1]
