"""Processes and ports of our own: start, look at, end; never anybody else's."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

#: Ports that we choose: above 20000, below where the kernel takes ports for outgoing connections
#: (32768), or one of those could hold a broker's port while it restarts.
PORTS = range(20001, 32000)
#: Seconds between two looks at something that we wait for.
POLL = 0.1


class BrokerError(Exception):
    """A broker could not be started, reached or commanded; the text says what to do."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different; nobody else is given them while this process lives.

    A broker opens its port seconds after it was given it, and leaves it for a while when it is restarted.
    """
    ports: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(ports) == count:
            break
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if _take(port):
                ports.append(port)
    return ports


def _take(port: int) -> bool:
    """Lock the byte at that place of a file; the lock ends with this process."""
    if port in _taken:
        return False
    try:
        fcntl.lockf(_ledger(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _taken.add(port)
    return True


@cache
def _ledger() -> IO[bytes]:
    return (Path(tempfile.gettempdir()) / f"streamtools-ports-{os.getuid()}").open("ab")


_taken: set[int] = set()


def spawn(command: Sequence[str], *, env: dict[str, str], log: Path, pid_file: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that a Ctrl-C here does not reach it."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    pid_file.write_text(str(process.pid))
    return process


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie (dead, not yet collected by its parent) does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    if Path("/proc/self").exists():
        return False
    with suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def belongs(pid: int, mark: str) -> bool:
    """Whether the process carries our mark in its environment: pids are used again after a reboot."""
    environment = Path(f"/proc/{pid}/environ")
    try:
        return mark.encode() in environment.read_bytes()
    except FileNotFoundError:
        return not Path("/proc/self").exists() and is_alive(pid)
    except OSError:
        return False


def freeze(pid: int, timeout: float = 20) -> None:
    """SIGSTOP, and wait until each of its threads has stopped: on a busy machine some go on for a moment."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout
    while set(_thread_states(pid)) - {"T"}:
        if time.monotonic() > deadline:
            raise BrokerError(f"process {pid} does not stop; look at it with: ps -Lfp {pid}")
        time.sleep(POLL / 5)


def _thread_states(pid: int) -> Iterator[str]:
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            yield thread.read_text().rpartition(")")[2].split()[0]


def end(pid: int, *, force: bool = True, timeout: float = 20) -> None:
    """End a process by its pid and wait until it is gone; SIGTERM first unless `force`."""
    for number in (signal.SIGKILL,) if force else (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        if _gone(pid, timeout):
            return
    raise BrokerError(f"process {pid} does not end; look at it with: ps -fp {pid}")


def _gone(pid: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while is_alive(pid):
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL / 5)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True


def end_all(directory: Path) -> None:
    """End every process whose pid file lies in the directory and which really is ours."""
    for file in sorted(directory.glob("*.pid"), reverse=True):
        with suppress(ValueError):
            pid = int(file.read_text())
            if belongs(pid, str(directory)):
                end(pid)
        file.unlink(missing_ok=True)


#: Ends what the pid files name and removes the directory, once its standard input ends.
GUARD = 'cat >/dev/null; for f in "$0"/*.pid; do [ -e "$f" ] && kill -9 "$(cat "$f")" 2>/dev/null; done; rm -rf "$0"'


def guard(directory: Path) -> subprocess.Popen[bytes]:
    """A watcher that cleans up when this process ends in whatever way, kill -9 included."""
    return subprocess.Popen(
        ["/bin/sh", "-c", GUARD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
