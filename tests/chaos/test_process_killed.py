"""The service dies: by kill -9, by SIGTERM, by its own message."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path

import pytest

from tests.chaos.process import Record, kept_alive, running
from tests.chaos.sending import dead_lettered, send
from tests.chaos.service import Job
from tests.chaos.tally import show

#: Deliveries that a service has in hand at most: the consumer's prefetch.
IN_HAND = 100


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_kill_9_of_a_consumer_process_loses_nothing_and_another_goes_on(
    durable_url: str, record: Record, tmp_path: Path
) -> None:
    victim = Record(tmp_path / "victim")
    async with running(durable_url, victim, nap=0.005) as dying, running(durable_url, record, nap=0.005):
        numbers = count(5000)
        while not (victim.read().handled and record.read().handled):
            await send(durable_url, victim, [Job(next(numbers))])  # until both are at work
            await asyncio.sleep(0.05)
        await send(durable_url, victim, map(Job, range(5000)))
        await victim.shows(lambda: len(victim.handled) > 500, "the first process handles its part")
        await dying.kill()
        before = set(victim.read().handled)
        record.confirmed = victim.confirmed - before
        await record.shows(lambda: not record.missing, "the other process handles the rest")

    twice = sum((victim.handled & record.handled).values())
    both = before | set(record.handled)
    show(
        "kill -9 of one of two processes", confirmed=len(victim.confirmed), by_the_victim=len(before),
        by_the_other=len(record.handled), twice=twice, missing=len(victim.confirmed - both),
    )  # fmt: skip
    assert len(before) < 4500, "the kill came too late to prove anything"
    assert both == victim.confirmed
    assert victim.repeats == record.repeats == 0
    assert twice <= IN_HAND, "only what the victim had in hand may be handled again"


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_sigterm_under_load_exits_with_0_and_loses_and_repeats_nothing(
    durable_url: str, record: Record
) -> None:
    async with running(durable_url, record) as first:
        await send(durable_url, record, map(Job, range(500)))
        await record.shows(lambda: len(record.handled) > 100, "the service is at work")
        sending = asyncio.create_task(send(durable_url, record, map(Job, range(500, 5000)), batch=5))
        await record.shows(lambda: len(record.handled) > 700, "it handles while more is sent")
        begun = len(record.confirmed)
        code = await first.terminate()
    by_first = len(record.read().handled)
    async with running(durable_url, record) as second:
        await sending
        await record.shows(lambda: not record.missing, "the second process handles the rest")
        last_code = await second.terminate()

    record.read()
    show("SIGTERM under load", record.counts(), sent_at_sigterm=begun, by_first_process=by_first, exit_code=code)
    assert (code, last_code) == (0, 0)
    assert by_first < 5000, "the signal came too late to prove anything"
    assert record.missing == set()
    assert record.repeats == 0, "what had finished was handled again"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("concurrency", [1, 8])
async def test_a_message_that_kills_its_process_is_found_out_and_takes_no_innocent_with_it(
    durable_url: str, record: Record, concurrency: int
) -> None:
    async with kept_alive(durable_url, record, concurrency=concurrency) as lives:
        innocents = [Job(n) for n in range(200) if n != 100]
        await send(durable_url, record, [*innocents[:100], Job(100, "die"), *innocents[100:]])
        record.confirmed.discard(100)
        await record.shows(lambda: not record.missing, "all innocents are handled", timeout=90)
        async with asyncio.timeout(60):
            while not (failed := await dead_lettered(durable_url)):
                await asyncio.sleep(0.1)
        deaths = list(lives.codes)

    show("poison", record.counts(), concurrency=concurrency, deaths=len(deaths), dead_lettered=len(failed))
    assert set(deaths) == {9}
    assert len(deaths) <= 5, "max_deliveries"
    assert [message.body for message in failed] == [b'{"n":100,"do":"die"}']
    assert failed[0].error is not None
    assert "without a verdict" in failed[0].error.reason
