"""Room on the disk: what is sent leaves some, so that a queue that has filled its disk can be emptied again.

An acknowledgement writes, too: a few pages to the log, which are copied into the file from time to time. Hence a send
is refused as soon as the disk could not take it, the log's pages that are not copied yet, and a little more.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from streamtools.drivers.sqlite import schema
from streamtools.drivers.sqlite.requests import Job

#: Bytes that what is sent leaves free for the file to grow, and that the log of an open file has at least.
LEFT: Final = 1024 * 1024
#: On small disks it is this part of the disk.
PART: Final = 16
#: Free bytes with which nothing needs to be looked at.
AMPLE: Final = 2 * schema.LOG_LIMIT


class Room:
    """What a file has of it.

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
