"""The consumer loop over a source that does what a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from streamtools.delivery import Delivery, Settlement
from streamtools.engine import loop as loop_module
from streamtools.engine import settler
from streamtools.engine.dispatch import Dispatcher
from streamtools.engine.loop import Ack, Loop
from streamtools.errors import ConnectionLost, SendError
from streamtools.features import Features
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.testing import eventually
from streamtools.types import Handler
from streamtools.verdicts import VerdictKind

Finished = dict[tuple[str, int], Settlement]


def delivery(number: int, *, count: int = 0, key: str | None = None) -> Delivery:
    return Delivery(Message(body=b"%d" % number, queue="orders", id=str(number), key=key), number, count)


class Script:
    """A source: hands over what `waiting` holds, keeps what is settled, fails where a test says."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.waiting = list(deliveries)
        self.more = asyncio.Event()
        self.asked: list[int] = []
        self.batches: list[list[Settlement]] = []
        self.trouble: dict[str, BaseException] = {}
        self.hold: Callable[[Settlement], bool] = lambda settlement: False
        self.released = asyncio.Event()
        self.stopped = False

    def send(self, *deliveries: Delivery) -> None:
        self.waiting += deliveries
        self.more.set()

    def fail(self, hook: str, error: BaseException | None = None) -> None:
        self.trouble[hook] = error or ConnectionLost("cut")
        self.more.set()

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        self.asked.append(limit)
        while not self.waiting:
            if "receive" in self.trouble:
                raise self.trouble["receive"]
            self.more.clear()
            await self.more.wait()
        batch, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return batch

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        if any(self.hold(s) for s in settlements):
            await self.released.wait()
        if "settle" in self.trouble:
            raise self.trouble["settle"]
        self.batches.append(list(settlements))

    async def _redeclare(self) -> None: ...

    async def _stop(self) -> None:
        self.stopped = True
        if "stop" in self.trouble:
            raise self.trouble["stop"]

    def settled(self, kind: VerdictKind | None = None) -> list[int]:
        found = [s for batch in self.batches for s in batch if kind is None or s.verdict.kind is kind]
        return [s.delivery.token for s in found]


def dispatcher(handler: Handler, retry: Retry | None = None) -> Dispatcher:
    return Dispatcher(
        handler, "handler", retry=retry or Retry(retries=1, delay=0, jitter=0), error_queue="error",
        max_deliveries=5, in_place=False, features=Features(),
    )  # fmt: skip


def make(
    source: Script, handler: Handler, *, concurrency: int = 1, prefetch: int = 10, by_key: bool = False,
    ack: Ack = "after", finished: Finished | None = None,
) -> Loop:  # fmt: skip
    return Loop(
        source, dispatcher(handler), concurrency=concurrency, prefetch=prefetch,
        ordering_key=(lambda d: d.message.key) if by_key else None, ack=ack,
        finished={} if finished is None else finished,
    )  # fmt: skip


@asynccontextmanager
async def running(loop: Loop, grace: float = 20) -> AsyncIterator[asyncio.Task[None]]:
    stopping = asyncio.Event()
    task = asyncio.create_task(loop.run(stopping, lambda: grace))
    try:
        yield task
    finally:
        stopping.set()
        async with asyncio.timeout(30):
            await task


class Gate:
    def __init__(self) -> None:
        self.entered: list[str] = []
        self.opened = asyncio.Event()

    async def __call__(self, message: Message) -> Any:
        self.entered.append(message.id)
        await self.opened.wait()


async def at_once(message: Message) -> Any:
    return None


# --- taking in ----------------------------------------------------------------------------------


async def test_it_never_has_more_in_hand_than_the_prefetch() -> None:
    source, gate = Script(*map(delivery, range(30))), Gate()
    loop = make(source, gate, concurrency=2, prefetch=5)
    async with running(loop):
        await eventually(lambda: loop.in_hand == 5 and len(gate.entered) == 2)
        assert len(source.waiting) == 25
        gate.opened.set()
        await eventually(lambda: len(source.settled(VerdictKind.ACK)) == 30)
    assert max(source.asked) <= 5
    assert (loop.in_hand, loop.settled) == (0, 30)


