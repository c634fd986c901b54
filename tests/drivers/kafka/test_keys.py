"""Many keys in one partition: all of them at work at once, each in its own order."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import pytest

from streamtools import Message, Retry
from streamtools.testing import eventually
from tests.drivers.kafka.conftest import MakeProducer, Running

pytestmark = pytest.mark.real_kafka("making topics")

KEYS = 20
NUMBER = 2000


async def test_all_keys_of_one_partition_are_at_work_at_once_and_each_keeps_its_order(
    producer: MakeProducer, running: Running
) -> None:
    """2,000 messages that take 0 to 5 ms, one in fifty of which fails at first; `benchmarks/kafka_keys.py` takes the
    time of 10,000."""
    history: dict[str, list[int]] = defaultdict(list)
    at_work: set[str] = set()
    most, broken = 0, []
    all_at_once = asyncio.Event()
    chance = random.Random(20)  # noqa: S311

    async def handle(number: int, message: Message) -> None:
        nonlocal most
        key = message.key or ""
        if key in at_work or (history[key] and history[key][-1] >= number):
            broken.append(number)
        at_work.add(key)
        most = max(most, len(at_work))
        if most == KEYS:
            all_at_once.set()
        await all_at_once.wait()
        await asyncio.sleep(chance.uniform(0, 0.005))
        at_work.remove(key)
        if number % 50 == 0 and message.attempt == 1:
            raise ConnectionError("not yet")
        history[key].append(number)

    sender = await producer(partitions=1)
    await asyncio.gather(*(sender.send(n, key=f"key-{n % KEYS}") for n in range(NUMBER)))
    async with running(handle, concurrency=32, ordered_by="key", retry=Retry(delay=0.01)):
        await eventually(lambda: sum(map(len, history.values())) == NUMBER, timeout=120)

    print(f"\n{NUMBER:,} messages of {KEYS} keys: {most} at once, {len(broken)} against the order")
    assert broken == []
    assert most == KEYS
    assert {key: sorted(numbers) for key, numbers in history.items()} == history
    assert {n for numbers in history.values() for n in numbers} == set(range(NUMBER))
