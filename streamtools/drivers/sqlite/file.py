"""OpenFile: one connection to the file, its name and its room on the disk; used by the database thread alone."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from streamtools.drivers.sqlite import schema
from streamtools.drivers.sqlite.requests import Job
from streamtools.drivers.sqlite.tables import Tables
from streamtools.errors import ConnectionLost

#: What stands beside a database while it is in use: the log, and its index in shared memory.
BESIDE: Final = ("-wal", "-shm")
#: Bytes that what is sent leaves free for the file to grow, and that the log of an open file has at least.
LEFT: Final = 1024 * 1024
#: On small disks it is this part of the disk.
PART: Final = 16
#: Free bytes with which nothing needs to be looked at.
AMPLE: Final = 2 * schema.LOG_LIMIT


class Moved(ConnectionLost):
    """The path leads to another file than the one that is open."""


class OpenFile:
    """The file while a connection to it is open; made by opening it.

    Parameters:
        path: the file's absolute path.

    Raises:
        ConnectError, ConfigurationError: as `schema.check_path` and `schema.connect` do; sqlite3.Error as it comes.
    """

    def __init__(self, path: str) -> None:
        schema.check_path(path)
        self._path = path
        self._connection = schema.connect(path)
        self._run = self._connection.execute
        self.tables: Tables = Tables(self._connection)
        self.room: Room = Room(path, self._run)
        self.room.reserve()
        self._identity = _identity(path)
        self._beside = {path + suffix: _identity(path + suffix) for suffix in BESIDE}
        self._synchronous = ""
        self._changes = 0  # on this connection before the transaction

    # --- transactions -----------------------------------------------------------------------------

    def begin(self, *, full: bool) -> bool:
        """Take the write lock; False when somebody else has it."""
        synchronous = "FULL" if full else "NORMAL"
        try:
            if synchronous != self._synchronous:
                self._run(f"PRAGMA synchronous={synchronous}")
                self._synchronous = synchronous
            self._run("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if not schema.is_busy(error):
                raise
            return False
        self._changes = self._connection.total_changes
        return True

    def commit(self) -> None:
        """End the transaction.

        Raises:
            Moved: what it has written would be lost.
        """
        if self._connection.total_changes != self._changes and self.moved():
            raise self.moved_error()
        self._run("COMMIT")

    def roll_back(self) -> None:
        """Undo the transaction, if there is one."""
        if self._connection.in_transaction:
            self._run("ROLLBACK")
        self.tables.rolled_back()

    # --- the disk ---------------------------------------------------------------------------------

    def cut_log(self) -> None:
        """Have the log begin anew if it has grown: readers or writers may never have let it come to its end."""
        try:
            if os.stat(self._path + "-wal").st_size > schema.LOG_LIMIT:
                self._run("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except FileNotFoundError:
            return
        except sqlite3.Error as error:
            if not schema.is_busy(error):
                raise

    # --- its name ---------------------------------------------------------------------------------

    def moved(self) -> bool:
        """Whether the path leads to another file now, or to none: one system call."""
        try:
            found = os.stat(self._path)
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._identity

    def moved_error(self) -> Moved:
        """The error for a file that was moved."""
        return Moved(
            f"{self._path} was moved, deleted or replaced while it was in use; what is written to the old one "
            "would be lost."
        )

    def close(self, *, moved: bool) -> None:
        """Close the connection.

        Parameters:
            moved: the path leads to another file: leave the old one whole, and nothing of it beside the new one.

        Raises:
            sqlite3.Error: as it comes.
        """
        self.roll_back()
        if moved:
            self._part()
        self._connection.close()

    def _part(self) -> None:
        # A log that stays beside another database is taken for its own by whoever opens it, and damages it.
        with suppress(sqlite3.Error):  # a reader is in the way: the old file lacks the last messages then
            self._run("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
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


class Room:
    """Free room on the disk: what is sent leaves some, so that a queue that has filled its disk can be emptied again.

    An acknowledgement writes, too: a few pages to the log, which are copied into the file from time to time. So a
    send is refused as soon as the disk could not take it, the log's pages that are not copied yet, and a little more.

    Parameters:
        path: of the database.
        run: runs a statement on its connection.
    """

    def __init__(self, path: str, run: Callable[..., sqlite3.Cursor]) -> None:
        self._path = path
        self._directory = str(Path(path).parent)
        self._run = run
        self._page: int = run("PRAGMA page_size").fetchone()[0]

    def reserve(self) -> None:
        """Have the log as large as it is to be at least. Systems that cannot are as well without."""
        with suppress(OSError, AttributeError):
            number = os.open(self._path + "-wal", os.O_RDWR)
            try:
                os.posix_fallocate(number, 0, min(LEFT, self._left()))
            finally:
                os.close(number)

    def check(self, jobs: Iterable[Job]) -> None:
        """Whether what these jobs write has room; outside a transaction, as it may copy the log.

        A transaction that finds no room has made the log larger all the same: better not to begin it. What is sent
        leaves what the rest needs; what is moved may use that.

        Raises:
            NoRoom: there is none.
        """
        new = moved = 0
        for job in jobs:
            new += job.new
            moved += job.moved
        need = 2 * (new + moved)  # as rows and pages; once in the log, and from there once in the file
        disk = os.statvfs(self._directory)
        if disk.f_bavail * disk.f_frsize >= 2 * need + AMPLE:
            return
        _, pages, copied = self._run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        size_of_log = os.path.getsize(self._path + "-wal")
        log = size_of_log if pages == copied else 0  # it begins anew when all is copied
        unused = self._run("PRAGMA freelist_count").fetchone()[0] * self._page
        growth = max(0, need - log) + max(0, need - unused) + (pages - copied) * self._page
        if new:
            left = self._left()  # for the file; and for the log, which whoever opens the file makes so large
            growth += left + max(0, left - size_of_log)
        if self._free() < growth:
            raise schema.no_room(self._path)

    def make(self) -> bool:
        """After a transaction that found none: have the log empty and as large as it is to be; False if it cannot."""
        try:
            busy = self._run("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        except sqlite3.Error:
            return False
        self.reserve()
        return not busy

    def _free(self) -> int:
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize

    def _left(self) -> int:
        found = os.statvfs(self._directory)
        return min(LEFT, found.f_blocks * found.f_frsize // PART)
