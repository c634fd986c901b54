"""Serves the health of several workers at one port: their parent process listens, and asks the workers.

A socket pair connects the parent with each worker. Both send lines of JSON:

    worker -> parent   {"address": ["127.0.0.1", 8080]}    the health port that the service wants; null when it ends
    parent -> worker   {"ask": 7}
    worker -> parent   {"ask": 7, "report": {...}}          the result of HealthReport.as_dict()

When the parent ends, even by kill -9, the socket is closed, and the worker notices it.
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

#: A worker must answer within this many seconds; if not, its event loop is blocked.
ANSWER_TIMEOUT: Final = 1.0

Address = tuple[str, int]


class ToParent:
    """The worker's end of the socket: answers the parent, and ends this process when the parent has ended.

    Parameters:
        descriptor: the descriptor of the socket that the parent has passed on.
    """

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._endpoint: _Endpoint | None = None
        threading.Thread(target=self._listen, name="streamtools-parent", daemon=True).start()

    def endpoint(self, host: str, port: int, report: Callable[[], HealthReport]) -> _Endpoint:
        """Return what the runner of this worker uses instead of its own health port."""
        self._endpoint = _Endpoint(self, host, port, report)
        return self._endpoint

    def tell(self, what: dict[str, Any]) -> None:
        """Send a line; the parent may have ended."""
        try:
            self._socket.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            return  # the parent has ended, which the thread will notice

    def _listen(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                if self._endpoint is not None:
                    self._endpoint.asked(json.loads(line)["ask"])
        os.kill(os.getpid(), signal.SIGTERM)


class _Endpoint:
    """Replaces the health server of a runner."""

    def __init__(self, parent: ToParent, host: str, port: int, report: Callable[[], HealthReport]) -> None:
        self.host = host
        self.port = port
        self._parent = parent
        self._report = report
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Tell the parent at which address to listen."""
        self._loop = asyncio.get_running_loop()
        self._parent.tell({"address": [self.host, self.port]})

    async def stop(self) -> None:
        """Tell the parent not to ask this worker any more. Safe to repeat."""
        self._loop = None
        self._parent.tell({"address": None})

    def asked(self, number: int) -> None:
        """Answer from the event loop; if the loop is blocked, no answer comes."""
        if (loop := self._loop) is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._answer, number)

    def _answer(self, number: int) -> None:
        self._parent.tell({"ask": number, "report": self._report().as_dict()})


class ToWorker:
    """The parent's end of the socket to one worker process.

    Attributes:
        descriptor: the descriptor of the worker's end, which the worker process inherits.
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
        """Begin to read what the worker sends; call this when the worker process has its end."""
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
        """Return the worker's report; None if it does not answer."""
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
    """The health of one worker.

    Attributes:
        worker: the number of the worker.
        pid: its process; None if there is none.
        state: "dead", "starting", "running", "stopping", or "silent", if its event loop does not answer.
        loops: the loops in its report, see `HealthReport.as_dict()`.
    """

    worker: int
    pid: int | None
    state: str
    live: bool
    ready: bool
    loops: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class WorkersReport:
    """The health of all workers of a command."""

    workers: Sequence[WorkerHealth]

    @property
    def live(self) -> bool:
        """Whether every running worker answers and has no dead loop. A worker that has died does not count."""
        return all(worker.live for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Whether every worker runs, and all their loops are connected and running."""
        return all(worker.ready for worker in self.workers)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON data; `loops` has the loops of all workers."""
        workers = [{n: getattr(w, n) for n in ("worker", "pid", "state", "live", "ready")} for w in self.workers]
        loops = [{"worker": w.worker, **loop} for w in self.workers for loop in w.loops]
        return {"live": self.live, "ready": self.ready, "workers": workers, "loops": loops}


class Reporting(Protocol):
    """The part of a worker that its health endpoints use."""

    #: Its health port: the one that its last process named; None if none has named one yet.
    address: Address | None

    async def health(self) -> WorkerHealth: ...


class WorkersHealth:
    """Serves the health ports that the workers name, as long as the command runs.

    Usually all workers name the same port, and its report has all of them. A worker that has not named a port yet is
    in the report of every port.
    """

    def __init__(self, workers: Sequence[Reporting]) -> None:
        self._workers = workers
        self._servers: dict[Address, HealthServer] = {}

    async def serve(self, address: Address) -> None:
        """Listen at an address, unless we do so already.

        Raises:
            ConnectError: another process uses the port.
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
