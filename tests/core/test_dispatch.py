"""One delivery in, one settlement out, whatever happens on the way."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.delivery import Delivery, Settlement, current
from streamtools.drivers.asyncio import AsyncIOConsumer
from streamtools.engine.dispatch import Dispatcher, chain
from streamtools.engine.functions.invoke import compile_handler
from streamtools.errors import Drop, Reject, RetryLater
from streamtools.features import Features
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.retry import Retry
from streamtools.testing.waiting import reaches
from streamtools.types import Handler
from streamtools.verdicts import Verdict, VerdictKind

QUICK = Retry(retries=2, delay=0, jitter=0)


class Stop(BaseException):
    pass


def delivery(**fields: Any) -> Delivery:
    count = fields.pop("count", 0)
    return Delivery(Message(**{"body": b"1", "queue": "orders", "id": "1", **fields}), redeliveries=count)


def dispatcher(handler: Handler, **options: Any) -> Dispatcher:
    defaults: dict[str, Any] = {
        "retry": QUICK, "error_queue": "error", "max_deliveries": 5, "in_place": False, "features": Features(),
    }  # fmt: skip
    return Dispatcher(handler, "handler", **{**defaults, **options})


def raising(error: BaseException) -> Handler:
    async def handle(message: Message) -> Any:
        raise error

    return handle


async def fine(message: Message) -> Any:
    return "value"


async def test_a_handler_that_returns_acknowledges_with_its_value() -> None:
    settlement = await dispatcher(fine)(delivery())
    assert (settlement.verdict.kind, settlement.result, settlement.outgoing) == (VerdictKind.ACK, "value", ())


ERRORS: list[tuple[BaseException, VerdictKind]] = [
    (ValueError("x"), VerdictKind.RETRY), (SystemExit(1), VerdictKind.RETRY),
    (KeyboardInterrupt(), VerdictKind.RETRY), (asyncio.CancelledError(), VerdictKind.RETRY),
    (Stop(), VerdictKind.RETRY), (RetryLater(5), VerdictKind.RETRY), (Reject("no"), VerdictKind.REJECT),
    (Drop(), VerdictKind.DROP), (BaseExceptionGroup("g", [Stop()]), VerdictKind.RETRY),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind"), ERRORS)
async def test_whatever_is_raised_is_a_verdict(error: BaseException, kind: VerdictKind) -> None:
    settlement = await dispatcher(raising(error))(delivery())
    assert (settlement.verdict.kind, settlement.error) == (kind, error)
    assert [m.queue for m in settlement.outgoing] == {
        VerdictKind.RETRY: ["orders"],
        VerdictKind.REJECT: ["error"],
    }.get(kind, [])


behaviours = st.sampled_from(["value", "middleware", "decode", *range(len(ERRORS))])


@given(behaviours, st.integers(1, 12), st.integers(0, 8), st.booleans(), st.booleans(), st.binary(max_size=5))
def test_every_delivery_gets_a_verdict(
    behaviour: Any, attempt: int, count: int, copies: bool, thread: bool, body: bytes
) -> None:
    async def asynchronous(msg: Any) -> Any:
        return _behave(behaviour)

    def threaded(msg: Any) -> Any:
        return _behave(behaviour)

    async def broken(message: Message, call_next: Handler) -> Any:
        if behaviour == "middleware":
            raise Stop
        return await call_next(message)

    async def run() -> Settlement:
        handler = chain(compile_handler(threaded if thread else asynchronous), [broken])
        dispatch = dispatcher(handler, features=Features(error_queue=copies))
        content_type = "application/json" if behaviour == "decode" else None
        return await dispatch(delivery(attempt=attempt, count=count, body=body, content_type=content_type))

    settlement = asyncio.run(run())
    kind = settlement.verdict.kind
    assert kind in VerdictKind
    assert len(settlement.outgoing) == (kind in (VerdictKind.RETRY, VerdictKind.REJECT) and copies)
    if kind is VerdictKind.RETRY:
        assert attempt <= 2
    if count >= 5:
        assert kind is VerdictKind.REJECT


def _behave(behaviour: Any) -> Any:
    if isinstance(behaviour, int):
        raise ERRORS[behaviour][0]
    return behaviour


async def test_our_own_cancellation_is_none_of_the_handlers() -> None:
    entered = asyncio.Event()

    async def handle(message: Message) -> Any:
        entered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(dispatcher(handle)(delivery()))  # type: ignore[arg-type]
    await entered.wait()
    task.cancel()
    assert (await task).verdict.kind is VerdictKind.RELEASE


class Silent(Reject):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise KeyboardInterrupt


class Forgetful(RetryLater):
    """It does not call its base."""

    def __init__(self) -> None:
        pass


async def test_an_error_whose_text_cannot_be_had_is_rejected_like_any_other() -> None:
    settlement = await dispatcher(raising(Silent()))(delivery())
    assert settlement.verdict.kind is VerdictKind.REJECT
    [copy] = settlement.outgoing
    assert copy.error is not None and "KeyboardInterrupt" in copy.error.reason


async def test_a_retry_without_a_delay_of_its_own_has_the_policys() -> None:
    assert (await dispatcher(raising(Forgetful()))(delivery())).verdict.kind is VerdictKind.RETRY


@pytest.mark.parametrize("answer", [None, "retry", Verdict(VerdictKind.RETRY, delay=float("inf"))])
async def test_where_an_error_handler_returns_no_verdict_the_policy_decides(answer: Any) -> None:
    async def decide(message: Message, error: BaseException, attempt: int) -> Any:
        return answer

    settlement = await dispatcher(raising(ValueError()), on_error=decide, retry=Retry(retries=0))(delivery())
    assert settlement.verdict.kind is VerdictKind.REJECT


async def test_the_reason_that_an_error_handler_gives_is_kept_beside_the_error() -> None:
    async def decide(message: Message, error: BaseException, attempt: int) -> Any:
        return Verdict.reject("the card is refused")

    [copy] = (await dispatcher(raising(ValueError("402")), on_error=decide)(delivery())).outgoing
    assert copy.error is not None
    assert (copy.error.reason, copy.error.exception) == ("the card is refused", "ValueError")
    assert "ValueError: 402" in copy.error.traceback


async def test_what_a_handler_makes_of_our_cancellation_is_no_failure_of_its_message() -> None:
    entered = asyncio.Event()

    async def handle(message: Message) -> Any:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("interrupted") from None

    task = asyncio.create_task(dispatcher(handle, retry=Retry(retries=0))(delivery()))  # type: ignore[arg-type]
    await entered.wait()
    task.cancel()
    assert (await task).verdict.kind is VerdictKind.RELEASE


async def test_an_expired_message_is_dropped_and_a_poisonous_one_rejected_without_a_run() -> None:
    runs: list[Message] = []

    async def handle(message: Message) -> Any:
        runs.append(message)

    assert (await dispatcher(handle)(delivery(expires_at=1.0))).verdict.kind is VerdictKind.DROP
    settlement = await dispatcher(handle)(delivery(count=5))
    assert settlement.verdict.kind is VerdictKind.REJECT and "max_deliveries=5" in settlement.verdict.reason
    [copy] = settlement.outgoing
    assert copy.error is not None and copy.error.exception.endswith("HandlerError")
    assert runs == []


async def test_in_place_attempts_are_counted_here_and_the_error_queue_is_told() -> None:
    attempts: list[int] = []

    async def handle(message: Message) -> Any:
        attempts.append(message.attempt)
        raise ValueError("never")

    settlement = await dispatcher(handle, in_place=True)(delivery())
    assert attempts == [1, 2, 3]
    [copy] = settlement.outgoing
    assert copy.error is not None and (copy.queue, copy.error.attempts) == ("error", 3)


async def test_in_place_a_wait_is_given_up_when_the_loop_stops() -> None:
    dispatch = dispatcher(raising(ValueError("x")), in_place=True, retry=Retry(delay=3600))
    task = asyncio.create_task(dispatch(delivery()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    dispatch.stop()
    async with asyncio.timeout(10):
        assert (await task).verdict.kind is VerdictKind.RELEASE


async def test_the_error_queues_own_failure_waits_before_it_comes_again() -> None:
    dispatch = dispatcher(raising(Reject("x")), error_queue="error")
    [copy] = (await dispatch(delivery(queue="error"))).outgoing
    assert copy.queue == "error" and copy.deliver_at is not None


async def test_the_delivery_in_hand_is_known_inside_and_not_outside() -> None:
    seen: list[Delivery | None] = []

    async def handle(message: Message) -> Any:
        seen.append(current.get())

    given_one = delivery()
    await dispatcher(handle)(given_one)
    assert (seen, current.get()) == ([given_one], None)


async def test_the_first_middleware_is_outermost() -> None:
    order: list[str] = []

    def layer(name: str) -> Any:
        async def middleware(message: Message, call_next: Handler) -> Any:
            order.append(name)
            return await call_next(message)

        return middleware

    await chain(fine, [layer("a"), layer("b")])(delivery().message)
    assert order == ["a", "b"]


async def test_a_failure_is_logged_once_and_success_never(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await dispatcher(fine)(delivery())
    assert caplog.records == []
    await dispatcher(raising(RuntimeError("boom " * 1000)))(delivery())
    await dispatcher(raising(RuntimeError("boom")), retry=Retry(retries=0))(delivery())
    retried, rejected = caplog.records
    assert "again in" in retried.getMessage() and retried.exc_info is None and len(retried.getMessage()) < 700
    assert "rejected message 1 of 'orders'" in rejected.getMessage() and rejected.exc_info is not None


class TestWhereNoBrokerHoldsAMessageBack:
    """A retry's copy comes at once, and waits for its time here; it was run without a pause, again and again."""

    async def test_what_is_not_due_waits_for_its_time_and_others_do_not(self) -> None:
        due = time.time() + 0.1
        run = dispatcher(fine, features=Features(delay=False))
        late = asyncio.create_task(run(delivery(deliver_at=due)))
        assert (await run(delivery(id="2"))).verdict.kind is VerdictKind.ACK
        assert not late.done()
        assert (await late).verdict.kind is VerdictKind.ACK
        assert time.time() >= due

    async def test_what_expires_meanwhile_is_dropped(self) -> None:
        now = time.time()
        run = dispatcher(fine, features=Features(delay=False))
        settlement = await run(delivery(deliver_at=now + 0.1, expires_at=now + 0.05))
        assert settlement.verdict.kind is VerdictKind.DROP

    async def test_it_goes_back_when_the_consumer_stops(self) -> None:
        run = dispatcher(fine, features=Features(delay=False))
        waiting = asyncio.create_task(run(delivery(deliver_at=time.time() + 3600)))
        await asyncio.sleep(0)
        run.stop()
        assert (await waiting).verdict.kind is VerdictKind.RELEASE

    @pytest.mark.parametrize("features", [Features(), Features(delay=False, error_queue=False)])
    async def test_where_the_broker_or_the_sender_waits_nothing_waits_here(self, features: Features) -> None:
        run = dispatcher(fine, features=features)
        assert (await run(delivery(deliver_at=time.time() + 3600))).verdict.kind is VerdictKind.ACK

    async def test_a_consumer_of_such_a_protocol_keeps_to_the_delay_of_its_policy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(AsyncIOConsumer, "features", replace(AsyncIOConsumer.features, delay=False))
        everything_is_due = SimpleNamespace(time=lambda: float("inf"), monotonic=time.monotonic)
        monkeypatch.setattr("streamtools.drivers.asyncio.queues.time", everything_is_due)
        at: list[float] = []
        consumer = AsyncIOConsumer("orders", url="asyncio://", retry=Retry(retries=2, delay=0.1, backoff=1, jitter=0))

        @consumer()
        async def handle(msg: str) -> None:
            at.append(time.monotonic())
            raise ValueError(msg)

        running = asyncio.create_task(consumer.run(handle))
        async with Producer("orders", url="asyncio://") as producer:
            await producer.send("no")
            await reaches(at, 3)
        consumer.stop()
        await running
        assert at[1] - at[0] >= 0.09 and at[2] - at[1] >= 0.09
