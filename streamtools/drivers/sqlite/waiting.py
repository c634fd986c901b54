"""Consumers in the database thread: those that wait for messages, and the leases of those that have some in hand."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from secrets import randbits
from typing import Any, Final

from streamtools.drivers.sqlite.requests import Answer, Holder, Job, Waiter
from streamtools.drivers.sqlite.rows import Claimed
from streamtools.drivers.sqlite.schema import is_busy
from streamtools.drivers.sqlite.tables import CLAIM_BYTES, Tables
from streamtools.engine.tasks.wake_throttle import WakeThrottle
from streamtools.errors import ConnectionLost

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds between looks for what other processes wrote.
POLL_INTERVAL: Final = 0.025
#: Seconds from a write to the log to its commit, ordinarily (a flush to the disk lies between).
COMMIT_TIMEOUT: Final = 1.0
#: Seconds between checks that the event loop still lives, when nothing else is to be done.
LIFE_CHECK_INTERVAL: Final = 10.0
#: Seconds between looks at leases, and at the size of the log, at most.
CARE_INTERVAL: Final = 1.0


class Waiting:
    """The consumers that wait, and what is known of the messages that they wait for.

    Parameters:
        path: the file.
        tables: its tables.
        lease: seconds.
    """

    def __init__(self, path: str, tables: Tables, lease: float) -> None:
        self._tables = tables
        self.leases: Leases = Leases(tables, lease)
        #: Until they are answered.
        self.waiters: list[Waiter] = []
        #: Something may be ready for any of them.
        self.stirred: bool = False
        self._likely: set[int] = set()  # lanes that are claimed from without a look
        self._ordered = False  # some consumer has an order, so that each settlement may make way
        self._throttle = WakeThrottle()  # of what comes due
        self._changes = OthersChanges(path, tables)
        self._next_poll = 0.0

    def timeout(self) -> float:
        """Seconds for which there is nothing to do unless someone asks."""
        now = time.monotonic()
        timeout = LIFE_CHECK_INTERVAL
        if self.leases.holders:
            timeout = min(timeout, self.leases.next_care - now)
        if self.waiters:
            timeout = 0.0 if self.stirred else min(timeout, self._next_poll - now)
        for waiter in self.waiters:
            if waiter.fresh or not self._likely.isdisjoint(waiter.holder.lanes):
                return 0.0
            if waiter.due is not None and waiter.due < time.time() + timeout:
                timeout = min(timeout, max(waiter.due - time.time(), self._throttle.wait()))
        return max(timeout, 0.0)

    def look(self) -> tuple[list[Waiter], list[Answer]]:
        """Those for whom something is ready, as far as can be seen without a lock; and answers for others.

        Raises:
            sqlite3.Error: as it comes.
        """
        now = time.monotonic()
        changed = self.stirred
        if not changed and now >= self._next_poll:  # whoever looks anyway need not ask
            self._next_poll = now + POLL_INTERVAL
            changed = self._changes.found()
        self.stirred = False
        ready: list[Waiter] = []
        left: list[Waiter] = []
        answers: list[Answer] = []
        for waiter in self.waiters:
            if waiter.cancelled or waiter.holder.closed:
                continue
            found: bool | ConnectionLost = not self._likely.isdisjoint(waiter.holder.lanes)
            if found:
                waiter.fresh = True  # if there is nothing after all, look properly
            elif changed or waiter.fresh or (waiter.due is not None and self._is_ripe(waiter.due, waiter)):
                found = self._find(waiter)
            if isinstance(found, ConnectionLost):
                answers.append((waiter, found))
            elif waiter.once and not found:
                answers.append((waiter, None))
            else:
                left.append(waiter)
                if found:
                    ready.append(waiter)
        self.waiters = left
        return ready, answers

    def _find(self, waiter: Waiter) -> bool | ConnectionLost:
        holder = waiter.holder
        self._ordered = self._ordered or holder.ordered_by is not None
        waiter.fresh, waiter.due = False, None
        found = False
        for lane in holder.lanes:
            ready, due, there = self._tables.look(lane, holder.claim, holder.ordered_by)
            if not there:
                return ConnectionLost("The queue was deleted.")
            found = found or ready
            if due is not None:
                waiter.due = due if waiter.due is None else min(due, waiter.due)
        return found or (waiter.due is not None and self._is_ripe(waiter.due, waiter))

    def _is_ripe(self, due: float, waiter: Waiter) -> bool:
        """A delayed message is due, and it is worth a wake."""
        return due <= time.time() and (waiter.once or not self._throttle.wait())

    def claim(self, waiter: Waiter) -> Claimed | None:
        """Take into hand what is ready for it; within a transaction."""
        holder = waiter.holder
        if holder.closed or waiter.cancelled:
            return None
        now = time.time()
        if holder.expires < now + self.leases.length / 2:
            self.leases.take(holder, now)
        limit = min(waiter.limit, max(1, CLAIM_BYTES // holder.size))
        for lane in holder.lanes:
            taken = self._tables.claim(
                lane, holder.claim, ordered_by=holder.ordered_by, limit=limit, alone=holder.alone, now=now
            )
            if taken is None or len(taken.ids) < limit:
                self._likely.discard(lane)
            else:
                self._likely.add(lane)
            if taken is None:
                continue
            if waiter.due is not None and waiter.due <= now:
                self._throttle.woke(len(taken.ids))
            holder.size = max(taken.sizes[: len(taken.ids)]) or 1
            return taken
        return None

    def committed(self, claims: Sequence[Answer]) -> None:
        """Note what a transaction has made ready; the waiters of these claims are answered."""
        tables = self._tables
        if tables.stirred or self._ordered:
            self.stirred, tables.stirred = True, False
        if tables.filled:
            self._likely |= tables.filled
            tables.filled.clear()
        for waiter, _ in claims:
            self.waiters.remove(waiter)  # type: ignore[arg-type]

    def rolled_back(self) -> None:
        """Trust nothing that was read or written since the last commit."""
        self.stirred = True
        self.leases.rolled_back()


class OthersChanges:
    """Tells whether another connection has written to the file.

    Parameters:
        path: the file.
        tables: its tables.
    """

    def __init__(self, path: str, tables: Tables) -> None:
        self._log = path + "-wal"
        self._tables = tables
        self._version = 0
        self._log_changed = 0.0
        self._asked_at = 0.0

    def found(self) -> bool:
        """Whether one has since the last call.

        Raises:
            sqlite3.Error: as it comes.
        """
        # Asking SQLite takes some file locks; this takes one system call, and idle is what most are
        # most of the time. A commit is written to the log before it counts, so the log has changed
        # by then; should its time deceive us, SQLite is asked once a second all the same.
        now = time.time()
        try:
            changed = os.stat(self._log).st_mtime
        except FileNotFoundError:
            changed = now
        quiet = changed == self._log_changed < self._asked_at - COMMIT_TIMEOUT
        if quiet and 0 <= now - self._asked_at < COMMIT_TIMEOUT:
            return False
        self._log_changed, self._asked_at = changed, now
        before, self._version = self._version, self._tables.run("PRAGMA data_version").fetchone()[0]
        return before != self._version


class Leases:
    """The leases of consumers that have messages in hand.

    Parameters:
        tables: of the file.
        length: seconds.
    """

    def __init__(self, tables: Tables, length: float) -> None:
        self._tables = tables
        self.length: float = length
        #: The consumers that have one.
        self.holders: set[Holder] = set()
        #: When `due` is to be asked, on the monotonic clock.
        self.next_care: float = 0.0
        self._swept = False

    def take(self, holder: Holder, now: float) -> None:
        """Begin the lease of a consumer, or have it last as long as a new one; within a transaction."""
        holder.expires = now + self.length
        self.holders.add(holder)
        if not self._tables.lease(holder.claim, holder.expires):
            # It ran out and others have what was in hand: under a new number, so that settlements
            # of before meet nothing.
            holder.claim = randbits(62)
            self._tables.new_lease(holder.claim, holder.expires)

    def due(self, *, waiting: bool, patience: float) -> list[Job]:
        """Jobs that renew our leases, and that end those of others that have run out.

        Parameters:
            waiting: somebody waits for what comes back.
            patience: of the jobs.

        Raises:
            sqlite3.Error: as it comes.
        """
        self.next_care = time.monotonic() + min(CARE_INTERVAL, self.length / 4)
        self.holders = {holder for holder in self.holders if holder.expires and not holder.closed}
        now = time.time()
        jobs = []
        if any(holder.expires < now + self.length * 2 / 3 for holder in self.holders):
            jobs.append(Job(patience, self._renew, None))
        if waiting and (not self._swept or self._has_expired(now)):
            self._swept = True
            jobs.append(Job(patience, _expire, None))
        return jobs

    def rolled_back(self) -> None:
        """What was just renewed was not."""
        for holder in self.holders:
            holder.expires = min(holder.expires, time.time())

    def _has_expired(self, now: float) -> bool:
        try:
            expiry = self._tables.next_expiry()
        except sqlite3.Error as error:
            if not is_busy(error):
                raise
            return False
        return expiry is not None and expiry <= now

    def _renew(self, tables: Tables, arguments: Sequence[Any]) -> Sequence[Any]:
        expires = time.time() + self.length
        for holder in self.holders:
            holder.expires = expires if tables.renew(holder.claim, expires) else 0.0
        return [None for _ in arguments]


def _expire(tables: Tables, arguments: Sequence[Any]) -> Sequence[Any]:
    if number := tables.expire(time.time()):
        log.warning("%d messages come back: the consumers that had them stopped renewing their lease.", number)
    return [None for _ in arguments]
