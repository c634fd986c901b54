"""Four consumers of one group, each a process: one dies by kill -9, a fifth one comes; the order of keys holds."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from streamtools.drivers.kafka import KafkaProducer
from streamtools.drivers.kafka.consuming.commits import COMMIT_COUNT
from tests.brokers.address import ROOT
from tests.brokers.kafka.address import KafkaAddress
from tests.chaos.history import History
from tests.chaos.process import Service
from tests.chaos.tally import show
from tests.faults.waiting import wait_until

KEYS = 60
PARTITIONS = 12
#: Seconds after which the group counts a silent member as dead.
SESSION = 3
#: Handlers at once, in each process.
CONCURRENCY = 8
#: What a member may have finished and not committed when it dies: all since its last commit, and what is in hand.
IN_DOUBT = COMMIT_COUNT + 100


@asynccontextmanager
async def member(kafka: KafkaAddress, queue: str, record: Path) -> AsyncIterator[Service]:
    """A process of the group; killed at the end unless it has ended."""
    url = f"{kafka.url}?session_timeout={SESSION}"
    options = json.dumps({"ordered_by": "key", "concurrency": CONCURRENCY})
    with record.with_suffix(".log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.keyed", url, queue, str(record), options,
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=log,
        )  # fmt: skip
    try:
        yield Service(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def send(kafka: KafkaAddress, queue: str, stop: asyncio.Event) -> set[tuple[str, int]]:
    """The keys in turns, so that all of them grow together, until told to stop; what was confirmed."""
    confirmed: set[tuple[str, int]] = set()
    async with KafkaProducer(queue, url=kafka.url, partitions=PARTITIONS, send_timeout=120) as producer:
        for number in count():
            if stop.is_set():
                return confirmed
            keys = [f"key-{key}" for key in range(KEYS)]
            await asyncio.gather(*(producer.send(number, key=key) for key in keys))
            confirmed.update((key, number) for key in keys)
    raise AssertionError("not reached")


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.real_kafka("two members that join a group at once")
@pytest.mark.timeout(300)
async def test_members_die_and_come_and_nothing_is_lost_and_every_key_keeps_its_order(
    kafka: KafkaAddress, tmp_path: Path
) -> None:
    queue = f"orders-{secrets.token_hex(4)}"
    record, stop = tmp_path / "record", asyncio.Event()
    history = History(record)

    async def until_all_work(number: int) -> None:
        await wait_until(lambda: len(history.read().by_process) == number, timeout=120)

    async def until_more(number: int) -> None:
        enough = len(history.read().ended) + number
        await wait_until(lambda: len(history.read().ended) >= enough, timeout=120)

    async with AsyncExitStack() as stack:
        sending = asyncio.create_task(send(kafka, queue, stop))
        group = [await stack.enter_async_context(member(kafka, queue, record)) for _ in range(4)]
        await until_all_work(4)
        await until_more(3000)
        await group[0].kill()
        history.killed(group[0].process.pid)
        at_the_kill = history.read().counts()
        await until_more(3000)
        await stack.enter_async_context(member(kafka, queue, record))
        await until_all_work(5)
        at_the_fifth = history.counts()
        await until_more(3000)
        stop.set()
        confirmed = await sending
        await wait_until(lambda: confirmed <= set(history.read().ended), timeout=120)

    show("one of four killed", at_the_kill)
    show("a fifth one at work", at_the_fifth)
    show("at the end", history.read().counts(), confirmed=len(confirmed), by_each=sorted(history.by_process.values()))
    assert history.broken == []
    assert set(history.ended) == confirmed
    assert history.counts()["repeats"] - at_the_kill["repeats"] <= IN_DOUBT
