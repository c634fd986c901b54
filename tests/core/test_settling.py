"""One message whose settlement fails ends nothing, and is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from streamtools.delivery import Delivery, Settlement, current
from streamtools.engine import settler
from streamtools.engine.settling import Unsettled
from streamtools.errors import ConnectionLost, QueueError, Reject, SendError
from streamtools.message import Message
from streamtools.testing import eventually
from streamtools.verdicts import VerdictKind
from tests.core.test_loop import Script, make, running

#: What a broker of the test takes of a message: raises what it does not.
Takes = Callable[[Message], None]


class Strict(Script):
    """A source that looks at each message before it takes any of the batch, as drivers encode them."""

    def __init__(self, *deliveries: Delivery, takes: Takes) -> None:
        super().__init__(*deliveries)
        self.takes = takes

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            for message in settlement.outgoing:
                self.takes(message)
        await super()._settle(settlements)

    def copies(self) -> dict[str, Message]:
        return {m.id: m for batch in self.batches for s in batch for m in s.outgoing}


def foreign(number: int, **fields: Any) -> Delivery:
    return Delivery(Message(**{"body": b"body %d" % number, "queue": "orders", "id": str(number), **fields}), number)


async def fails(message: Message) -> None:
    raise Reject("it always fails")


def no_header_over(size: int) -> Takes:
    def take(message: Message) -> None:
        if any(len(name) + len(value) > size for name, value in message.headers.items()):
            raise ValueError("a header is too large for this wire")

    return take


def refuses(unfit: Callable[[Message], bool]) -> Takes:
    def take(message: Message) -> None:
        if unfit(message):
            raise SendError("it is too large", refused=[message.id], unfit=[message.id])

    return take


def has_large_header(message: Message) -> bool:
    return any(len(value) > 50 for value in message.headers.values())


@pytest.mark.parametrize("takes", [no_header_over(50), refuses(has_large_header)])
async def test_a_copy_that_cannot_be_carried_goes_with_less_and_says_what_was_left_out(takes: Takes) -> None:
    odd = foreign(3, headers={"large": "x" * 2000, "small": "y"}, type="t", correlation_id="c")
    source = Strict(*(odd if n == 3 else foreign(n) for n in range(10)), takes=takes)
    async with running(make(source, fails, concurrency=4)):
        await eventually(lambda: sorted(source.settled(VerdictKind.REJECT)) == list(range(10)))
    copy = source.copies()["3"]
    assert (copy.body, copy.queue, copy.type, copy.correlation_id) == (b"body 3", "error", "t", "c")
    assert dict(copy.headers) == {"small": "y"}
    assert copy.error is not None and "header large (2,005 bytes)" in copy.error.omitted
    assert "it always fails" in copy.error.reason
    assert all(m.error is not None and not m.error.omitted for id_, m in source.copies().items() if id_ != "3")


async def test_what_only_its_bare_body_passes_goes_in_the_least_form_with_the_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def bare(message: Message) -> None:
        if message.type or message.headers or message.key:
            raise OverflowError("this driver cannot write it")

    source = Strict(foreign(1, type="t", headers={"a": "b"}, key=b"\xff"), foreign(2), takes=bare)
    async with running(make(source, fails)):
        await eventually(lambda: sorted(source.settled(VerdictKind.REJECT)) == [1, 2])
    copy = source.copies()["1"]
    assert (copy.body, copy.key, copy.type, dict(copy.headers)) == (b"body 1", None, None, {})
    assert copy.error is not None
    assert all(name in copy.error.omitted for name in ("type (1 bytes)", "key (1 bytes)", "header a (2 bytes)"))
    assert any(record.exc_info and "OverflowError" in str(record.exc_info) for record in caplog.records)


async def test_what_cannot_be_settled_in_any_form_is_left_with_the_broker_and_nothing_waits_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def never(message: Message) -> None:
        if message.id == "1":
            raise RuntimeError("a bug of the driver")

    source = Strict(*map(foreign, range(1, 30)), takes=never)
    loop = make(source, fails, prefetch=5)
    async with running(loop):
        await eventually(lambda: sorted(source.settled(VerdictKind.REJECT)) == list(range(2, 30)))
        await eventually(lambda: loop.in_hand == 0)
    assert "cannot be settled in any form" in caplog.text and "a bug of the driver" in caplog.text


async def test_a_driver_that_settles_nothing_gives_its_connection_up_before_the_broker_gives_no_more() -> None:
    def never(message: Message) -> None:
        raise RuntimeError("a bug of the driver")

    loop = make(Strict(*map(foreign, range(10)), takes=never), fails, prefetch=4)
    with pytest.raises(ConnectionLost, match="4 deliveries cannot be settled"):
        async with asyncio.timeout(20):
            await loop.run(asyncio.Event(), lambda: 1)


@pytest.mark.parametrize("error", [ValueError("odd"), RecursionError("deep"), KeyError("x"), AssertionError()])
async def test_an_acknowledgement_that_raises_costs_its_own_message_alone(error: Exception) -> None:
    class Odd(Script):
        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            if any(s.delivery.token == 4 and s.verdict.kind is VerdictKind.ACK for s in settlements):
                raise error
            await super()._settle(settlements)

    async def fine(message: Message) -> None: ...

    source = Odd(*map(foreign, range(10)))
    async with running(make(source, fine, concurrency=3)):
        await eventually(lambda: len(source.settled()) == 10)
    assert source.settled(VerdictKind.REJECT) == [4] and len(source.settled(VerdictKind.ACK)) == 9


async def test_a_queue_that_is_missing_is_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler, "REFUSED_DELAY", 0.01)
    tries = 0

    def missing(message: Message) -> None:
        nonlocal tries
        tries += 1
        if tries <= 5:
            raise QueueError("there is no error queue") if tries % 2 else SendError("full", refused=[message.id])

    source = Strict(foreign(1, headers={"a": "b"}), takes=missing)
    async with running(make(source, fails)):
        await eventually(lambda: source.settled(VerdictKind.REJECT) == [1])
    copy = source.copies()["1"]
    assert dict(copy.headers) == {"a": "b"} and copy.error is not None and not copy.error.omitted


async def test_a_body_that_the_broker_finds_too_large_is_insisted_on_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler, "REFUSED_DELAY", 0.01)
    limit = 10

    def large(message: Message) -> None:
        if len(message.body or b"") > limit:
            raise SendError("too large", refused=[message.id], unfit=[message.id])

    source = Strict(foreign(1, body=b"x" * 100, headers={"a": "b"}), foreign(2), takes=large)
    async with running(make(source, fails)):
        await eventually(lambda: source.settled(VerdictKind.REJECT) == [2])
        limit = 1000  # the operator raises it
        await eventually(lambda: sorted(source.settled(VerdictKind.REJECT)) == [1, 2])
    copy = source.copies()["1"]
    assert (copy.body, dict(copy.headers)) == (b"x" * 100, {"a": "b"})


async def test_a_handler_never_runs_on_less_than_its_sender_gave() -> None:
    async def retried(message: Message) -> None:
        raise ValueError("once more")

    odd = foreign(1, headers={"large": "x" * 2000})
    source = Strict(odd, takes=no_header_over(50))
    async with running(make(source, retried)):
        await eventually(lambda: source.settled(VerdictKind.REJECT) == [1])
    copy = source.copies()["1"]
    assert (copy.queue, copy.attempt) == ("error", 1)


async def test_a_copy_that_only_its_traceback_makes_too_large_is_retried_whole() -> None:
    async def retried(message: Message) -> None:
        raise ValueError("once more")

    odd = foreign(1, headers={"large": "x" * 2000})
    source = Strict(odd, takes=refuses(lambda m: m.error is not None and bool(m.error.traceback)))
    async with running(make(source, retried)):
        await eventually(lambda: source.settled(VerdictKind.RETRY) == [1])
    copy = source.copies()["1"]
    assert (copy.queue, copy.attempt, len(copy.headers["large"])) == ("orders", 2, 2000)
    assert copy.error is not None and copy.error.omitted == "traceback"


async def test_a_neighbour_that_sends_under_the_id_of_what_is_refused_keeps_its_verdict(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Tells(Script):
        """It knows the refused messages by themselves, and not by their ids alone."""

        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            sent = [m for s in settlements for m in s.outgoing]
            if refused := [m for m in sent if m.queue == "nowhere"]:
                error = SendError("there is no such queue", refused=["same"] * len(refused))
                error.messages = refused
                raise error
            await super()._settle(settlements)

    both = asyncio.Barrier(2)

    async def send(message: Message) -> None:
        await both.wait()  # their settlements are tried in one batch
        where = "nowhere" if message.id == "1" else "others"
        current.get().outgoing += (Message(body=message.body, queue=where, id="same"),)

    source = Tells(foreign(1), foreign(2))
    async with running(make(source, send, concurrency=2)):
        await eventually(lambda: len(source.settled()) == 2)
    assert (source.settled(VerdictKind.ACK), source.settled(VerdictKind.RETRY)) == ([2], [1])
    assert "failed on message 1" in caplog.text and "failed on message 2" not in caplog.text


@pytest.mark.parametrize("ack", ["after", "manual"])
async def test_a_verdict_by_hand_goes_with_less_as_well(ack: Any) -> None:
    async def by_hand(message: Message) -> None:
        await given[message.id].reject("by hand")

    deliveries = [foreign(1, headers={"large": "x" * 2000}), foreign(2)]
    given = {d.message.id: d for d in deliveries}
    source = Strict(*deliveries, takes=no_header_over(50))
    loop = make(source, by_hand, ack=ack)
    async with running(loop):
        await eventually(lambda: sorted(source.settled(VerdictKind.REJECT)) == [1, 2])
        await eventually(lambda: loop.in_hand == 0)


async def test_a_verdict_by_hand_that_cannot_be_given_says_so_to_who_gives_it() -> None:
    raised: list[BaseException] = []

    async def by_hand(message: Message) -> None:
        try:
            await odd.reject("by hand")
        except SendError as error:
            raised.append(error)

    def never(message: Message) -> None:
        raise RuntimeError("a bug of the driver")

    odd = foreign(1)
    loop = make(Strict(odd, takes=never), by_hand)
    async with running(loop):
        await eventually(lambda: raised and loop.in_hand == 0)
    assert isinstance(raised[0], Unsettled) and isinstance(raised[0].__cause__, RuntimeError)


async def test_what_raises_on_the_way_to_the_handler_rejects_that_message(caplog: pytest.LogCaptureFixture) -> None:
    async def fine(message: Message) -> None: ...

    source = Script(*map(foreign, range(5)))
    loop = make(source, fine)
    inner = loop.decider

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        async def __call__(self, delivery: Delivery) -> Settlement:
            if delivery.token == 2:
                raise RuntimeError("a bug of ours")
            return await inner(delivery)

    loop._settler.decider = Broken()
    async with running(loop):
        await eventually(lambda: len(source.settled()) == 5)
    assert source.settled(VerdictKind.REJECT) == [2] and "a bug of ours" in caplog.text


async def test_an_acknowledgement_on_receive_that_raises_holds_nothing_up() -> None:
    class Odd(Script):
        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            if any(s.delivery.token == 4 for s in settlements):
                raise ValueError("odd")
            await super()._settle(settlements)

    seen: list[str] = []

    async def handler(message: Message) -> None:
        seen.append(message.id)

    async with running(make(Odd(*map(foreign, range(8))), handler, ack="on_receive")):
        await eventually(lambda: len(seen) == 8)
