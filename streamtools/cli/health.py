"""The health of several workers at one port: their parent process serves it, and asks the workers.

A socket pair connects it with each worker. Lines of JSON go over it:

    worker -> parent   {"address": ["127.0.0.1", 8080]}    where the service wants its health port; null when it ends
    parent -> worker   {"ask": 7}
    worker -> parent   {"ask": 7, "report": {...}}          as HealthReport.as_dict()

When its end is closed, a worker knows that its parent has ended, even by kill -9.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Protocol

from streamtools.observability.health import HealthReport, HealthServer

#: Seconds within which a worker whose event loop runs answers.
ANSWER_TIMEOUT: Final = 1.0

Address = tuple[str, int]


class ToParent:
    """A worker's end: it answers its parent, and ends this process when the parent has ended.

    Parameters:
        descriptor: of the socket that the parent has handed down.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._endpoint: _Endpoint | None = None
        threading.Thread(target=self._listen, name="streamtools-parent", daemon=True).start()

    def endpoint(self, host: str, port: int, report: Callable[[], HealthReport]) -> _Endpoint:
        """What the runner of this worker uses in place of a health port of its own."""
        self._endpoint = _Endpoint(self, host, port, report)
        return self._endpoint

    def tell(self, what: dict[str, Any]) -> None:
        """Send a line; the parent may have ended."""
        try:
            self._socket.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            return  # the parent is gone, and the thread is about to notice

    def _listen(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                if self._endpoint is not None:
                    self._endpoint.asked(json.loads(line)["ask"])
        os.kill(os.getpid(), signal.SIGTERM)


class _Endpoint:
    """Takes the place of the health server in a runner."""

    def __init__(self, parent: ToParent, host: str, port: int, report: Callable[[], HealthReport]) -> None:
        self.host = host
        self.port = port
        self._parent = parent
        self._report = report
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Have the parent listen."""
        self._loop = asyncio.get_running_loop()
        self._parent.tell({"address": [self.host, self.port]})

    async def stop(self) -> None:
        """Have the parent ask this worker no more. Safe to repeat."""
        self._loop = None
        self._parent.tell({"address": None})

    def asked(self, number: int) -> None:
        """Answer from the event loop, so that a blocked one is noticed."""
        if (loop := self._loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._answer, number)

    def _answer(self, number: int) -> None:
        self._parent.tell({"ask": number, "report": self._report().as_dict()})


class ToWorker:
    """The parent's end for one worker process.

    Attributes:
        descriptor: of the worker's end, to be handed down.
    """

    def __init__(self, told: Callable[[Address | None], None]) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.descriptor: int = self._theirs.fileno()
        self._told = told
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def begin(self) -> None:
        """Begin to read what the worker says; the worker has the other end by now."""
        self._theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=self._ours)
        self._reading = asyncio.create_task(self._read(reader), name="streamtools-worker-health")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            said = json.loads(line)
            if "address" in said:
                self._told(tuple(said["address"]) if said["address"] else None)
            elif (future := self._asked.pop(said["ask"], None)) is not None and not future.done():
                future.set_result(said["report"])

    async def ask(self) -> dict[str, Any] | None:
        """The worker's report; None when it does not answer."""
        if self._writer is None or self._writer.is_closing():
            return None
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self._writer.write(json.dumps({"ask": number}).encode() + b"\n")
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await future
        except TimeoutError:
            return None
        finally:
            self._asked.pop(number, None)

    async def close(self) -> None:
        """Close this end. Safe to repeat."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        if self._writer is not None:
            self._writer.close()
        self._ours.close()
        self._theirs.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHealth:
    """One worker.

    Attributes:
        worker: its number.
        pid: its process; None while there is none.
        state: "dead", "starting", "running", "stopping", or "silent": its event loop does not answer.
        loops: as in `HealthReport.as_dict()`.
    """

    worker: int
    pid: int | None
    state: str
    live: bool
    ready: bool
    loops: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class WorkersReport:
    """Every worker of a command."""

    workers: Sequence[WorkerHealth]

    @property
    def live(self) -> bool:
        """Every running worker answers, and none has a dead loop. A worker that died does not count."""
        return all(worker.live for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Every worker is there, and each of its loops is connected and running."""
        return all(worker.ready for worker in self.workers)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON data; `loops` has those of all workers."""
        workers = [{n: getattr(w, n) for n in ("worker", "pid", "state", "live", "ready")} for w in self.workers]
        loops = [{"worker": w.worker, **loop} for w in self.workers for loop in w.loops]
        return {"live": self.live, "ready": self.ready, "workers": workers, "loops": loops}


class Reporting(Protocol):
    """A worker, as its health endpoints know it."""

    #: Its health port: the one that its last process named, until the next process names one.
    address: Address | None

    async def health(self) -> WorkerHealth: ...


class WorkersHealth:
    """The ports at which workers want to be asked, served for as long as the command runs.

    Usually all name the same port, and its report is about all of them. A worker that has not named a port yet is in
    the report of every port.
    """

    def __init__(self, workers: Sequence[Reporting]) -> None:
        self._workers = workers
        self._servers: dict[Address, HealthServer] = {}

    async def serve(self, address: Address) -> None:
        """Listen there, if we do not yet.

        Raises:
            ConnectError: the port is taken.
            ConfigurationError: the tokens cannot be used.
        """
        if address not in self._servers:
            server = self._servers[address] = HealthServer(*address, lambda: self._report(address))
            await server.start()

    async def _report(self, address: Address) -> WorkersReport:
        asked = [worker for worker in self._workers if worker.address in (None, address)]
        return WorkersReport(await asyncio.gather(*(worker.health() for worker in asked)))

    async def stop(self) -> None:
        """Stop listening. Safe to repeat."""
        for server in self._servers.values():
            await server.stop()