async def test_an_idle_worker_is_given_what_comes_while_others_take_their_time() -> None:
    source, gate = Script(*map(delivery, range(3))), Gate()
    async with running(make(source, gate, concurrency=4, prefetch=4)):
        await eventually(lambda: len(gate.entered) == 3)
        source.send(delivery(3))
        await eventually(lambda: len(gate.entered) == 4)
        gate.opened.set()


async def test_a_suspect_runs_alone() -> None:
    at_work: list[tuple[int, int]] = []
    suspects = (2, 3)

    async def handle(message: Message) -> Any:
        if int(message.id) in suspects:
            at_work.append((loop.running, loop.in_hand))
        await asyncio.sleep(0)

    source = Script(*(delivery(n, count=2 if n in suspects else 0) for n in range(6)))
    loop = make(source, handle, concurrency=6)
    async with running(loop):
        await eventually(lambda: len(source.settled()) == 6)
    # Nothing else is at work; what came in the same batch behind it waits.
    assert at_work == [(1, 4), (1, 3)]


async def test_by_hand_a_suspect_does_not_wait_for_those_that_the_handler_holds() -> None:
    held: list[Delivery] = []

    async def handle(message: Message) -> Any:
        return None

    source = Script(delivery(1), delivery(2, count=2))
    loop = make(source, handle, concurrency=2, ack="manual")
    async with running(loop, grace=0):
        await eventually(lambda: loop.in_hand == 2 and loop.running == 0 and not source.waiting)
    assert held == [] and source.settled(VerdictKind.ACK) == []


async def test_keys_wait_for_their_own_and_for_no_other() -> None:
    gate = Gate()
    source = Script(delivery(1, key="a"), delivery(2, key="a"), delivery(3, key="b"), delivery(4))
    loop = make(source, gate, concurrency=4, by_key=True)
    async with running(loop):
        await eventually(lambda: len(gate.entered) == 3)
        assert gate.entered == ["1", "3", "4"]
        gate.opened.set()
        await eventually(lambda: len(source.settled()) == 4)
    assert gate.entered[-1] == "2"


# --- settling -----------------------------------------------------------------------------------


async def test_acknowledgements_gather_while_the_last_batch_is_under_way() -> None:
    source = Script(*map(delivery, range(50)))
    source.hold = lambda settlement: settlement.delivery.token == 0
    loop = make(source, at_once, prefetch=50)
    async with running(loop):
        await eventually(lambda: loop.running == 0 and not source.waiting)
        await asyncio.sleep(0)
        source.released.set()
        await eventually(lambda: len(source.settled()) == 50)
    assert len(source.batches) <= 3


async def test_what_sends_something_first_does_not_hold_up_plain_acknowledgements() -> None:
    async def handle(message: Message) -> Any:
        if message.id == "0":
            raise ValueError("retry me")

    source = Script(*map(delivery, range(10)))
    source.hold = lambda settlement: bool(settlement.outgoing)
    async with running(make(source, handle)):
        await eventually(lambda: sorted(source.settled()) == list(range(1, 10)))
        source.released.set()
        await eventually(lambda: len(source.settled()) == 10)
    assert source.settled(VerdictKind.RETRY) == [0]


async def test_a_refused_copy_is_tried_again_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler, "REFUSED_DELAY", 0.01)

    async def handle(message: Message) -> Any:
        if message.id == "0":
            raise ValueError("retry me")

    class Refusing(Script):
        refusals = 4

        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            if any(s.outgoing for s in settlements) and self.refusals:
                self.refusals -= 1
                raise SendError("no such queue", refused=["0"])
            await super()._settle(settlements)

    source = Refusing(*map(delivery, range(5)))
    loop = make(source, handle)
    async with running(loop):
        await eventually(lambda: len(source.settled()) == 5)
    assert (source.settled(VerdictKind.RETRY), loop.in_hand, source.refusals) == ([0], 0, 0)


