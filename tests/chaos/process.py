"""The service's processes, seen from a test: started, killed, and read from their record."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.brokers.address import ROOT
from tests.chaos.tally import Tally

#: Seconds between two looks at a record.
LOOK = 0.02


class Record(Tally):
    """What service processes have written down so far; outlives each of them.

    Attributes:
        failed: how often each (number, attempt) failed.
        log: what they say beside it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.log = path.with_suffix(".log")
        self.failed: Counter[tuple[int, int]] = Counter()
        self._rest = b""
        self._position = 0

    def read(self) -> Record:
        """Take in what is new."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._position)
                new = file.read()
            self._position += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                self._note(*line.decode().split())
        return self

    def _note(self, what: str, number: str, attempt: str = "1") -> None:
        if what == "done":
            self.handled[int(number)] += 1
        else:
            self.failed[int(number), int(attempt)] += 1

    async def shows(self, condition: Callable[[], object], what: str, *, timeout: float = 60) -> None:
        """Wait until the record, read anew each time, is so."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self.read()
                    if condition():
                        return
                    await asyncio.sleep(LOOK)
        except TimeoutError:
            log = self.log.read_text()[-2000:] if self.log.exists() else ""
            raise TimeoutError(f"Not true after {timeout:g} s: {what}; {self.counts()}\n{log}") from None


class Service:
    """One life of the service of service.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        assert await self.process.wait() == -signal.SIGKILL, "it had ended before"

    async def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ends()

    async def ends(self) -> int:
        """Wait for its end; the exit code."""
        async with asyncio.timeout(60):
            return await self.process.wait()


class Lives:
    """A service that is started again whenever its process ends, as an orchestrator does.

    Attributes:
        codes: of the lives that have ended.
    """

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.service: Service | None = None

    async def live(self, url: str, record: Record, **options: Any) -> None:
        """For ever."""
        while True:
            async with running(url, record, **options) as self.service:
                self.codes.append(await self.service.process.wait())

    async def kill(self) -> None:
        """SIGKILL the present one."""
        assert self.service is not None
        await self.service.kill()


@asynccontextmanager
async def running(url: str, record: Record, **options: Any) -> AsyncIterator[Service]:
    """A service process; killed at the end unless it has ended."""
    with record.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.service", url, str(record.path), json.dumps(options),
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=log,
        )  # fmt: skip
    try:
        yield Service(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def kept_alive(url: str, record: Record, **options: Any) -> AsyncIterator[Lives]:
    """A service that never stays dead; ended at the end."""
    lives = Lives()
    task = asyncio.create_task(lives.live(url, record, **options))
    try:
        yield lives
    finally:
        task.cancel()
        await asyncio.wait({task})
