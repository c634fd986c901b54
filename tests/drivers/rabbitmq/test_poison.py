"""A message that ends the process which handles it: it is found out, and takes no innocent with it."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from streamtools import Producer
from streamtools.admin import QueueAdmin
from tests.brokers.address import RabbitMQAddress

#: One life of a consumer: it dies by SIGKILL at the poison, or ends when the queue is empty for a while.
LIFE = """
import asyncio, os, signal, sys
from streamtools import Consumer

url, concurrency, record = sys.argv[1], int(sys.argv[2]), sys.argv[3]
consumer = Consumer("orders", url=url, concurrency=concurrency)
last = asyncio.get_event_loop_policy()

@consumer()
async def handle(message: int) -> None:
    if message == 50:
        await asyncio.sleep(0.02)  # others are at work beside it
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.sleep(0.001)
    with open(record, "a") as file:
        file.write(f"{message}\\n")

async def main() -> None:
    running = asyncio.create_task(handle())
    for _ in range(600):
        await asyncio.sleep(0.05)
        if os.path.exists(record + ".stop"):
            break
    consumer.stop(5)
    await running

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 8])
async def test_poison_ends_in_the_error_queue_and_no_innocent_does(
    rabbitmq_vhost: RabbitMQAddress, tmp_path: Path, concurrency: int
) -> None:
    url, record = rabbitmq_vhost.url, tmp_path / "record"
    async with Producer("orders", url=url) as producer:
        await producer.send_many(range(101))
    lives = 0
    async with QueueAdmin(url=url) as admin, asyncio.timeout(110):
        while True:
            lives += 1
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", LIFE, url, str(concurrency), str(record), env=os.environ
            )
            watch = asyncio.create_task(_stop_when_done(admin, record))
            code = await process.wait()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            if code == 0:
                break
            assert code == -9
        failed = await admin.peek("error", 200)

    handled = {int(line) for line in record.read_text().split()}
    assert [m.body for m in failed] == [b"50"]
    assert handled == set(range(101)) - {50}
    assert failed[0].error is not None
    assert "without a verdict" in failed[0].error.reason
    assert lives <= 6


async def _stop_when_done(admin: QueueAdmin, record: Path) -> None:
    while not (
        record.exists() and len(set(record.read_text().split())) == 100 and (await _ready(admin, "error")) >= 1
    ):
        await asyncio.sleep(0.1)
    (record.parent / "record.stop").touch()


async def _ready(admin: QueueAdmin, queue: str) -> int:
    return (await admin.stats(queue)).ready
