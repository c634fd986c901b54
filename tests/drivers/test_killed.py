"""The conformance case of a killed process tells a driver that gives back from one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamtools.testing.conformance.killed as killed
from streamtools.drivers.sqlite.tables import Tables
from streamtools.testing.conformance.killed import KilledCases, kill_holder
from streamtools.testing.conformance.stage import Stage
from tests.drivers import forgetful


@pytest.mark.parametrize("how", ["by_hand", "in_handlers"])
async def test_a_driver_that_gives_nothing_back_fails_the_case(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    async def kill(stage: Stage, how: str) -> None:
        await kill_holder(stage, how)
        taken.append(how)
        monkeypatch.setattr(killed, "TIMEOUT", 5.0)

    stage = Stage(forgetful.ForgetfulConsumer.protocol, f"sqlite:///{tmp_path}/queues.db?lease=1", "orders")
    try:
        with pytest.raises(TimeoutError):
            await KilledCases().test_what_a_killed_process_had_in_hand_comes_back(stage, kill, how)
        assert taken == [how]
    finally:
        await stage.close()


async def test_a_driver_that_does_not_renew_what_it_holds_fails_the_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tables, "renew", lambda self, claim, expires: True)
    stage = Stage("sqlite", f"sqlite:///{tmp_path}/queues.db?lease=1", "orders")
    try:
        with pytest.raises(AssertionError):
            await KilledCases().test_what_a_living_consumer_holds_for_longer_comes_to_no_other(stage, kill_holder)
    finally:
        await stage.close()
