"""A service for the runner's tests, run as a process: `python -m tests.core.service SQLITE_URL [MODE]`."""

from __future__ import annotations

import asyncio
import signal
import sys

from streamtools import ConsumerFactory, ConsumerRunner, Retry

url, mode = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "normal"
consumers = ConsumerFactory(url=url, retry=Retry(retries=0), concurrency=4)


def say(*words: object) -> None:
    """A line for the test that reads it."""
    print(*words, flush=True)


@consumers.route("orders")
async def order(number: int) -> None:
    """Slow enough that a signal finds some at work."""
    say("begun", number)
    if mode == "hangs":
        await asyncio.Event().wait()
    await asyncio.sleep(0.02)
    say("done", number)


async def before() -> None:
    """A hook."""
    say("before")


def after() -> None:
    """A hook that is no coroutine."""
    say("after")


def mine(number: int, frame: object) -> None:
    """The host's own handler, which the runner must put back."""
    say("mine")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, mine)
    runner = ConsumerRunner(consumers, on_startup=[before, lambda: say("ready")], on_shutdown=[after])
    runner.run()
    restored = signal.getsignal(signal.SIGTERM) is mine
    say("ended", restored)