async def test_what_is_refused_goes_back_at_once_when_we_stop() -> None:
    refused = asyncio.Event()

    class Refusing(Script):
        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            if any(s.outgoing for s in settlements):
                refused.set()
                raise SendError("no such queue", refused=["0"])
            await super()._settle(settlements)

    async def handle(message: Message) -> Any:
        raise ValueError("retry me")

    source = Refusing(delivery(0))
    loop = make(source, handle)
    begin = time.monotonic()
    async with running(loop):
        await refused.wait()
    assert (source.settled(VerdictKind.RELEASE), loop.in_hand) == ([0], 0)
    assert time.monotonic() - begin < 10


async def test_a_suspect_does_not_wait_for_what_the_broker_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = asyncio.Event()

    class Refusing(Script):
        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            if any(s.outgoing for s in settlements) and not self.released.is_set():
                refused.set()
                raise SendError("the error queue is full", refused=["0"])
            await super()._settle(settlements)

    async def handle(message: Message) -> Any:
        if message.id == "0":
            raise ValueError("retry me")

    monkeypatch.setattr(settler, "REFUSED_DELAY", 0.01)
    source = Refusing(delivery(0))
    loop = make(source, handle)
    async with running(loop):
        await refused.wait()
        source.send(delivery(1, count=2), delivery(2))
        await eventually(lambda: sorted(source.settled(VerdictKind.ACK)) == [1, 2])
        source.released.set()
        await eventually(lambda: loop.in_hand == 0)


async def test_on_receive_they_are_acknowledged_before_they_are_handled() -> None:
    source, gate = Script(*map(delivery, range(3))), Gate()
    loop = make(source, gate, ack="on_receive")
    async with running(loop):
        await eventually(lambda: gate.entered == ["0"])
        assert source.settled(VerdictKind.ACK) == [0, 1, 2]
        gate.opened.set()
    # Then stopping handles those that the broker has no more.
    assert gate.entered == ["0", "1", "2"]
    assert source.settled(VerdictKind.RELEASE) == []


async def test_a_verdict_by_hand_that_fails_leaves_the_delivery_in_hand() -> None:
    held: list[Delivery] = []

    async def handle(message: Message) -> Any:
        return None

    class Keeping(Script):
        async def _receive(self, limit: int) -> Sequence[Delivery]:
            batch = await super()._receive(limit)
            held.extend(batch)
            return batch

    source = Keeping(delivery(1))
    loop = make(source, handle, ack="manual")
    async with running(loop):
        await eventually(lambda: held and held[0].settle_manually is not None)
        source.fail("settle", SendError("no error queue", refused=["1"]))
        with pytest.raises(SendError):
            await held[0].reject("bad")
        source.trouble.clear()
        assert not held[0].settled and loop.in_hand == 1
        await held[0].ack()
        await held[0].ack()
    assert source.settled() == [1] and loop.in_hand == 0


# --- stopping -----------------------------------------------------------------------------------


async def test_stopping_finishes_what_is_at_work_and_releases_the_rest_in_order() -> None:
    source, gate = Script(*map(delivery, range(6))), Gate()
    loop, stopping = make(source, gate, concurrency=2), asyncio.Event()
    task = asyncio.create_task(loop.run(stopping, lambda: 20))
    await eventually(lambda: len(gate.entered) == 2 and loop.in_hand == 6)
    stopping.set()
    await eventually(lambda: source.stopped)
    gate.opened.set()
    await asyncio.wait_for(task, 20)
    assert sorted(source.settled(VerdictKind.ACK)) == [0, 1]
    assert source.settled(VerdictKind.RELEASE) == [2, 3, 4, 5]


async def test_what_is_not_finished_in_time_goes_back_to_the_broker() -> None:
    source, gate = Script(*map(delivery, range(2))), Gate()
    loop = make(source, gate)
    async with running(loop, grace=0.01):
        await eventually(lambda: gate.entered == ["0"] and loop.in_hand == 2)
    assert source.settled(VerdictKind.ACK) == [] and sorted(source.settled(VerdictKind.RELEASE)) == [0, 1]


