"""Consumers that are killed with -9 in the middle of transactions, brokers that freeze or stay away."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamtools import SendError
from streamtools.drivers.kafka import KafkaProducer
from streamtools.settings import KafkaSettings
from streamtools.testing import eventually
from tests.brokers.kafka.node import KafkaNode
from tests.drivers.kafka.conftest import records
from tests.lengths import length

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Seconds for all to be done, on a busy machine.
LONG = 300.0


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> None:
    """Histories are read between the looks of `eventually`, which counts as ours."""


class Worker:
    """A process of tests.drivers.kafka.process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, *arguments: str) -> Worker:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.drivers.kafka.process", *arguments, stderr=asyncio.subprocess.DEVNULL
            )
        )

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def workers() -> AsyncIterator[Any]:
    started: list[Worker] = []

    async def start(*arguments: str) -> Worker:
        started.append(await Worker.start(*arguments))
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            await worker.kill()


def events(history: Path) -> list[list[str]]:
    """[what, process, key, number]"""
    if not history.exists():
        return []
    text = history.read_text()
    return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]


def handled(history: Path) -> Counter[int]:
    return Counter(int(number) for what, _, _, number in events(history) if what == "handled")


def up(history: Path) -> int:
    return sum(what == "up" for what, *_ in events(history))


async def test_through_many_kills_each_input_has_its_output_exactly_once(
    own_kafka: KafkaNode, tmp_path: Path, queue: str
) -> None:
    number, kills = length(2000, 6000), length(6, 20)
    out, history = f"{queue}-out", tmp_path / "history"
    where = KafkaSettings(host=own_kafka.address.bootstrap, partitions=3)
    chance = random.Random(20)  # noqa: S311
    async with workers() as start, KafkaProducer(queue, url=where) as producer:
        sending = asyncio.create_task(producer.send_many(range(number)))
        for kill in range(kills):
            worker = await start("exactly", where.host, queue, out, str(history))
            before = len(handled(history))
            await eventually(lambda k=kill: up(history) > k, timeout=LONG)
            await asyncio.sleep(chance.uniform(0, 0.8))
            if chance.random() < 0.7 and before < number:
                await eventually(lambda b=before: len(handled(history)) > b, timeout=LONG)
            await worker.kill()
        await sending
        await start("exactly", where.host, queue, out, str(history))

        async def complete() -> bool:
            return len(await records(own_kafka.address, out, committed=True)) >= number

        await eventually(complete, timeout=LONG)
    found = Counter(int(r.value) for r in await records(own_kafka.address, out, committed=True))
    runs = handled(history)
    aborted = len(await records(own_kafka.address, out)) - sum(found.values())
    print(
        f"\n{number} inputs, {kills} kills: {sum(runs.values()) - len(runs)} handled again, {aborted} outputs aborted"
    )
    assert set(found) == set(range(number))
    assert set(found.values()) == {1}


async def test_a_member_that_was_frozen_and_wakes_up_late_changes_nothing(
    own_kafka: KafkaNode, tmp_path: Path, queue: str
) -> None:
    number, out, history = 3000, f"{queue}-out", tmp_path / "history"
    where = KafkaSettings(host=own_kafka.address.bootstrap)

    async def outputs() -> Counter[int]:
        return Counter(int(r.value) for r in await records(own_kafka.address, out, committed=True))

    async def complete() -> bool:
        return len(await outputs()) == number

    async with workers() as start, KafkaProducer(queue, url=where) as producer:
        await producer.send_many(range(number))
        sleeper = await start("exactly", where.host, queue, out, str(history))
        await eventually(lambda: len(handled(history)) > 50, timeout=LONG)
        os.kill(sleeper.pid, signal.SIGSTOP)
        await start("exactly", where.host, queue, out, str(history))
        await eventually(lambda: up(history) == 2, timeout=LONG)
        before = len(handled(history))
        await eventually(lambda: len(handled(history)) > before + 200, timeout=LONG)
        os.kill(sleeper.pid, signal.SIGCONT)
        await eventually(complete, timeout=LONG)
    assert await outputs() == Counter(range(number))


async def test_a_frozen_broker_delays_and_loses_nothing(own_kafka: KafkaNode, queue: str) -> None:
    where = KafkaSettings(host=own_kafka.address.bootstrap, request_timeout=2)
    async with KafkaProducer(queue, url=where, send_timeout=LONG) as producer:
        await producer.send(0)
        own_kafka.freeze()
        sending = asyncio.create_task(producer.send_many(range(1, 100)))
        await asyncio.sleep(3)
        assert not sending.done()
        own_kafka.thaw()
        await sending
    assert [int(r.value) for r in await records(own_kafka.address, queue)] == list(range(100))


@pytest.mark.parametrize("at_work", [False, True])
async def test_a_broker_that_stays_away_is_told_in_time_and_by_name(
    own_kafka: KafkaNode, queue: str, at_work: bool
) -> None:
    async with KafkaProducer(queue, url=own_kafka.url, send_timeout=2) as producer:
        if at_work:
            await producer.send(0)
        await asyncio.to_thread(own_kafka.kill)
        try:
            with pytest.raises(SendError, match=r"(cannot be reached|no broker answers)") as caught:
                await producer.send(1, id="lost")
            assert caught.value.unknown == ("lost",)
        finally:
            await asyncio.to_thread(own_kafka.start)
