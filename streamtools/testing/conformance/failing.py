"""Cases of failing: retries, verdicts that handlers raise, the error queue."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest

from streamtools.errors import Drop, QueueError, Reject, RetryLater
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.testing.conformance.cases import Cases, except_with, needs
from streamtools.testing.conformance.payloads import BODIES, HEADERS, Order
from streamtools.testing.conformance.sending import TICK
from streamtools.testing.conformance.stage import ALWAYS, NEVER, QUICK, Envelopes, Inbox, Stage
from streamtools.testing.waiting import eventually, reaches

TRACEBACK_LIMIT = 8 * 1024
#: The most that the details of a failure may add to a message, in bytes of UTF-8.
DETAILS_LIMIT = 16 * 1024


class Stop(BaseException):
    """No Exception, and nobody's standard one."""


class Unreadable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


#: What a careless loop would let through, end by, or hang on.
RAISED: dict[str, BaseException] = {
    "an ordinary error": ValueError("wrong"),
    "sys.exit": SystemExit(1),
    "a cancellation of its own": asyncio.CancelledError(),
    "stop iteration": StopIteration("leaked"),
    "stop async iteration": StopAsyncIteration(),
    "keyboard interrupt": KeyboardInterrupt(),
    "generator exit": GeneratorExit(),
    "a base exception": Stop("stop"),
    "a group": ExceptionGroup("several", [ValueError("a"), KeyError("b")]),
    "a timeout": TimeoutError(),
    "200 KB of text": RuntimeError("ä" * 200_000),
    "a lone surrogate": RuntimeError("\ud800"),
    "unreadable": Unreadable(),
}


