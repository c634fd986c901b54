"""Starts worker processes, watches them, starts them again when they die, and ends them together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from streamtools.cli.health import Address, ToWorker, WorkerHealth, WorkersHealth
from streamtools.cli.output import FAILED, USAGE
from streamtools.engine.backoff import backoff
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.errors import StreamToolsError
from streamtools.settings import WORKER_VARIABLE

log: logging.Logger = logging.getLogger("streamtools")

#: A worker is started again this often within RESTART_WINDOW seconds.
RESTARTS: Final = 5
RESTART_WINDOW: Final = 60.0
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class WorkersEnded(StreamToolsError):
    """A worker died too often, or cannot be started at all."""


class Worker:
    """One worker process and its successors.

    Parameters:
        number: its number, from 0 on, which the process finds in STREAMTOOLS_WORKER.
        command: the command line of the process; `--parent FD` is added.
        told: called when a process names its health port.
    """

    def __init__(self, number: int, command: Sequence[str], told: Callable[[Address], None]) -> None:
        self.number = number
        self.address: Address | None = None
        self._command = command
        self._told = told
        self._link: ToWorker | None = None
        #: Whether the present process has named its health port, and has not begun to end.
        self._answers = False
        self._stops = False
        self._deaths: deque[float] = deque()
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process."""
        self._answers = self._stops = False
        link = self._link = ToWorker(self._is_told)
        # Each worker is in its own process group, so that Ctrl-C at the terminal reaches only us. We pass it on once;
        # a second signal would end the worker at once.
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            "--parent",
            str(link.descriptor),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(link.descriptor,),
            process_group=0,
            env={**os.environ, WORKER_VARIABLE: str(self.number)},
        )
        await link.begin()
        log.info("Worker %d is process %d.", self.number, self.process.pid)

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):  # the process has just ended
                self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait until the process has ended, and return its exit code, which is negative for a signal."""
        code = await self.process.wait() if self.process is not None else 0
        if self._link is not None:
            await self._link.close()
        return code

    async def health(self) -> WorkerHealth:
        """Return the health of the worker."""
        process, link = self.process, self._link
        if process is None or process.returncode is not None or link is None:
            return WorkerHealth(worker=self.number, pid=None, state="dead", live=True, ready=False)
        if not self._answers:
            state = "stopping" if self._stops else "starting"
            return WorkerHealth(worker=self.number, pid=process.pid, state=state, live=True, ready=False)
        if (report := await link.ask()) is None:
            return WorkerHealth(worker=self.number, pid=process.pid, state="silent", live=False, ready=False)
        return WorkerHealth(worker=self.number, pid=process.pid, state="running", **report)

    def _is_told(self, address: Address | None) -> None:
        self._answers, self._stops = address is not None, address is None
        if address is not None:
            self.address = address
            self._told(address)

    def pause(self) -> float | None:
        """Return the seconds to wait before the next start; None if it was started too often."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW:
            self._deaths.popleft()
        return backoff(len(self._deaths)) if len(self._deaths) <= RESTARTS else None


class Workers:
    """Supervises a number of workers.

    A worker that dies is started again after a growing pause, RESTARTS times within RESTART_WINDOW seconds. If it
    dies again, or if one ends because of wrong usage, all are ended. SIGTERM and SIGINT are passed on.

    Parameters:
        command: the command line of a worker.
        number: how many workers.
        changes: yields the names of changed files. At each change the workers are replaced; a worker that dies is
            started again only at the next one.
    """

    def __init__(
        self, command: Sequence[str], number: int, changes: Callable[[], AsyncIterator[str]] | None = None
    ) -> None:
        self._changes = changes
        self._workers = [Worker(n, command, self._listen) for n in range(number)]
        self._health = WorkersHealth(self._workers)
        self._listening: set[asyncio.Task[None]] = set()
        self._trouble: asyncio.Future[None] | None = None
        self._stop = asyncio.Event()
        self._generation = 0
        #: Set and replaced by a new event when a file changes; set for good when we stop.
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """Run the workers until a signal, or until they cannot go on, and return the exit code."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self._end)
        try:
            return await self._supervise()
        finally:
            await self._health.stop()
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def _listen(self, address: Address) -> None:
        task = asyncio.create_task(self._health.serve(address), name="streamtools-health")
        self._listening.add(task)
        task.add_done_callback(self._listens)

    def _listens(self, task: asyncio.Task[None]) -> None:
        self._listening.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and self._trouble is not None and not self._trouble.done():
            self._trouble.set_exception(WorkersEnded(str(error)) if isinstance(error, StreamToolsError) else error)

    def _end(self) -> None:
        # A second signal is passed on too: it ends the workers at once.
        self._stop.set()
        self._changed.set()
        self._signal_all()

    def _signal_all(self) -> None:
        for worker in self._workers:
            worker.signal(signal.SIGTERM)

    async def _supervise(self) -> int:
        watching = [asyncio.create_task(self._watch(worker)) for worker in self._workers]
        self._trouble = asyncio.get_running_loop().create_future()
        others: list[asyncio.Future[Any]] = [self._trouble, asyncio.create_task(self._stop.wait())]
        if self._changes is not None:
            others.append(asyncio.create_task(self._replace(self._changes())))
        await asyncio.wait({*watching, *others}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stop.is_set():  # if it is set, they have got a signal, and a second one would end them at once
            self._end()
        results = await asyncio.gather(*watching, return_exceptions=True)
        for other in others:
            other.cancel()
        endings = await asyncio.gather(*others, return_exceptions=True)
        return _exit_code([*results, *(e for e in endings if isinstance(e, Exception))])

    async def _replace(self, changes: AsyncIterator[str]) -> None:
        async for what in changes:
            log.info("%s changed; starting the workers again.", what)
            self._generation += 1
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            self._signal_all()

    async def _watch(self, worker: Worker) -> int:
        """Keep one worker running until we stop, and return its last exit code.

        Raises:
            WorkersEnded: the worker dies again and again.
        """
        while True:
            generation, changed = self._generation, self._changed
            await worker.start()
            if self._stop.is_set() or generation != self._generation:
                worker.signal(signal.SIGTERM)  # the stop or the change came while the process was being started
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
                f"Worker {worker.number} ended {how}, for the {RESTARTS + 1}th time within {RESTART_WINDOW:g} s. "
                "Its own output above says why."
            )
        log.warning("Worker %d ended %s; starting it again in %.1f s.", worker.number, how, pause)
        await is_set_within(self._stop, pause)


def _exit_code(results: Sequence[int | BaseException]) -> int:
    """Return 0 if every worker ended well; a worker that SIGTERM ended before it could handle it counts as well."""
    for result in results:
        if isinstance(result, WorkersEnded):
            log.error("%s", result)
        elif isinstance(result, BaseException):
            raise result
    codes = [result if isinstance(result, int) else FAILED for result in results]
    if USAGE in codes:
        return USAGE
    return FAILED if any(code not in (0, -signal.SIGTERM) for code in codes) else 0
