"""Messages whose copies the broker refuses: they take nobody's place, up to a limit that the log names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from streamtools.delivery import Settlement
from streamtools.engine import held, settler
from streamtools.errors import SendError
from streamtools.message import Message
from streamtools.testing import eventually
from streamtools.verdicts import VerdictKind
from tests.core.test_loop import Script, delivery, make, running


class Refusing(Script):
    """Takes no copy until a test says so."""

    refuses = True
    declared = 0

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        refused = [s.delivery.message.id for s in settlements if s.outgoing]
        if self.refuses and refused:
            raise SendError("the error queue is full", refused=refused)
        await super()._settle(settlements)

    async def _redeclare(self) -> None:
        self.declared += 1


async def fails_below_ten(message: Message) -> Any:
    if int(message.id) < 10:
        raise ValueError("no")


@pytest.mark.parametrize("prefetch", [1, 2, 10])
@pytest.mark.parametrize("by_key", [False, True])
async def test_more_than_a_prefetch_of_them_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch, prefetch: int, by_key: bool
) -> None:
    monkeypatch.setattr(settler, "REFUSED_DELAY", 0.01)
    monkeypatch.setattr(held, "REDECLARE_INTERVAL", 0)
    source = Refusing(*(delivery(n, key=str(n % 3)) for n in range(60)))
    loop = make(source, fails_below_ten, prefetch=prefetch, by_key=by_key)
    async with running(loop):
        await eventually(lambda: len(source.settled(VerdictKind.ACK)) == 50)
        assert max(source.asked) <= prefetch and loop.in_hand == 10
        source.refuses = False
        await eventually(lambda: len(source.settled(VerdictKind.RETRY)) == 10)
        await eventually(lambda: loop.in_hand == 0)


@pytest.mark.parametrize(("limit", "size"), [(5, 10**9), (10**9, 5)], ids=["number", "bytes"])
async def test_at_the_limit_no_more_is_taken_in_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: int, size: int
) -> None:
    monkeypatch.setattr(settler, "REFUSED_DELAY", 0.01)
    monkeypatch.setattr(held, "HELD_LIMIT", limit)
    monkeypatch.setattr(held, "HELD_BYTES", size)
    source = Refusing(*map(delivery, range(30)))  # of one byte each, the first ten
    loop = make(source, fails_below_ten, prefetch=1)

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "No more" in r.message]

    async with running(loop):
        await eventually(said)
        assert (loop.in_hand, len(source.waiting)) == (5, 25)
        source.refuses = False
        await eventually(lambda: len(source.settled()) == 30)
    assert len(said()) == 1 and "'orders'" in said()[0] and "the error queue is full" in said()[0]


async def test_one_look_at_the_queues_serves_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "REDECLARE_INTERVAL", 3600)
    source = Refusing(*map(delivery, range(20)))
    loop = make(source, fails_below_ten, prefetch=2)
    async with running(loop):
        await eventually(lambda: len(source.settled(VerdictKind.ACK)) == 10 and loop.in_hand == 10)
        assert source.declared == 1