@pytest.mark.parametrize("awaits", [False, True])
async def test_a_handler_that_cancels_its_own_task_fails_alone(awaits: bool) -> None:
    source, handled = Script(*map(delivery, range(3))), list[str]()

    async def handle(message: Message) -> Any:
        handled.append(message.id)
        if message.id == "0":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        if awaits or message.id != "0":
            await asyncio.sleep(0)

    loop = make(source, handle)
    async with running(loop):
        await eventually(lambda: loop.settled == 3)
    assert handled == ["0", "1", "2"]
    assert sorted(source.settled(VerdictKind.ACK)) == ([1, 2] if awaits else [0, 1, 2])
    assert source.settled(VerdictKind.RETRY) == ([0] if awaits else [])


@pytest.mark.parametrize("times", [1, 2])
async def test_a_handler_that_ignores_its_cancellation_does_not_keep_the_loop(times: int) -> None:
    source, entered = Script(delivery(0)), asyncio.Event()

    async def handle(message: Message) -> Any:
        entered.set()
        for _ in range(times):
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    async with running(make(source, handle), grace=0):
        await entered.wait()
    assert source.settled(VerdictKind.ACK) == [0]


async def test_a_handler_that_nothing_ends_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_module, "CANCEL_TIMEOUT", 0.05)
    source, entered, over = Script(delivery(0)), asyncio.Event(), asyncio.Event()

    async def handle(message: Message) -> Any:
        entered.set()
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()

    async with running(make(source, handle), grace=0):
        await entered.wait()
    assert "left behind" in caplog.text
    over.set()


async def test_acknowledged_on_receive_a_verdict_by_hand_is_the_second() -> None:
    source = Script(delivery(0))
    loop = make(source, at_once, ack="on_receive")
    one = source.waiting[0]
    async with running(loop):
        await eventually(lambda: loop.settled == 1)
        await one.reject("too late")
    assert source.settled() == [0]


async def test_cancelled_it_still_settles_what_is_finished() -> None:
    source, gate = Script(*map(delivery, range(2))), Gate()
    source.hold = lambda settlement: True
    loop = make(source, gate)
    task = asyncio.create_task(loop.run(asyncio.Event(), lambda: 0))
    await eventually(lambda: len(gate.entered) == 1)
    gate.opened.set()
    await eventually(lambda: len(gate.entered) == 2 and loop.running == 0)
    task.cancel()
    await asyncio.sleep(0)
    source.released.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.settled(VerdictKind.ACK) == [0, 1]


# --- connections that are lost ------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["receive", "settle", "stop"])
async def test_a_connection_lost_in_any_phase_ends_the_loop_by_it(hook: str) -> None:
    source = Script(delivery(1))
    loop = make(source, at_once)
    source.fail(hook)
    with pytest.raises(ConnectionLost, match="cut"):
        async with running(loop):
            await eventually(lambda: source.waiting == [] and (loop.settled == 1 or hook == "settle"))
    assert loop.in_hand == 0


async def test_handlers_at_work_end_before_the_connection_is_made_anew() -> None:
    source, gate, finished = Script(*map(delivery, range(5))), Gate(), Finished()
    loop = make(source, gate, concurrency=2, finished=finished)
    task = asyncio.create_task(loop.run(asyncio.Event(), lambda: 0))
    await eventually(lambda: len(gate.entered) == 2)
    source.fail("receive")
    await asyncio.sleep(0.01)
    assert not task.done()
    gate.opened.set()
    with pytest.raises(ConnectionLost):
        await task
    # Those that waited were not begun; those that ended are remembered.
    assert gate.entered == ["0", "1"]
    assert {key[0] for key in finished} | {str(n) for n in source.settled()} == {"0", "1"}


async def test_a_handler_that_never_ends_does_not_keep_the_connection_from_being_made_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_module, "OUTLAST", (0.05, 0.2))
    source, gate = Script(*map(delivery, range(5))), Gate()
    loop = make(source, gate, concurrency=2)
    task = asyncio.create_task(loop.run(asyncio.Event(), lambda: 0))
    await eventually(lambda: len(gate.entered) == 2)
    source.fail("receive")
    with pytest.raises(ConnectionLost):
        async with asyncio.timeout(10):
            await task
    assert gate.entered == ["0", "1"]
    assert loop.is_lost
    assert "when its 2 running handlers have ended" in caplog.text


