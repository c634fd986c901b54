"""Retries, delays, copies: decisions without I/O."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.engine.backoff import MAX_BACKOFF, backoff
from streamtools.engine.messages.failures import (
    NAME_LIMIT,
    REASON_LIMIT,
    TRACEBACK_LIMIT,
    describe,
    error_copy,
    redrive_copy,
    retry_copy,
)
from streamtools.errors import ConfigurationError, DecodeError, Drop, Reject, RetryLater
from streamtools.message import ErrorDetails, Message
from streamtools.retry import Retry
from streamtools.verdicts import DROP, Verdict, VerdictKind
from tests.core import strategies

policies = st.builds(
    Retry, retries=st.none() | st.integers(0, 100), delay=st.floats(0, 1e6), backoff=st.floats(1, 1e6),
    max_delay=st.floats(0, 1e6), jitter=st.floats(0, 1),
)  # fmt: skip
attempts = st.integers(1, 10**9)


@pytest.mark.parametrize("attempt", [10**6, 10**18, 10**400])
@pytest.mark.parametrize("backoff", [1, 2, 3, 10**400, 1.5])
def test_an_attempt_of_any_size_has_its_delay_at_once(attempt: int, backoff: float) -> None:
    retry = Retry(retries=None, delay=1, backoff=backoff, jitter=0)
    assert retry.after(attempt) in (1, retry.max_delay)


@pytest.mark.parametrize("delay", ["not yet", [1], float("nan"), -1, 10**400])
def test_a_delay_that_is_no_number_of_seconds_is_told_with_the_line_to_write(delay: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"RetryLater\(5, 'not yet'\)"):
        RetryLater(delay)


@given(policies, attempts)
def test_a_delay_is_never_longer_than_the_most_and_its_jitter(retry: Retry, attempt: int) -> None:
    assert 0 <= retry.after(attempt) <= retry.max_delay * (1 + retry.jitter)


@given(policies, st.integers(1, 200))
def test_without_jitter_delays_never_shrink(retry: Retry, attempt: int) -> None:
    steady = Retry(delay=retry.delay, backoff=retry.backoff, max_delay=retry.max_delay, jitter=0)
    assert steady.after(attempt) <= steady.after(attempt + 1)
    assert steady.after(1) == min(retry.delay, retry.max_delay)


@given(policies, attempts)
def test_a_message_runs_once_and_then_as_often_as_there_are_retries(retry: Retry, attempt: int) -> None:
    verdict = retry.decide(ValueError("x"), attempt)
    given_up = retry.retries is not None and attempt > retry.retries
    assert verdict.kind is (VerdictKind.REJECT if given_up else VerdictKind.RETRY)


@given(policies, attempts, st.floats(0, 1e6))
def test_a_handler_chooses_the_delay_but_not_more_attempts(retry: Retry, attempt: int, delay: float) -> None:
    verdict = retry.decide(RetryLater(delay), attempt)
    if retry.retries is None or attempt <= retry.retries:
        assert (verdict.kind, verdict.delay) == (VerdictKind.RETRY, delay)
    else:
        assert verdict.kind is VerdictKind.REJECT


@given(policies, attempts)
def test_what_cannot_succeed_is_never_retried(retry: Retry, attempt: int) -> None:
    assert retry.decide(Reject("no"), attempt).kind is VerdictKind.REJECT
    assert retry.decide(DecodeError("no"), attempt).kind is VerdictKind.REJECT
    assert retry.decide(Drop(), attempt) is DROP


def test_five_retries_are_the_default_so_at_most_six_runs() -> None:
    kinds = [Retry().decide(ValueError(), attempt).kind for attempt in range(1, 8)]
    assert kinds == [VerdictKind.RETRY] * 5 + [VerdictKind.REJECT] * 2
    assert [round(Retry(jitter=0).after(n), 3) for n in (1, 2, 3, 20)] == [1, 2, 4, 300]


@pytest.mark.parametrize(
    "wrong",
    [{"retries": -1}, {"delay": -1}, {"delay": float("inf")}, {"delay": float("nan")}, {"backoff": 0.5}]
    + [{"max_delay": -1}, {"max_delay": float("nan")}, {"jitter": 2}, {"jitter": -0.1}, {"jitter": float("nan")}],
)
def test_a_policy_out_of_range_is_a_clear_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Retry(**wrong)  # type: ignore[arg-type]


@given(attempts)
def test_the_wait_before_a_new_connection_grows_to_its_most(attempt: int) -> None:
    assert 0 < backoff(attempt) <= MAX_BACKOFF * 1.25


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@given(strategies.messages, st.text(max_size=60), st.integers(1, 20_000), st.text(max_size=5000))
def test_the_details_of_a_failure_are_bounded_in_bytes(
    message: Message, unit: str, repeats: int, handler: str
) -> None:
    class Named(Exception):
        pass

    Named.__qualname__ = handler or "Named"
    try:
        raise Named(unit * repeats)
    except Named as error:
        details = describe(message, error, handler)
    _bounded(details)


@pytest.mark.parametrize(
    "error", [Unreadable(), RuntimeError("\ud800" * 5000), "🎉" * 5000, SystemExit(), KeyError()]
)
def test_every_error_can_be_described(error: BaseException | str) -> None:
    _bounded(describe(Message(body=b"", queue="q", id="1"), error))


def _bounded(details: ErrorDetails) -> None:
    assert len(details.reason.encode()) <= REASON_LIMIT
    assert len(details.traceback.encode()) <= TRACEBACK_LIMIT
    assert max(len(t.encode()) for t in (details.queue, details.handler, details.exception)) <= NAME_LIMIT


def test_the_end_of_a_traceback_and_the_beginning_of_a_text_are_kept() -> None:
    try:
        raise ValueError("begin" + "x" * 100_000 + "end")
    except ValueError as error:
        details = describe(Message(body=b"", queue="q", id="1"), error)
    assert details.reason.startswith("begin") and details.reason.endswith("…")
    assert details.traceback.startswith("…") and details.traceback.rstrip().endswith("end")


@given(strategies.messages, st.floats(0, 1e6))
def test_a_retry_copy_is_the_same_message_one_attempt_later(message: Message, delay: float) -> None:
    before = time.time()
    copy = retry_copy(message, ErrorDetails(queue="orders"), delay)
    assert copy.replace(attempt=0, deliver_at=None, error=None) == message.replace(
        attempt=0, deliver_at=None, error=None
    )
    assert copy.attempt == message.attempt + 1
    assert copy.deliver_at is None if delay == 0 else copy.deliver_at is not None and copy.deliver_at >= before


@given(strategies.messages)
def test_through_the_error_queue_and_back_a_message_is_what_it_was(message: Message) -> None:
    failed = error_copy(message, describe(message, ValueError("x")), "orders.error")
    assert (failed.queue, failed.expires_at, failed.deliver_at) == ("orders.error", None, None)
    back = redrive_copy(failed)
    assert (back.queue, back.attempt, back.error) == ("orders", 1, None)
    for field in ("body", "id", "type", "key", "headers", "content_type", "correlation_id", "source", "time"):
        assert getattr(back, field) == getattr(message, field)


def test_the_first_failure_is_kept_through_retries() -> None:
    message = Message(body=b"", queue="q", id="1")
    first = describe(message, ValueError("a"))
    second = describe(retry_copy(message, first, 0), ValueError("b"))
    assert (second.first_failed, second.attempts, second.reason) == (first.first_failed, 2, "b")
    elsewhere = describe(message.replace(queue="other", error=first), ValueError("c"))
    assert elsewhere.first_failed >= first.last_failed


def test_a_message_that_does_not_say_where_it_failed_needs_a_target() -> None:
    message = Message(body=b"", queue="error", id="1")
    with pytest.raises(ConfigurationError, match="name one to move it to"):
        redrive_copy(message)
    assert redrive_copy(message, "orders").queue == "orders"


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), 1e12])
def test_a_handler_that_asks_for_an_impossible_delay_is_told_so_there(delay: float) -> None:
    with pytest.raises(ConfigurationError, match="ten years"):
        RetryLater(delay)


class TestPoliciesByError:
    """`Retry(errors=...)`: another policy for some errors."""

    policy = Retry(
        retries=1, jitter=0, errors={LookupError: Retry(retries=0), OSError: Retry(retries=9, delay=7, jitter=0)}
    )

    @pytest.mark.parametrize(
        ("error", "attempt", "verdict"),
        [
            (KeyError("k"), 1, Verdict.reject()),
            (TimeoutError(), 3, Verdict.retry(28)),
            (ValueError(), 1, Verdict.retry(1)),
            (ValueError(), 2, Verdict.reject()),
            (Reject("no"), 1, Verdict.reject("no")),
        ],
    )
    def test_the_nearest_class_decides(self, error: BaseException, attempt: int, verdict: Verdict) -> None:
        assert self.policy.decide(error, attempt) == verdict

    def test_a_nearer_class_wins(self) -> None:
        policy = Retry(errors={OSError: Retry(retries=0), TimeoutError: Retry(retries=3)})
        assert policy.of(TimeoutError()).retries == 3
        assert policy.of(FileNotFoundError()).retries == 0
        assert policy.of(ValueError()) is policy

    @pytest.mark.parametrize("errors", [{"ValueError": Retry()}, {ValueError: 3}, {int: Retry()}])
    def test_what_is_no_policy_is_an_error_at_once(self, errors: dict[type[BaseException], Retry]) -> None:
        with pytest.raises(ConfigurationError, match=r"Retry\(errors=\.\.\.\) has"):
            Retry(errors=errors)

    def test_a_policy_has_a_hash(self) -> None:
        assert len({self.policy, self.policy}) == 1


@pytest.mark.parametrize("delay", ["soon", float("nan"), float("inf"), -5, object(), True])
def test_a_delay_that_is_none_falls_back_to_the_policy_and_is_told(
    delay: object, caplog: pytest.LogCaptureFixture
) -> None:
    error = RetryLater()
    error.delay = delay  # type: ignore[assignment]  # as a subclass sets it that does not call its base

    assert Retry(delay=7, jitter=0).decide(error, 1) == Verdict.retry(7)
    assert "a delay that cannot be used" in caplog.text


def test_the_delay_of_a_subclass_may_be_a_timedelta() -> None:
    class Later(RetryLater):
        def __init__(self) -> None:
            self.delay = timedelta(seconds=9)  # type: ignore[assignment]

    group = ExceptionGroup("several", [Later(), RetryLater(2)])

    assert Retry().decide(Later(), 1) == Verdict.retry(9)
    assert Retry().decide(group, 1) == Verdict.retry(9)


def test_a_verdict_takes_the_name_of_its_kind_and_no_other() -> None:
    assert Verdict("retry", 5).kind is VerdictKind.RETRY  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'later' is not a valid VerdictKind"):
        Verdict("later")  # type: ignore[arg-type]
