"""The life of one broker process: start, kill -9, freeze, restart, on the same ports and data."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.brokers.address import Address
from tests.brokers.home import Home
from tests.brokers.processes import POLL, BrokerError, end, freeze, spawn

#: Seconds that a node may take until it answers; 4 to 8 on a quiet machine.
START_TIMEOUT = 120.0


class Runs:
    """Something that runs within a `with` block."""

    def start(self) -> None:
        """Start what does not run; returns when it serves."""
        raise NotImplementedError

    def close(self) -> None:
        """Kill it and remove what is its own; safe to repeat."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Node(Runs):
    """One broker process; a subclass says which by the hooks at the end.

    Parameters:
        home: its files lie there.
        name: of its files, and of itself in errors.
        owns_home: whether `close()` removes the home.
    """

    product = "broker"
    #: Where it comes from, for `scripts/brokers`.
    source = "packages"

    def __init__(self, home: Home, name: str, *, owns_home: bool) -> None:
        self.home = home
        self.name = name
        self._owns_home = owns_home
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The node itself, so that kill -9 hits it; None while it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def address(self) -> Address:
        """Everything that a client needs, as data."""
        raise NotImplementedError

    def start(self, *, wait: bool = True) -> None:
        """Start it, on the same ports and data as before; nothing happens when it runs."""
        if self.pid is None:
            self._prepare()
            self._process = spawn(
                self._command(), env=self._environment(), log=self._file("out"), pid_file=self._file("pid")
            )
        if wait:
            self.wait_ready()

    def kill(self) -> None:
        """SIGKILL: no goodbye to clients, nothing flushed; returns when the process is gone."""
        self._end(force=True)

    def stop(self) -> None:
        """SIGTERM: an orderly shutdown, the clients' connections are closed by the protocol."""
        self._end(force=False)

    def restart(self, *, force: bool = False) -> None:
        """Stop (or, with `force`, kill) and start again; returns when it serves."""
        self._end(force=force)
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, until `thaw`."""
        freeze(self._running())

    def thaw(self) -> None:
        """SIGCONT after `freeze`."""
        os.kill(self._running(), signal.SIGCONT)

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Return when it serves; raises BrokerError if it does not."""
        deadline = time.monotonic() + timeout
        while (trouble := self._trouble()) is not None:
            if self.pid is None:
                raise BrokerError(f"{self.product} {self.name} ended while starting.\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise BrokerError(
                    f"{self.product} {self.name} gave no answer in {timeout:g} s: {trouble}\n{self._last_words()}"
                )
            time.sleep(POLL)

    def close(self) -> None:
        """Kill it and, unless it is part of a cluster, remove everything; safe to repeat."""
        self.kill()
        if self._owns_home:
            self.home.close()

    # --- for subclasses ---------------------------------------------------------------------------

    def _prepare(self) -> None:
        """What must be there before each start."""

    def _command(self) -> list[str]:
        """What to run; its process is the broker itself."""
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        """The broker's whole environment; the home's directory stands in it."""
        raise NotImplementedError

    def _trouble(self) -> Exception | None:
        """What still stands against calling it ready."""
        raise NotImplementedError

    def _logs(self) -> Iterable[Path]:
        """Files worth a look after a failure, besides its output."""
        return ()

    # --- how --------------------------------------------------------------------------------------

    def _file(self, suffix: str) -> Path:
        return self.home.directory / f"{self.name}.{suffix}"

    def _end(self, *, force: bool) -> None:
        if self._process is None:
            return
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # a frozen process does not see SIGTERM
            end(pid, force=force)
        self._process.wait()
        self._process = None
        self._file("pid").unlink(missing_ok=True)

    def _running(self) -> int:
        if (pid := self.pid) is None:
            raise BrokerError(f"{self.product} {self.name} is not running; call start() first")
        return pid

    def _last_words(self) -> str:
        logs = [self._file("out"), *self._logs()]
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists())


class Cluster(Runs):
    """Several nodes that know each other; `nodes` one by one. A subclass makes them."""

    home: Home
    nodes: Sequence[Node]

    def start(self) -> None:
        """Start what does not run; returns when all nodes serve and see each other."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.start(), self.nodes))
        self.wait_joined()

    def wait_joined(self, timeout: float = START_TIMEOUT) -> None:
        """Return when every node sees all of them."""
        deadline = time.monotonic() + timeout
        while (seen := self._seen()) < len(self.nodes):
            if time.monotonic() > deadline:
                raise BrokerError(f"{seen} of {len(self.nodes)} nodes joined in {timeout:g} s")
            time.sleep(POLL)

    def close(self) -> None:
        """Kill all and remove everything; safe to repeat."""
        for node in self.nodes:
            node.close()
        self.home.close()

    def _seen(self) -> int:
        """How many nodes every node sees."""
        raise NotImplementedError
