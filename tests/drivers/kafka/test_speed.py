"""How much runs at once inside one partition, by a clock that only moves when everybody waits for it."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import defaultdict
from itertools import count

import pytest

from streamtools import Message
from streamtools.testing import eventually
from tests.drivers.kafka.conftest import MakeProducer, Running

pytestmark = pytest.mark.real_kafka("making topics")

NUMBER, KEYS = 10_000, 20


class Clock:
    """Sleepers wake in the order of their times; what they slept together is counted once."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleeping: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()

    async def sleep(self, seconds: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleeping, (self.now + seconds, next(self._order), waiter))
        await waiter

    async def run(self) -> None:
        while True:
            asleep = -1
            while len(self._sleeping) != asleep:
                asleep = len(self._sleeping)
                for _ in range(10):
                    await asyncio.sleep(0)
                if asleep < KEYS:  # more may be on their way from the broker
                    await asyncio.sleep(0.001)
            if self._sleeping:
                self.now, _, waiter = heapq.heappop(self._sleeping)
                if not waiter.done():
                    waiter.set_result(None)


@pytest.mark.slow
async def test_by_key_one_partition_is_at_least_eight_times_as_fast_as_one_by_one(
    producer: MakeProducer, running: Running
) -> None:
    chance = random.Random(8)  # noqa: S311
    takes = [chance.uniform(0, 0.005) for _ in range(NUMBER)]
    keys = [str(chance.randrange(KEYS)) for _ in range(NUMBER)]
    clock = Clock()
    seen: dict[str, list[int]] = defaultdict(list)

    async def handle(msg: int, message: Message) -> None:
        await clock.sleep(takes[msg])
        seen[message.key or ""].append(msg)

    sender = await producer(partitions=1)
    await sender.send_messages([_message(sender.queue, n, keys[n]) for n in range(NUMBER)])
    ticking = asyncio.create_task(clock.run())
    async with running(handle, concurrency=32, ordered_by="key"):
        await eventually(lambda: sum(map(len, seen.values())) >= NUMBER, timeout=200)
    ticking.cancel()
    gain = sum(takes) / clock.now
    print(f"\n{sum(takes):.1f} s of handling in {clock.now:.2f} s: {gain:.1f} times as fast")
    assert all(numbers == sorted(numbers) for numbers in seen.values()), "no key's order is broken"
    assert gain >= 8


def _message(queue: str, number: int, key: str) -> Message:
    return Message(body=b"%d" % number, queue=queue, id=str(number), key=key, content_type="application/json")
