"""The command line as a person types it, on a database of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from streamtools import Consumer, ConsumerFactory, ConsumerRunner, Message, Producer, Retry
from streamtools.cli import output
from streamtools.cli.app import app

ROOT = Path(__file__).parents[2]

Cli = Callable[..., Result]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that no other test uses."""
    return f"sqlite:///{tmp_path}/cli.db"


@pytest.fixture
def cli(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Type a command; STREAMTOOLS_URL points at the test's database."""
    monkeypatch.setenv("STREAMTOOLS_URL", url)
    # Wide enough that a table's cells are not folded.
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        output.out.cache_clear()
        output.err.cache_clear()
        return CliRunner().invoke(app, list(arguments), input=stdin)

    yield run
    output.out.cache_clear()
    output.err.cache_clear()


def lines(result: Result) -> list[Any]:
    """The JSON lines on stdout, which holds nothing else."""
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def received(url: str, queue: str) -> list[Message]:
    """All that waits in a queue, taken out of it."""

    async def take() -> list[Message]:
        found: list[Message] = []
        async with Consumer(queue, url=url, declare=False) as consumer:
            while batch := await consumer.receive(100, timeout=0):
                found += [delivery.message for delivery in batch]
                await asyncio.gather(*(delivery.ack() for delivery in batch))
        return found

    return asyncio.run(take())


def fail_messages(
    url: str,
    queue: str,
    payloads: list[object],
    error: type[Exception],
    *,
    error_queue: str = "error",
    **fields: Any,
) -> None:
    """Send messages to a service whose handler raises `error` for each; they end in the error queue."""
    producer = Producer(queue, url=url)  # here, because loading a driver inside the loop would block it

    async def fail() -> None:
        seen = 0
        complete = asyncio.Event()
        consumers = ConsumerFactory(url=url, retry=Retry(retries=0), error_queue=error_queue)

        @consumers.route(queue)
        async def handle(msg: object) -> None:
            nonlocal seen
            seen += 1
            if seen == len(payloads):
                complete.set()
            raise error(f"no luck with {msg}")

        async with ConsumerRunner(consumers, producer):
            await producer.send_many(payloads, **fields)
            await complete.wait()

    asyncio.run(fail())


class Service:
    """`streamtools ...` as a process of its own, its output in a file."""

    def __init__(self, directory: Path, *arguments: str, url: str) -> None:
        self.log = directory / "output.txt"
        environment = {**os.environ, "STREAMTOOLS_URL": url, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamtools", *arguments],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text()

    def lines(self, beginning: str) -> list[str]:
        """The rest of every line that begins so."""
        return [line.removeprefix(beginning) for line in self.output.splitlines() if line.startswith(beginning)]

    def wait_for(self, beginning: str, number: int = 1) -> list[str]:
        """Wait until so many lines begin so."""
        self.wait_until(lambda: len(self.lines(beginning)) >= number)
        return self.lines(beginning)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """Wait for what can only be looked at."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path: Path, url: str) -> Iterator[Callable[..., Service]]:
    """Start a command as a process in the test's directory; it is ended with the test."""
    started: list[Service] = []

    def run(*arguments: str) -> Service:
        started.append(Service(tmp_path, *arguments, url=url))
        return started[-1]

    yield run
    for service in started:
        service.process.kill()
        service.process.wait()
