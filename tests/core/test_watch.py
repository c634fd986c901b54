"""What blocks the event loop is named while it does so, and what does not is left in peace."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from streamtools.engine.tasks import watch
from streamtools.engine.tasks.watch import watched
from streamtools.testing import eventually

BLOCKED, INTERVAL = 0.3, 0.05


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests do."""
    monkeypatch.setattr(watch, "BLOCKED_TIMEOUT", BLOCKED)
    monkeypatch.setattr(watch, "CHECK_INTERVAL", INTERVAL)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def wait_a_while() -> None:
    time.sleep(2 * BLOCKED)


async def in_a_call() -> None:
    wait_a_while()


async def test_a_handler_that_blocks_is_named_with_the_place_and_the_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with watched():
        await asyncio.sleep(2 * INTERVAL)
        await asyncio.create_task(in_a_call())
        await eventually(lambda: len(warnings(caplog)) == 2)
    [during, behind] = warnings(caplog)
    for text in (during, behind):
        assert "test_watch.in_a_call" in text and "test_watch.wait_a_while" in text and f"{__file__}:" in text
    assert "stood still for 0.3 s" in during or "stood still for 0.4 s" in during
    assert "goes on" in behind


async def test_a_handler_of_a_consumer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    from streamtools import ASYNCIO, CONSUMER_LOOPS, PRODUCERS, ConsumerRunner

    consumer = CONSUMER_LOOPS[ASYNCIO]("watched")
    done = asyncio.Event()

    @consumer()
    async def slow_handler(msg: int) -> None:
        time.sleep(2 * BLOCKED)  # noqa: ASYNC251 - that is what is tested
        done.set()

    async with ConsumerRunner(consumer), PRODUCERS[ASYNCIO]("watched") as producer:
        await producer.send(1)
        await done.wait()
        await eventually(lambda: len(warnings(caplog)) == 2)
    assert all("slow_handler" in text for text in warnings(caplog))


async def test_a_loop_that_is_idle_or_has_much_to_do_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def busy() -> None:
        end = time.monotonic() + 2 * BLOCKED
        while time.monotonic() < end:
            await asyncio.sleep(0)

    with watched():
        await asyncio.sleep(2 * BLOCKED)
        await busy()
    assert warnings(caplog) == []


async def test_the_thread_ends_with_the_last_who_is_watched() -> None:
    def there() -> bool:
        return any(thread.name == "streamtools-watch" for thread in threading.enumerate())

    with watched():
        with watched():
            assert there()
        assert there()
    await eventually(lambda: not there())


STOPPED = """
import asyncio, logging, os
from streamtools.engine.tasks import watch
watch.BLOCKED_TIMEOUT, watch.CHECK_INTERVAL = 0.3, 0.05
logging.basicConfig(level="WARNING", format="%(message)s")

async def main():
    with watch.watched():
        await asyncio.sleep(0.2)
        print("ready", flush=True)
        await asyncio.sleep(1.5)

asyncio.run(main())
"""


def test_a_process_that_was_stopped_blames_nobody() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=20)
    assert errors == ""


def test_what_keeps_the_interpreter_to_itself_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    """No other thread runs meanwhile, the watch neither: by its turn the loop may have gone on, and is not named."""

    async def greedy() -> None:
        end = time.monotonic() + 2 * BLOCKED
        number = 10**7
        while time.monotonic() < end:  # one call that takes long enough, on any machine
            end, number = time.monotonic() + 2 * BLOCKED, 2 * number
            sum(range(number))

    async def main() -> None:
        with watched():
            await asyncio.sleep(2 * INTERVAL)
            await greedy()
            await asyncio.sleep(4 * INTERVAL)

    asyncio.run(main())
    assert any("stood still" in text for text in warnings(caplog))
