"""The conformance cases of event loops tell a driver that is bound to one from those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamtools.testing.conformance.loops as loops
from streamtools.testing.conformance.loops import LoopCases
from streamtools.testing.conformance.stage import Stage
from tests.drivers import cached, forgetful

IN_HAND = "test_what_is_in_hand_when_its_event_loop_ends_comes_again"
CASES = [name for name in dir(LoopCases) if name.startswith("test_") and name != IN_HAND]


@pytest.mark.parametrize("case", CASES)
async def test_a_driver_that_is_bound_to_its_first_event_loop_fails_the_case(tmp_path: Path, case: str) -> None:
    cached.CachedProducer.client = None
    stage = Stage(cached.CachedConsumer.protocol, f"sqlite:///{tmp_path}/queues.db", "orders")
    try:
        with pytest.raises(RuntimeError, match="bound to a different event loop|Event loop is closed"):
            await getattr(LoopCases(), case)(stage)
    finally:
        cached.CachedProducer.client = None
        await stage.close()


async def test_a_driver_that_gives_nothing_back_as_its_event_loop_ends_fails_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "TIMEOUT", 2.0)
    stage = Stage(forgetful.ForgetfulConsumer.protocol, f"sqlite:///{tmp_path}/queues.db", "orders")
    try:
        with pytest.raises(TimeoutError):
            await getattr(LoopCases(), IN_HAND)(stage)
    finally:
        await stage.close()
