"""Brokers and consumers that are killed with -9 under load: nothing is lost, order holds, once is once."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamtools import SendError
from streamtools.drivers.kafka import KafkaProducer
from streamtools.settings import KafkaSettings
from streamtools.testing import eventually
from tests.brokers.kafka.node import KafkaCluster, KafkaNode
from tests.drivers.kafka.conftest import records

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
    return Counter(int(number) for what, _, _, number in events(history) if what in ("handled", "end"))


def up(history: Path) -> int:
    return sum(what == "up" for what, *_ in events(history))


async def test_the_leader_is_killed_under_load_and_none_of_50000_is_lost(
    kafka_cluster: KafkaCluster, tmp_path: Path, queue: str
) -> None:
    number, batch, history = 50_000, 250, tmp_path / "history"
    where = KafkaSettings(host=kafka_cluster.address.bootstrap, partitions=2)
    confirmed: set[int] = set()
    async with workers() as start, KafkaProducer(queue, url=where, send_timeout=LONG) as producer:
        await start("all", where.host, queue, str(history))
        await eventually(lambda: up(history), timeout=LONG)

        async def send(first: int) -> None:
            for at in range(first, number, 4 * batch):
                await producer.send_many(range(at, at + batch))
                confirmed.update(range(at, at + batch))

        sending = [asyncio.create_task(send(lane * batch)) for lane in range(4)]
        await eventually(lambda: len(confirmed) > number // 4, timeout=LONG)
        leader = await asyncio.to_thread(kafka_cluster.leader, queue)
        await asyncio.to_thread(leader.kill)
        await asyncio.gather(*sending)
        assert len(confirmed) == number
        await eventually(lambda: len(handled(history)) == number, timeout=LONG)
    await asyncio.to_thread(leader.start)
    bodies = Counter(int(r.value) for r in await records(kafka_cluster.address, queue))
    twice = sum(c - 1 for c in bodies.values()), sum(c - 1 for c in handled(history).values())
    print(f"\n{number} confirmed, 0 lost; {twice[0]} written twice, {twice[1]} handled twice")
    assert set(bodies) == set(range(number))


async def test_of_four_consumers_one_is_killed_and_one_is_added_and_no_keys_order_is_ever_broken(
    own_kafka: KafkaNode, tmp_path: Path, queue: str
) -> None:
    keys, each, history = 60, 150, tmp_path / "history"
    where = KafkaSettings(host=own_kafka.address.bootstrap, partitions=6)
    async with workers() as start, KafkaProducer(queue, url=where) as producer:
        first = [await start("keys", where.host, queue, str(history)) for _ in range(4)]
        await eventually(lambda: up(history) == 4, timeout=LONG)

        async def send() -> None:
            for n in range(each):
                await asyncio.gather(*(producer.send(f"{k} {n}", key=str(k)) for k in range(keys)))

        sending = asyncio.create_task(send())
        await eventually(lambda: len(events(history)) > keys * each // 2, timeout=LONG)
        victim = first[0]
        await victim.kill()
        await eventually(lambda: len(events(history)) > keys * each, timeout=LONG)
        await start("keys", where.host, queue, str(history))
        await sending
        await eventually(lambda: _ended(history) == keys * each, timeout=LONG)
    repeated = _check_order(history, killed=str(victim.pid))
    print(f"\n{keys * each} messages of {keys} keys, none lost, no order broken; {repeated} repeated")


def _ended(history: Path) -> int:
    return len({(key, number) for what, _, key, number in events(history) if what == "end"})


def _check_order(history: Path, *, killed: str) -> int:
    """Each key: none begins before the one before it has ended, and none while another is at work."""
    ended: dict[str, int] = defaultdict(int)  # so many, from 0 on, have ended
    at_work: dict[str, str] = {}
    repeated = 0
    for what, process, key, text in events(history):
        number = int(text)
        if what == "begin":
            assert number <= ended[key], f"{key} {number} began when only {ended[key]} had ended"
            assert at_work.get(key) in (None, killed, process), f"{key} {number} began while one was at work"
            assert at_work.get(key) != process or process == killed, f"{key}: two at once in {process}"
            at_work[key] = process
            repeated += number < ended[key]
        elif what == "end":
            ended[key] = max(ended[key], number + 1)
            if at_work.get(key) == process:
                del at_work[key]
    return repeated


async def test_through_20_kills_each_input_has_its_output_exactly_once(
    own_kafka: KafkaNode, tmp_path: Path, queue: str
) -> None:
    number, out, history = 6000, f"{queue}-out", tmp_path / "history"
    where = KafkaSettings(host=own_kafka.address.bootstrap, partitions=3)
    chance = random.Random(20)  # noqa: S311
    async with workers() as start, KafkaProducer(queue, url=where) as producer:
        sending = asyncio.create_task(producer.send_many(range(number)))
        for kill in range(20):
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
    print(f"\n{number} inputs, 20 kills: {sum(runs.values()) - len(runs)} handled again, {aborted} outputs aborted")
    assert set(found) == set(range(number))
    assert set(found.values()) == {1}


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


async def test_a_broker_that_stays_away_is_told_in_time_and_by_name(own_kafka: KafkaNode, queue: str) -> None:
    async with KafkaProducer(queue, url=own_kafka.url, send_timeout=2) as producer:
        await asyncio.to_thread(own_kafka.kill)
        try:
            with pytest.raises(SendError) as caught:
                await producer.send(1, id="lost")
            assert caught.value.unknown == ("lost",)
        finally:
            await asyncio.to_thread(own_kafka.start)
