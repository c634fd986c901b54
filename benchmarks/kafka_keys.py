"""Kafka: one partition, 10,000 messages of 20 keys, each 0 to 5 ms: one by one, and in the order of their keys.

What a consumer of one partition gains by `ordered_by="key", concurrency=32`. The order of every key is checked over
the whole history, and that each message was handled once.

    python -m benchmarks.kafka_keys                  # a broker of its own
    STREAMTOOLS_TEST_KAFKA_URL=kafka://... python -m benchmarks.kafka_keys
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import sys
import time
from collections import defaultdict
from typing import Any

from benchmarks.rounds import Contender, compare
from streamtools import Consumer, Message, Producer
from tests.brokers.kafka.node import KafkaNode

MESSAGES = 10_000
KEYS = 20
#: Seconds that a handler takes at most.
LONGEST = 0.005
ORDERED = 'ordered_by="key", concurrency=32'


async def _handle_all(url: str, **options: Any) -> tuple[float, float]:
    queue = f"bench-{secrets.token_hex(4)}"
    async with Producer(queue, url=url, partitions=1) as producer:
        await asyncio.gather(*(producer.send(n, key=f"key-{n % KEYS}") for n in range(MESSAGES)))
    history: dict[str | None, list[int]] = defaultdict(list)
    left, done = MESSAGES, asyncio.Event()
    chance = random.Random(20)
    begun = (0.0, 0.0)
    consumer = Consumer(queue, url=url, **options)

    @consumer()
    async def handle(number: int, message: Message) -> None:
        nonlocal left, begun
        begun = begun if begun[0] else (time.perf_counter(), time.process_time())
        await asyncio.sleep(chance.uniform(0, LONGEST))
        history[message.key].append(number)
        left -= 1
        if not left:
            done.set()

    running = asyncio.create_task(handle())
    await done.wait()
    measured = time.perf_counter() - begun[0], time.process_time() - begun[1]
    consumer.stop()
    await running
    for key, numbers in history.items():
        if numbers != list(range(numbers[0], MESSAGES, KEYS)):
            raise SystemExit(f"The order of {key} is broken.")
    return measured


def main(rounds: int = 3) -> None:
    """Measure, and say whether the goal is met."""
    logging.disable(logging.ERROR)
    if url := os.environ.get("STREAMTOOLS_TEST_KAFKA_URL"):
        return _measure(url, rounds)
    with KafkaNode() as node:
        _measure(node.url, rounds)


def _measure(url: str, rounds: int) -> None:
    def contender(name: str, **options: Any) -> Contender:
        return Contender(name, lambda: (MESSAGES, *asyncio.run(_handle_all(url, **options))))

    ratios = compare(
        f"{MESSAGES:,} messages of {KEYS} keys in one partition, each 0 to {LONGEST * 1000:g} ms",
        [contender(ORDERED, ordered_by="key", concurrency=32), contender("one by one")],
        rounds=rounds,
    )
    print(f"\nGoal 8x: {ratios[ORDERED]:.1f}x.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
