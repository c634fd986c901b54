"""Worker processes: started, watched, started again when they die, and ended together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from streamtools.cli.output import FAILED, USAGE
from streamtools.errors import StreamToolsError
from streamtools.policy import backoff
from streamtools.settings import WORKER_VARIABLE

log: logging.Logger = logging.getLogger("streamtools")

#: How often one worker is started again within WINDOW seconds.
RESTARTS: Final = 5
WINDOW: Final = 60.0
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class WorkersEnded(StreamToolsError):
    """A worker died too often, or cannot be started at all."""


class Worker:
    """One worker process and its successors.

    Parameters:
        number: its number, from 0 on, which it reads in STREAMTOOLS_WORKER.
        command: what to start.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(self, number: int, command: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        self.number = number
        self._command = command
        self._pass_fds = tuple(pass_fds)
        self._deaths: deque[float] = deque()
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process."""
        # A process group of its own: Ctrl-C at the terminal must reach a worker once, from us, because a
        # second signal ends it at once.
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=self._pass_fds,
            process_group=0,
            env={**os.environ, WORKER_VARIABLE: str(self.number)},
        )
        log.info("Worker %d is process %d.", self.number, self.process.pid)

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):  # it ended this moment
                self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the process; its exit code, negative for a signal."""
        return await self.process.wait() if self.process is not None else 0

    def pause(self) -> float | None:
        """The seconds to wait before it is started again; None when that was done too often."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW:
            self._deaths.popleft()
        return backoff(len(self._deaths)) if len(self._deaths) <= RESTARTS else None


class Workers:
    """A number of workers, supervised.

    A worker that dies is started again with a growing pause, RESTARTS times within WINDOW seconds; after
    that, or when one ends by wrong usage, all are ended. SIGTERM and SIGINT are passed on.

    Parameters:
        command: the worker's command line; `--parent FD` is added, a pipe that closes when we end.
        number: how many.
        changes: yields the name of a changed file, upon which the workers are replaced; one that dies then
            waits for the next change.
    """

    def __init__(
        self, command: Sequence[str], number: int, changes: Callable[[], AsyncIterator[str]] | None = None
    ) -> None:
        self._changes = changes
        # Nothing is ever written to it: a worker that reads its end knows that we are gone, even by kill -9.
        self._read, self._write = os.pipe()
        line = [*command, "--parent", str(self._read)]
        self._workers = [Worker(n, line, [self._read]) for n in range(number)]
        self._stop = asyncio.Event()
        self._generation = 0
        #: Set, and replaced by a new one, when a file changes; set for good when we stop.
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """Until a signal, or until the workers cannot go on; the exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._end)
        try:
            return await self._supervise()
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
            os.close(self._read)
            os.close(self._write)

    def _end(self) -> None:
        # A second signal goes on too: it ends the workers at once.
        self._stop.set()
        self._changed.set()
        self._signal_all()

    def _signal_all(self) -> None:
        for worker in self._workers:
            worker.signal(signal.SIGTERM)

    async def _supervise(self) -> int:
        watching = [asyncio.create_task(self._watch(worker)) for worker in self._workers]
        others: list[asyncio.Task[Any]] = [asyncio.create_task(self._stop.wait())]
        if self._changes is not None:
            others.append(asyncio.create_task(self._replace(self._changes())))
        await asyncio.wait({*watching, *others}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():  # a signal has ended them already, and a second one would not be gentle
            self._end()
        results = await asyncio.gather(*watching, return_exceptions=True)
        others[-1].cancel()
        endings = await asyncio.gather(*others, return_exceptions=True)
        return _exit_code([*results, *(e for e in endings if isinstance(e, Exception))])

    async def _replace(self, changes: AsyncIterator[str]) -> None:
        async for what in changes:
            log.info("%s changed; starting the workers anew.", what)
            self._generation += 1
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            self._signal_all()

    async def _watch(self, worker: Worker) -> int:
        """Keep one worker running until we stop; its last exit code.

        Raises:
            WorkersEnded: it dies again and again.
        """
        while True:
            generation, changed = self._generation, self._changed
            await worker.start()
            if self._stop.is_set() or generation != self._generation:
                worker.signal(signal.SIGTERM)  # it came while the process was being made
            code = await worker.ended()
            if self._stop.is_set() or (code == USAGE and self._changes is None):
                return code
            if generation == self._generation:
                await self._after_death(worker, code, changed)
            if self._stop.is_set():
                return 0 if self._changes is not None else code

    async def _after_death(self, worker: Worker, code: int, changed: asyncio.Event) -> None:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if self._changes is not None:
            log.warning("Worker %d ended %s; it starts again when a file changes.", worker.number, how)
            await changed.wait()
            return
        pause = worker.pause()
        if pause is None:
            raise WorkersEnded(
                f"Worker {worker.number} ended {how}, for the {RESTARTS + 1}th time within {WINDOW:g} s. "
                "Its own output above says why."
            )
        log.warning("Worker %d ended %s; starting it again in %.1f s.", worker.number, how, pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stop.wait()


def _exit_code(results: Sequence[int | BaseException]) -> int:
    """0 when every worker ended well; one that was stopped before it could catch the signal did."""
    for result in results:
        if isinstance(result, WorkersEnded):
            log.error("%s", result)
        elif isinstance(result, BaseException):
            raise result
    codes = [result if isinstance(result, int) else FAILED for result in results]
    if USAGE in codes:
        return USAGE
    return FAILED if any(code not in (0, -signal.SIGTERM) for code in codes) else 0


def end_with_parent(descriptor: int) -> None:
    """End this process gracefully when the other end of a pipe closes: whoever watched over it is gone."""

    def wait() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="streamtools-parent", daemon=True).start()