async def test_what_was_handled_and_not_settled_is_settled_and_not_handled_again() -> None:
    runs: list[str] = []

    async def handle(message: Message) -> Any:
        runs.append(message.id)
        if message.id == "1":
            raise ValueError("retry me")

    finished = Finished()
    first = Script(*map(delivery, range(4)))
    first.fail("settle")
    with pytest.raises(ConnectionLost):
        async with running(make(first, handle, finished=finished)):
            await eventually(lambda: len(runs) == 4)
    assert len(finished) == 4
    # When the broker delivers them again over the next connection
    second = Script(*(delivery(n, count=1) for n in range(4)), delivery(9))
    async with running(make(second, handle, finished=finished)):
        await eventually(lambda: len(second.settled()) == 5)
    assert runs == ["0", "1", "2", "3", "9"]
    assert second.settled(VerdictKind.RETRY) == [1] and sorted(second.settled(VerdictKind.ACK)) == [0, 2, 3, 9]
    assert finished == {}


async def test_another_message_with_the_same_id_is_handled() -> None:
    runs: list[bytes] = []

    async def handle(message: Message) -> Any:
        runs.append(message.body)

    finished = Finished()
    first = Script(delivery(1))
    first.fail("settle")
    with pytest.raises(ConnectionLost):
        async with running(make(first, handle, finished=finished)):
            await eventually(lambda: runs)
    other = Delivery(Message(body=b"other", queue="orders", id="1"), 1, 1)
    second = Script(other)
    async with running(make(second, handle, finished=finished)):
        await eventually(lambda: second.settled())
    assert runs == [b"1", b"other"]


async def test_a_driver_that_fails_to_receive_in_its_own_way_ends_the_loop_loudly() -> None:
    source = Script(delivery(1))
    source.fail("receive", ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(make(source, at_once).run(asyncio.Event(), lambda: 1), 20)


# --- what the broker takes back -------------------------------------------------------------------


async def test_what_is_taken_back_before_its_handler_begins_is_not_run() -> None:
    taken = [delivery(n) for n in range(4)]
    source, gate = Script(*taken), Gate()
    loop = make(source, gate)
    async with running(loop):
        await eventually(lambda: loop.in_hand == 4 and gate.entered == ["0"])
        for one in taken[1:3]:
            one.withdraw()
        gate.opened.set()
        await eventually(lambda: loop.settled == 4)
    assert gate.entered == ["0", "3"]
    assert source.settled(VerdictKind.ACK) == [0, 3] and source.settled(VerdictKind.RELEASE) == [1, 2]


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_handler_at_work_is_cancelled_for_its_own_delivery_alone(stubborn: bool) -> None:
    taken = [delivery(n) for n in range(3)]
    source, gate = Script(*taken), Gate()

    async def handle(message: Message) -> Any:
        try:
            await gate(message)
        except asyncio.CancelledError:
            if not stubborn:
                raise

    loop = make(source, handle)
    async with running(loop):
        await eventually(lambda: gate.entered == ["0"])
        taken[0].abandon()
        await eventually(lambda: gate.entered == ["0", "1"])
        gate.opened.set()
        await eventually(lambda: loop.settled == 3)
    assert source.settled(VerdictKind.RELEASE) == ([] if stubborn else [0])
    assert source.settled(VerdictKind.ACK) == ([0, 1, 2] if stubborn else [1, 2])


async def test_a_retry_that_waits_in_place_ends_when_it_is_taken_back() -> None:
    async def fails(message: Message) -> Any:
        raise ValueError("not yet")

    policy = Retry(delay=3600)
    dispatch = Dispatcher(
        fails, "fails", retry=policy, error_queue="error", max_deliveries=5, in_place=True, features=Features()
    )
    one = delivery(1)
    task = asyncio.create_task(dispatch(one))
    await eventually(lambda: one.wake is not None)
    one.withdraw()
    assert (await task).verdict.kind is VerdictKind.RELEASE
