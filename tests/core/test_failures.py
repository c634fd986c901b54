"""What becomes of failures as they come: groups of errors, errors without a text, a handler's own."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from streamtools import Consumer, ConsumerFactory, ConsumerRunner, Message, Producer, Retry
from streamtools.bus import Bus
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.http.responses import settlement_response
from streamtools.errors import ConfigurationError, DecodeError, Drop, OptionError, Reject, RetryLater, safe_str
from streamtools.retry import validate_verdict
from streamtools.testing import Harness
from streamtools.text.tracebacks import format_error
from streamtools.types import Handler
from streamtools.verdicts import DROP, Verdict, VerdictKind

OTHERS = {TimeoutError: Retry(retries=0), OSError: Retry(delay=60, jitter=0)}
BARE = Retry(retries=2, delay=1, jitter=0, errors=OTHERS)


def group(*errors: BaseException) -> BaseExceptionGroup[Any]:
    return BaseExceptionGroup("unhandled errors in a TaskGroup", errors)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (group(Reject("no such order")), Verdict.reject("no such order")),
        (group(DecodeError("not an order")), Verdict.reject("not an order")),
        (group(Drop()), DROP),
        (group(Drop(), Drop()), DROP),
        (group(Drop(), ValueError("x")), Verdict.retry(1)),
        (group(RetryLater(7)), Verdict.retry(7)),
        (group(RetryLater(7), ValueError("x")), Verdict.retry(7)),
        (group(RetryLater(7), OSError("x")), Verdict.retry(60)),
        (group(ValueError("x"), Reject("no such order")), Verdict.reject("no such order")),
        (group(TimeoutError(), Reject("no such order")), Verdict.reject("no such order")),
        (group(Drop(), Reject("no such order"), RetryLater(7)), Verdict.reject("no such order")),
        (group(TimeoutError(), ValueError("x")), Verdict.reject()),
        (group(group(ValueError("x"), group(Reject("deep")))), Verdict.reject("deep")),
        (group(ValueError("x"), KeyboardInterrupt()), Verdict.retry(1)),
    ],
)
def test_of_the_errors_of_a_group_the_gravest_counts(error: BaseException, verdict: Verdict) -> None:
    assert BARE.decide(error, 1) == verdict


def test_a_policy_for_groups_is_for_the_group_as_a_whole() -> None:
    retry = Retry(errors={ExceptionGroup: Retry(retries=0)})
    assert retry.decide(group(Drop()), 1) == Verdict.reject()
    assert Retry(errors={Exception: Retry(retries=0)}).decide(group(Drop()), 1) == DROP


@pytest.mark.parametrize(("error", "ends"), [(Reject("no"), "rejected"), (Drop(), "dropped")])
async def test_a_verdict_inside_a_task_group_is_heard(error: Exception, ends: str) -> None:
    factory = ConsumerFactory(url="asyncio://")

    @factory.route("orders")
    async def handle(msg: int) -> None:
        async def work() -> None:
            raise error

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work())

    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        assert (len(getattr(service, ends)), service.retried) == (1, [])


@pytest.mark.parametrize(
    ("error", "ends", "reason"),
    [(Reject("deep"), "rejected", "deep"), (Drop(), "dropped", ""), (ValueError("x" * 10_000), "rejected", "again")],
)
async def test_a_verdict_is_heard_however_deep_it_is_nested(
    error: Exception, ends: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nested: BaseException = error
    for _ in range(3_000):
        nested = group(nested, ValueError("beside")) if ends == "rejected" else group(nested)
        nested = BaseExceptionGroup("again", [nested])
    factory = ConsumerFactory(url="asyncio://", retry=Retry(retries=0))

    @factory.route("orders")
    async def handle(msg: int) -> None:
        raise nested

    # A handler of the log that formats the traceback, as a service's own does.
    to_stderr = logging.StreamHandler()
    logging.getLogger("streamtools").addHandler(to_stderr)
    try:
        async with Harness(factory) as service:
            await service.send("orders", 1)
            await service.settled()
            assert len(getattr(service, ends)) == 1
            if ends == "rejected":
                assert service.rejected[0].error is not None
                assert reason in service.rejected[0].error.reason and len(service.rejected[0].error.reason) < 4_000
    finally:
        logging.getLogger("streamtools").removeHandler(to_stderr)
    assert "RecursionError" not in capsys.readouterr().err


def test_a_rejection_inside_a_group_is_answered_as_one_over_http() -> None:
    delivery = Delivery(Message(body=b"1", queue="orders", id="1"))
    error = group(Reject("no such order"))
    response = settlement_response(Settlement(delivery, Verdict.reject("no such order"), error=error))
    assert response.status == 422
    other = settlement_response(Settlement(delivery, Verdict.reject(), error=group(ValueError("secret"))))
    assert (other.status, b"secret" in (other.body or b"")) == (500, False)


# --- what an error says ---------------------------------------------------------------------------


async def limit(message: Message, call_next: Handler) -> Any:
    async with asyncio.timeout(0.01):
        return await call_next(message)


async def test_a_timeout_says_where_it_was_raised_and_what_was_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    factory = ConsumerFactory(url="asyncio://", middleware=[limit], retry=Retry(retries=0))

    @factory.route("orders")
    async def charge(msg: int) -> None:
        await asyncio.Event().wait()

    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        [rejected] = service.rejected
    assert rejected.error is not None
    reason = rejected.error.reason
    assert reason.startswith("no text; raised in limit (test_failures.py:")
    assert ".charge (test_failures.py:" in reason and reason.endswith(" was waiting")
    assert reason in caplog.text


def test_a_group_says_what_each_of_its_errors_says() -> None:
    text = safe_str(group(ValueError("first"), group(KeyError("second"))))
    assert "2 sub-exceptions" in text and "ValueError: first" in text and "KeyError: 'second'" in text
    assert len(safe_str(group(*[ValueError("x" * 9)] * 1000))) < 500
    assert safe_str(ValueError()) == ""  # never raised


class Order(BaseModel):
    id: int


@pytest.mark.parametrize(
    "fail",
    [
        lambda: int("x"),
        lambda: TypeAdapter(Order).validate_python({}),
        lambda: validate_verdict(5),
        lambda: b"\xff".decode(),
    ],
    ids=["ValueError", "ValidationError", "TypeError", "UnicodeDecodeError"],
)
async def test_a_handlers_own_error_has_its_traceback_in_log_and_details(
    fail: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    factory = ConsumerFactory(url="asyncio://", retry=Retry(retries=0))

    @factory.route("orders")
    async def computes(msg: int) -> None:
        fail()

    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        [rejected] = service.rejected
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info is not None and record.exc_info[2] is not None
    assert rejected.error is not None
    assert "in computes" in rejected.error.traceback


async def test_a_body_that_is_wrong_has_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    factory = ConsumerFactory(url="asyncio://")

    @factory.route("orders")
    async def handle(msg: Order) -> None: ...

    async with Harness(factory) as service:
        await service.send("orders", {"no": 1})
        await service.settled()
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert not record.exc_info


# --- spans of time, and names that are nearly right -----------------------------------------------

FIVE = timedelta(seconds=5)


def test_a_timedelta_is_taken_wherever_seconds_are() -> None:
    retry = Retry(retries=3, delay=FIVE, max_delay=timedelta(minutes=1), jitter=0)
    assert (retry.delay, retry.max_delay, retry.after(1)) == (5.0, 60.0, 5.0)
    assert (
        RetryLater(FIVE).delay
        == Verdict.retry(FIVE).delay
        == validate_verdict(Verdict(VerdictKind.RETRY, delay=FIVE)).delay
        == 5
    )  # type: ignore[arg-type]
    assert Consumer("q", url="asyncio://", connect_timeout=FIVE).connect_timeout == 5
    assert Producer("q", url="asyncio://", send_timeout=FIVE).send_timeout == 5
    assert ConsumerRunner(Producer("q", url="asyncio://"), shutdown_timeout=FIVE).shutdown_timeout == 5
    for make in (lambda: Retry(delay=-FIVE), lambda: RetryLater(-FIVE), lambda: Producer("q", send_timeout=-FIVE)):
        with pytest.raises(ConfigurationError, match="out of range"):
            make()


async def test_delays_and_times_to_live_are_given_as_timedeltas() -> None:
    sent: list[Message] = []
    factory = ConsumerFactory(url="asyncio://")

    @factory.route("orders")
    async def handle(msg: Message) -> None:
        sent.append(msg)

    async with Harness(factory, delays=True) as service:
        async with Producer("orders", url="asyncio://") as producer:
            await producer.send(1, delay=timedelta(milliseconds=10), ttl=FIVE)
            await producer.send_many([2], ttl=FIVE)
        async with Bus(url="asyncio://") as bus:
            await bus.send({"n": 3}, "orders", ttl=FIVE)
        await service.settled()
    assert all(m.expires_at and m.time and 4 < m.expires_at - m.time < 6 for m in sent) and len(sent) == 3
    async with Consumer("none", url="asyncio://") as consumer:
        assert await consumer.receive(timeout=timedelta(milliseconds=1)) == []


def test_a_parameter_that_retry_does_not_have_is_named() -> None:
    with pytest.raises(OptionError, match=r"no 'max_retries'. Did you mean 'retries'"):
        Retry(max_retries=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Known: .*retries"):
        Retry(attempts=3)  # type: ignore[arg-type]


# --- many, and one --------------------------------------------------------------------------------


class Row(tuple[int, ...]):
    _fields = ("id",)


async def several() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("payloads", "how"),
    [({"id": 1}, r"send\(payload\)"), ("abc", r"send_many\(\[payload\]\)"), (b"abc", r"\[payload\]")]
    + [(Order(id=1), r"\[payload\]"), (Row((1,)), r"\[payload\]"), (5, r"\[payload\]"), (None, r"\[payload\]")]
    + [(memoryview(b"a"), r"\[payload\]"), (bytearray(b"a"), r"\[payload\]"), (several(), "async for")]
    + [(Message(body=b"", queue="q", id="1"), "send_messages")],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
async def test_one_payload_is_not_taken_for_many(payloads: Any, how: str) -> None:
    async with Producer("orders", url="asyncio://one") as producer:
        with pytest.raises(TypeError, match=rf"takes a list of payloads, and this is one .*{how}"):
            await producer.send_many(payloads)
        await producer.send_many(each for each in (1, 2))
    async with Consumer("orders", url="asyncio://one") as consumer:
        assert [d.message.body for d in await consumer.receive(5, timeout=0)] == [b"1", b"2"]


async def test_many_belong_to_one_conversation() -> None:
    async with (
        Producer("orders", url="asyncio://many") as producer,
        Consumer("orders", url="asyncio://many") as consumer,
    ):
        await producer.send_many([1, 2], correlation_id="talk", reply_to="answers")
        found = [d.message for d in await consumer.receive(5, timeout=0)]
        assert [(m.correlation_id, m.reply_to) for m in found] == [("talk", "answers")] * 2
        with pytest.raises(OptionError, match=r"gives each message an id itself: await send\(\.\.\., id="):
            await producer.send_many([1], id="mine")


def chained(number: int) -> BaseException:
    """An error that was raised from another one, that from another one, and so on."""
    error: BaseException = ValueError("the first one")
    for n in range(number):
        error, cause = ValueError(f"number {n}"), error
        error.__cause__ = cause
    return error


def nested(number: int) -> BaseException:
    error: BaseException = ValueError("the innermost")
    for _ in range(number):
        error = group(error)
    return error


def noted(number: int) -> BaseException:
    error = ValueError("with notes")
    error.__notes__ = [f"note {n}" for n in range(number)]
    return error


def shared(number: int) -> BaseException:
    """A group that holds another one twice, which holds another one twice, and so on."""
    error: BaseException = ValueError("the innermost")
    for _ in range(number):
        error = group(error, error)
    return error


class HoldsItself(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> Any:
        return (self,)


LARGE: dict[str, Callable[[], BaseException]] = {
    "groups that share what they hold": lambda: shared(50),
    "a group that holds itself": lambda: HoldsItself("g", [ValueError()]),
    "a wide group": lambda: group(*(ValueError(f"number {n}") for n in range(20_000))),
    "groups of groups": lambda: group(*(group(*(ValueError() for _ in range(100))) for _ in range(200))),
    "a deep group": lambda: nested(20_000),
    "a long line of causes": lambda: chained(20_000),
    "a group in a line of causes": lambda: group(*(chained(100) for _ in range(200))),
    "many notes": lambda: noted(20_000),
}


@pytest.mark.parametrize("kind", LARGE)
async def test_an_error_that_brings_thousands_along_is_told_in_little_time(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[object] = []
    make = traceback.TracebackException.__init__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(self)
        make(self, *arguments, **options)

    monkeypatch.setattr(traceback.TracebackException, "__init__", counted)
    error = LARGE[kind]()
    factory = ConsumerFactory(url="asyncio://", retry=Retry(retries=0))

    @factory.route("orders")
    async def handle(msg: int) -> None:
        raise error

    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        [rejected] = service.rejected
    assert rejected.error is not None
    assert type(error).__name__ in rejected.error.traceback and "not shown" in caplog.text
    assert len(made) < 1000 and len(caplog.text) < 50_000


def test_an_error_that_brings_few_along_is_told_whole() -> None:
    try:
        try:
            raise group(ValueError("one"), group(KeyError("two")))
        except ExceptionGroup as inner:
            inner.add_note("a note")
            inner.__context__ = chained(50)
            raise RuntimeError("outer") from inner
    except RuntimeError as error:
        assert format_error(error) == "".join(traceback.format_exception(error))
