"""Random bytes on the port of a service: nothing leaves, nothing stands still, nothing grows."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.drivers.http.conftest import request
from tests.drivers.http.fuzzing import corpus, mutated
from tests.drivers.http.test_crowd import process

#: Seconds to go on; set STREAMTOOLS_FUZZ=600 for ten minutes.
SECONDS = float(os.environ.get("STREAMTOOLS_FUZZ", "3"))
#: Where to begin; a failure names it.
SEED = int(os.environ.get("STREAMTOOLS_FUZZ_SEED", "0"))
WORKERS = 4
#: The most that the event loop may work without a pause, in seconds; more in the suite, beside other tests.
STILL = 0.2 if "STREAMTOOLS_FUZZ" in os.environ else 1.0
SERVICE = """
import asyncio, json, logging, sys, time
from datetime import datetime
from typing import Any
from pydantic import BaseModel
from streamtools import HTTP, ConsumerFactory, ConsumerRunner, Message, Retry

class Order(BaseModel):
    id: int
    items: list[str] = []
    when: datetime | None = None
    price: float = 0.0

left = []

class Keep(logging.Handler):
    def emit(self, record):
        if record.exc_info and record.exc_info[1] is not None:
            left.append(f"{record.getMessage()}: {record.exc_info[1]!r}"[:500])

logging.getLogger().addHandler(Keep())
consumers = ConsumerFactory(HTTP, port=0, concurrency=8, retry=Retry(retries=0))

@consumers.route("orders")
async def orders(msg: Order) -> dict:
    return {"id": msg.id}

@consumers.route("search", method="GET")
async def search(msg: dict) -> Any:
    return msg

@consumers.route("text")
async def text(msg: str) -> str:
    return msg[:100]

@consumers.route("raw", method="PUT")
async def raw(msg: Message) -> list:
    return [msg.type, len(msg.body or b""), sorted(msg.headers)[:20]]

def memory():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

async def main():
    worst = 0.0

    async def watch():
        nonlocal worst
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.01)
            worst = max(worst, time.thread_time() - before)

    async with ConsumerRunner(consumers):
        watching = asyncio.create_task(watch())
        print(orders.consumer.address[1], flush=True)
        while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            print(json.dumps({"left": left[:5], "worst": worst, "memory": memory(),
                              "connections": len(orders.consumer._server._connections)}), flush=True)
        watching.cancel()

asyncio.run(main())
"""


async def told(service: asyncio.subprocess.Process) -> dict[str, object]:
    assert service.stdin is not None and service.stdout is not None
    service.stdin.write(b"\n")
    return json.loads(await asyncio.wait_for(service.stdout.readline(), 30))  # type: ignore[no-any-return]


async def knock(port: int, data: bytes, chance: random.Random) -> None:
    """Send it in a few pieces, see what is answered at once, and leave in one of three ways."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(TimeoutError, OSError):
        for _ in range(chance.choice([0, 0, 1, 3])):
            at = chance.randrange(len(data) + 1)
            writer.write(data[:at])
            data = data[at:]
            await asyncio.sleep(0)
        writer.write(data)
        if chance.randrange(4) == 0:
            writer.write_eof()
        async with asyncio.timeout(chance.choice([0.001, 0.02, 0.1])):
            await reader.read(65536)
    writer.close() if chance.randrange(3) else writer.transport.abort()


async def good(port: int) -> None:
    """A good request is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(body=b'{"id": 5}', Content_Type="application/json"))
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert b'{"id":5}' in answer, answer


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.timeout(SECONDS + 120)
async def test_no_bytes_on_a_port_let_anything_leave_stand_still_or_grow(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    seeds = corpus()
    count = 0
    async with process(str(tmp_path / "service.py")) as service:
        assert service.stdout is not None
        port = int(await asyncio.wait_for(service.stdout.readline(), 30))

        async def attack(worker: int, end: float) -> None:
            nonlocal count
            number = 0
            while time.monotonic() < end:
                chance = random.Random(f"{SEED} {worker} {number}")  # noqa: S311
                await knock(port, mutated(chance, seeds), chance)
                number += 1
                count += 1
                if number % 50 == 0:
                    await good(port)

        async def attacked(seconds: float) -> dict[str, object]:
            end = time.monotonic() + seconds
            await asyncio.gather(*(attack(worker, end) for worker in range(WORKERS)))
            return await told(service)

        first = await attacked(min(60, SECONDS / 3))  # until the memory that all this needs is there
        last = await attacked(SECONDS - min(60, SECONDS / 3))
    print(f"{count} requests, seed {SEED}: {first}, then {last}")
    assert not last["left"], last
    assert float(str(last["worst"])) < STILL, last
    assert float(str(last["memory"])) < float(str(first["memory"])) + 60, (first, last)
