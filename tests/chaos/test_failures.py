"""One message in ten fails: its attempts are exact, nobody else notices, and a redrive brings it back once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from streamtools import Consumer, Message, Producer, Retry
from streamtools.admin import QueueAdmin
from streamtools.redrive import redrive
from streamtools.testing import eventually
from tests.brokers.address import ROOT
from tests.chaos.conftest import DURABLE, address
from tests.chaos.sending import dead_lettered
from tests.chaos.tally import show

NUMBER = 5000
FAILING = range(0, NUMBER, 10)
RUNS = 3
#: What the operator must find again.
HEADERS = {"tenant": "Zürich ☂", "x-empty": ""}


@dataclass
class Service:
    """Handles numbers, and fails for one in ten until it is mended."""

    url: str
    mended: bool = False
    runs: Counter[int] = field(default_factory=Counter)
    #: Numbers in the order in which their runs ended.
    order: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """At work in this process; drained at the end."""
        retry = Retry(retries=RUNS - 1, delay=1, backoff=1, jitter=0)
        consumer = Consumer("orders", url=self.url, concurrency=8, retry=retry)
        task = asyncio.create_task(consumer()(self.charge)())
        try:
            yield
        finally:
            consumer.stop()
            async with asyncio.timeout(60):
                await task

    async def charge(self, number: int) -> None:
        """The handler."""
        self.runs[number] += 1
        self.order.append(number)
        if number in FAILING and not self.mended:
            raise ValueError(f"no luck with {number}")


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("protocol", ["asyncio", *DURABLE])
async def test_one_in_ten_of_5_000_fails_and_is_redriven_once(
    request: pytest.FixtureRequest, protocol: str, tmp_path: Path
) -> None:
    url = address(request, protocol, tmp_path)
    service, begin = Service(url), time.time()
    async with service.running():
        async with Producer("orders", url=url) as producer:
            receipts = await producer.send_many(range(NUMBER), headers=HEADERS)
        await eventually(lambda: service.runs.total() == expected().total(), "all runs", timeout=120)
        await eventually(lambda: ready(url, "error", len(FAILING)), "all moves")
    failed = await dead_lettered(url)
    show(
        f"one in ten fails on {protocol}", sent=len(receipts), runs=service.runs.total(),
        attempts_of_each_failing=sorted({service.runs[n] for n in FAILING}),
        others_handled_once=sum(service.runs[n] == 1 for n in range(NUMBER) if n not in FAILING),
        dead_lettered=len(failed), failing_not_over_when_the_last_other_was=not_over(service.order),
    )  # fmt: skip
    assert service.runs == expected()
    assert not_over(service.order) > len(FAILING) / 2, "retries held up the others"
    assert Counter(int(message.body) for message in failed) == Counter(FAILING)
    ids = {number: receipt.id for number, receipt in enumerate(receipts)}
    for message in failed:
        check(message, ids, begin)

    service.mended = True
    async with service.running():
        redriven = await put_back(protocol, url)
        assert redriven == len(FAILING)
        try:
            await eventually(lambda: service.runs.total() >= expected().total() + len(FAILING), timeout=60)
        except TimeoutError as error:
            error.add_note(f"{(service.runs - expected()).total()} of {redriven} are handled")
            async with QueueAdmin(url=url) as admin:
                error.add_note(f"{await admin.list()}")
            raise
    again = service.runs - expected()
    left = len(await dead_lettered(url))
    show(
        f"redriven on {protocol}",
        redriven=redriven,
        handled=len(again),
        repeats=again.total() - len(again),
        left=left,
    )
    assert again == Counter(FAILING)
    assert left == 0


def expected() -> Counter[int]:
    """The runs of each number while the service is broken."""
    return Counter({number: RUNS if number in FAILING else 1 for number in range(NUMBER)})


def not_over(order: list[int]) -> int:
    """The failing numbers that had runs to come when the last of the others was handled."""
    last = max(place for place, number in enumerate(order) if number not in FAILING)
    return len(set(order[last + 1 :]) & set(FAILING))


def check(message: Message, ids: dict[int, str], begin: float) -> None:
    """All that an operator needs is there."""
    number, error = int(message.body), message.error
    assert error is not None
    assert message.id == ids[number]
    assert message.headers == HEADERS
    assert (error.queue, error.exception, error.attempts) == ("orders", "ValueError", RUNS)
    assert error.reason == f"no luck with {number}"
    assert "in charge" in error.traceback
    assert error.handler.endswith("charge")
    assert begin < error.first_failed < error.last_failed < time.time()


async def ready(url: str, queue: str, number: int) -> bool:
    """So many wait there."""
    async with QueueAdmin(url=url) as admin:
        return (await admin.stats(queue)).ready == number


async def put_back(protocol: str, url: str) -> int:
    """Redrive all, by the command line where another process can reach them; how many."""
    if protocol == "asyncio":
        async with QueueAdmin(url=url) as admin:
            return await redrive(admin, "error", failed_in=["orders"])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamtools", "errors", "redrive", "--url", url, "--json",
        "--yes", "--from", "orders",
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return int(json.loads(out)["redriven"])
