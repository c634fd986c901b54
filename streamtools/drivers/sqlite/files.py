"""The files that a connection has open, beside those that now have their names."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from streamtools.errors import ConnectionLost

#: What stands beside a database while it is in use: the log, and its index in shared memory.
BESIDE: Final = ("-wal", "-shm")


class Moved(ConnectionLost):
    """The path leads to another file than the one that is open."""


class Files:
    """The database's file and the two beside it, as they were when the connection was opened.

    Parameters:
        path: of the database.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._database = _identity(path)
        self._beside = {path + suffix: _identity(path + suffix) for suffix in BESIDE}

    def moved(self) -> bool:
        """The path leads to another file now, or to none: one system call."""
        return _identity(self._path) != self._database

    def error(self) -> Moved:
        """What to say then."""
        return Moved(
            f"{self._path} was moved, deleted or replaced while it was in use; what is written to the old one "
            "would be lost."
        )

    def part(self, connection: sqlite3.Connection) -> None:
        """Before the connection is closed: leave the old database whole, and nothing of it beside a new one.

        A log that stays beside another database is taken for its own by whoever opens it, and damages it.
        """
        with suppress(sqlite3.Error):  # a reader is in the way: the old file lacks the last messages then
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with suppress(OSError), _alone(os.path.dirname(self._path)):
            for path, ours in self._beside.items():
                if ours is not None and _identity(path) == ours:
                    os.unlink(path)


@contextmanager
def _alone(directory: str) -> Iterator[None]:
    """One process at a time: another may have taken the old log away already, and begun a new one."""
    try:
        import fcntl
    except ImportError:  # Windows, where a file that is open is not moved
        yield
        return
    number = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