class FailingCases(Cases):
    """The promises about messages whose handlers fail."""

    async def test_a_failed_message_is_run_again_until_it_works(self, stage: Stage) -> None:
        seen: list[Message] = []

        async def handler(msg: Message) -> None:
            seen.append(msg)
            if msg.attempt < 3:
                raise ValueError("not yet")

        async with stage.running(handler):
            await stage.send({"a": 1}, headers=HEADERS, key="k", type="t", id="same", correlation_id="c")
            await eventually(lambda: len(seen) == 3)
        assert [m.attempt for m in seen] == [1, 2, 3]
        for message in seen:
            assert (message.id, message.key, message.type, message.correlation_id) == ("same", "k", "t", "c")
            assert (message.body, dict(message.headers)) == (b'{"a":1}', HEADERS)
        await stage.nothing_waits()

    @pytest.mark.parametrize("kind", BODIES)
    async def test_any_bytes_survive_a_retry_and_a_rejection(self, stage: Stage, kind: str) -> None:
        bodies: list[bytes] = []

        async def handler(msg: bytes) -> None:
            bodies.append(msg)
            raise ValueError("never")

        async with stage.running(handler):
            message = await stage.rejected(await stage.send(BODIES[kind]))
        assert bodies == [BODIES[kind]] * 3
        assert message is None or message.body == BODIES[kind]

    @pytest.mark.parametrize("retries", [0, 1, 2])
    async def test_after_its_retries_it_is_rejected(self, stage: Stage, retries: int) -> None:
        attempts: list[int] = []

        async def handler(msg: Message) -> None:
            attempts.append(msg.attempt)
            raise ValueError("never")

        async with stage.running(handler, retry=Retry(retries=retries, delay=0, jitter=0)):
            message = await stage.rejected(await stage.send(1))
        assert attempts == list(range(1, retries + 2))
        assert message is None or (message.error is not None and message.error.attempts == retries + 1)

    async def test_without_a_limit_it_is_never_given_up(self, stage: Stage) -> None:
        attempts: list[int] = []

        async def handler(msg: Message) -> None:
            attempts.append(msg.attempt)
            if len(attempts) < 5:
                raise RetryLater(0)

        async with stage.running(handler, retry=ALWAYS):
            await stage.send(1)
            await eventually(lambda: len(attempts) == 5)
        assert attempts == list(range(1, 6))

    async def test_the_count_of_attempts_survives_the_consumer(self, stage: Stage) -> None:
        attempts: list[int] = []

        async def handler(msg: Message) -> None:
            attempts.append(msg.attempt)
            raise ValueError("never")

        sent = None
        for number in range(3):
            async with stage.running(handler, retry=Retry(retries=2, delay=0.02, jitter=0)):
                sent = sent or await stage.send(1)
                await reaches(attempts, number + 1)
        assert sent is not None
        await stage.rejected(sent)
        assert attempts == [1, 2, 3]

    async def test_a_retry_is_never_early_and_holds_up_nobody(self, stage: Stage) -> None:
        times: list[float] = []
        others: list[str] = []

        async def handler(msg: str) -> None:
            if msg != "fails":
                others.append(msg)
                return
            times.append(time.time())
            if len(times) == 1:
                raise ValueError("not yet")

        waits_in_place = self.features.error_queue and not self.features.delay  # the retry has one of two handlers
        async with stage.running(handler, retry=Retry(delay=0.3, jitter=0), concurrency=1 + waits_in_place):
            await stage.send("fails")
            await eventually(lambda: times)
            await stage.send("passes")
            await eventually(lambda: others)
            assert len(times) == 1
            await eventually(lambda: len(times) == 2)
        assert times[1] - times[0] >= 0.3 - TICK

    # --- verdicts that a handler raises ---------------------------------------------------------

    async def test_a_handler_chooses_when_it_is_run_again(self, stage: Stage) -> None:
        times: list[float] = []

        async def handler(msg: str) -> None:
            times.append(time.time())
            if len(times) == 1:
                raise RetryLater(0.25, "the other service sleeps")

        async with stage.running(handler, retry=QUICK):
            await stage.send("x")
            await eventually(lambda: len(times) == 2)
        assert times[1] - times[0] >= 0.25 - TICK

    async def test_a_rejected_message_is_not_run_again(self, stage: Stage) -> None:
        inbox = Inbox(_raise(Reject("no such customer")))
        async with stage.running(inbox):
            message = await stage.rejected(await stage.send("x"))
        assert inbox.items == ["x"]
        assert message is None or (message.error is not None and message.error.reason == "no such customer")

    async def test_a_dropped_message_is_done(self, stage: Stage) -> None:
        inbox = Inbox(_raise(Drop()))
        async with stage.running(inbox):
            await stage.send("x")
            await inbox.holds(1)
        assert inbox.items == ["x"]
        await stage.nothing_waits()
        if self.features.error_queue:
            await stage.nothing_waits(f"{stage.queue}.error")

    # --- every delivery gets a verdict ----------------------------------------------------------

    @pytest.mark.parametrize("kind", RAISED)
    async def test_whatever_a_handler_raises_the_message_is_rejected_and_the_consumer_lives(
        self, stage: Stage, kind: str
    ) -> None:
        inbox = Inbox(lambda msg: _raise(RAISED[kind])(msg) if msg == "bad" else None)
        async with stage.running(inbox, retry=NEVER):
            message = await stage.rejected(await stage.send("bad"))
            await stage.send("good")
            assert await inbox.holds(2) == ["bad", "good"]
        if message is not None:
            _check_details(message)

    @pytest.mark.parametrize("kind", RAISED)
    async def test_whatever_a_def_handler_raises_likewise(self, stage: Stage, kind: str) -> None:
        seen: list[str] = []

        def handler(msg: str) -> None:
            seen.append(msg)
            if msg == "bad":
                raise RAISED[kind]

        async with stage.running(handler, retry=NEVER):
            message = await stage.rejected(await stage.send("bad"))
            await stage.send("good")
            await eventually(lambda: seen == ["bad", "good"])
        if message is not None:
            _check_details(message)

    @pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"id": "no number"}', b"[]", b"null"])
    async def test_a_body_that_does_not_validate_is_rejected_at_once(self, stage: Stage, body: bytes) -> None:
        seen: list[Order] = []

        async def handler(msg: Order) -> None:
            seen.append(msg)

        async with stage.running(handler):
            message = await stage.rejected(await stage.send(body))
            await stage.send(Order(id=2))
            await eventually(lambda: seen == [Order(id=2)])
        if message is not None:
            assert message.body == body
            assert message.error is not None and message.error.attempts == 1
            assert message.error.exception.endswith("DecodeError")

    async def test_a_body_that_is_not_what_its_content_type_says_is_rejected_at_once(self, stage: Stage) -> None:
        inbox = Inbox()
        producer = await stage.producer()
        message = Message(body=b"{no json", queue=stage.queue, id="liar", content_type="application/json")
        async with stage.running(inbox):
            rejected = await stage.rejected(await stage._begin(producer.send_messages([message])))
        assert inbox.items == []
        assert rejected is None or (rejected.id, rejected.body) == ("liar", b"{no json")

    # --- the error queue ------------------------------------------------------------------------

    @needs("error_queue")
    async def test_the_error_queue_has_the_message_whole_with_why_it_failed(self, stage: Stage) -> None:
        async def charge(msg: Any) -> None:
            raise LookupError("no card \N{CREDIT CARD}")

        before = time.time()
        async with stage.running(charge):
            await stage.send(b"\x00body", headers=HEADERS, key="k", type="t", id="id-1", correlation_id="c", ttl=60)
            [message] = await stage.errors(1)
        assert (message.body, dict(message.headers)) == (b"\x00body", HEADERS)
        assert (message.id, message.key, message.type, message.correlation_id) == ("id-1", "k", "t", "c")
        assert (message.queue, message.expires_at) == (f"{stage.queue}.error", None)
        error = message.error
        assert error is not None
        assert (error.queue, error.exception, error.reason) == (stage.queue, "LookupError", "no card \N{CREDIT CARD}")
        assert error.handler.endswith("charge")
        assert error.attempts == message.attempt == 3
        assert "in charge" in error.traceback and "LookupError" in error.traceback
        assert before - TICK <= error.first_failed < error.last_failed <= time.time()

    @needs("error_queue")
    async def test_the_error_queue_is_named_error_unless_said_otherwise(self, stage: Stage) -> None:
        async with stage.running(Inbox(_raise(Reject("x"))), error_queue="error"):
            await stage.send("x", id=f"in {stage.queue}")
            found: list[str] = []
            while f"in {stage.queue}" not in found:
                found += [message.id for message in await stage.errors(1, "error")]

    @needs("error_queue", "admin", "missing_queue")
    @except_with("partitioned", "that a topic has gone is known only after half a minute")
    async def test_an_error_queue_that_is_deleted_under_its_consumer_is_made_again(self, stage: Stage) -> None:
        admin, errors = await stage.admin(), f"{stage.queue}.error"

        async def holds_one() -> bool:
            with suppress(QueueError):
                return (await admin.stats(errors)).ready == 1
            return False

        async with stage.running(Inbox(_raise(Reject("x")))):
            await stage.send("first")
            await eventually(holds_one)
            await admin.delete(errors)
            await stage.send("second")
            await eventually(holds_one)
        assert [message.body for message in await stage.errors(1)] == [b"second"]

    @needs("error_queue")
    async def test_a_handler_of_the_error_queue_may_fail_too(self, stage: Stage) -> None:
        await stage.send("x")
        async with stage.running(Inbox(_raise(Reject("first")))):
            await eventually(lambda: True)
            inbox = Inbox(_raise(Reject("second")))
            errors = f"{stage.queue}.error"
            async with stage.running(inbox, errors, error_queue=errors, retry=Retry(retries=0, max_delay=0.2)):
                # It comes back to the error queue, after a while and not at once.
                await inbox.holds(2)

    @needs("error_queue")
    async def test_the_error_queues_own_handler_does_not_hide_what_failed_first(self, stage: Stage) -> None:
        errors = f"{stage.queue}.error"
        async with stage.running(Inbox(_raise(Reject("no card")))):
            await stage.send("x")
            inbox = Envelopes(_raise(ValueError("no mail server")))
            policy = Retry(retries=2, delay=0, jitter=0, max_delay=0.2)
            async with stage.running(inbox, errors, error_queue=errors, retry=policy):
                runs = await inbox.holds(4)
        for message in runs:  # retried, rejected and come back, it still says where it is to be put back
            assert message.error is not None
            assert (message.error.queue, message.error.reason) == (stage.queue, "no card")


def _raise(error: BaseException) -> Any:
    def answer(msg: object) -> None:
        raise error

    return answer


def _check_details(message: Message) -> None:
    error = message.error
    assert error is not None
    assert (message.body, error.attempts) == (b"bad", 1)
    assert len(error.traceback.encode()) <= TRACEBACK_LIMIT
    details = [error.queue, error.handler, error.exception, error.reason, error.traceback]
    assert sum(len(text.encode()) for text in details) <= DETAILS_LIMIT
