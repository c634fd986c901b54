"""The database thread: the only one that touches the connection.

What is asked of it gathers while its last transaction runs, and goes into the next one together.
A turn is at most two transactions:

    plain (synchronous=NORMAL)   settlements without copies, claims, leases: what a power failure may
                                 undo, since the messages are then delivered again
    full (synchronous=FULL)      what is sent or moved: on the disk before anyone is told so

Both survive the end of any process. While a consumer waits for messages, the thread looks every 25 ms
whether another process has written (the log's time of change, and where that is recent, `PRAGMA
data_version`, a counter in shared memory); writers of its own process it knows of at once.
"""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from secrets import randbits
from typing import Any, Final

from streamtools.drivers.sqlite import schema
from streamtools.drivers.sqlite.files import Files, Moved
from streamtools.drivers.sqlite.requests import Holder, Job, Outcome, Run, Waiter
from streamtools.drivers.sqlite.room import Room
from streamtools.drivers.sqlite.rows import Claimed
from streamtools.drivers.sqlite.tables import CLAIM_BYTES, Tables
from streamtools.engine.tasks.wake_throttle import WakeThrottle
from streamtools.errors import ConnectError, ConnectionLost
from streamtools.settings import SQLiteSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds between looks for what other processes wrote.
POLL_INTERVAL: Final = 0.025
#: Seconds from a write to the log to its commit, ordinarily (a flush to the disk lies between).
COMMIT_TIMEOUT: Final = 1.0
#: Seconds between checks that the event loop still lives, when nothing else is to be done.
LIFE_CHECK_INTERVAL: Final = 10.0
#: Seconds before another try for a lock, and the most of it.
LOCK_DELAY: Final = 0.0005
LOCK_MAX_DELAY: Final = 0.002
#: Seconds between looks at leases, and at the size of the log, at most.
CARE_INTERVAL: Final = 1.0


class Worker:
    """One connection and its thread.

    Parameters:
        path: the file.
        settings: lease and busy_timeout, in seconds.
        post: called in this thread with what has come out of jobs; False when nobody listens any more.
        opened: called in this thread with None once the file is open, or with the error.
        ended: called in this thread when it ends.
        listening: whether the event loop still lives.
    """

    def __init__(
        self,
        path: str,
        settings: SQLiteSettings,
        *,
        post: Callable[[list[Outcome]], None],
        opened: Callable[[BaseException | None], None],
        ended: Callable[[], None],
        listening: Callable[[], bool],
    ) -> None:
        self._path = path
        self._lease = settings.lease
        self._busy_timeout = settings.busy_timeout
        self._post = post
        self._opened = opened
        self._ended = ended
        self._listening = listening
        self._asked: SimpleQueue[Job | Waiter | None] = SimpleQueue()
        self._halt = threading.Event()
        self._waiters: list[Waiter] = []
        self._pace = WakeThrottle()  # of what comes due
        self._jobs: list[Job] = []  # of this turn
        self._holders: set[Holder] = set()
        #: The thread has ended, or is about to: what is asked now may get no answer.
        self.gone: bool = False
        #: Since when it waits for another process to let go of the file.
        self.locked_since: float | None = None
        self._broken: ConnectError | None = None
        self._stopped = False
        self._stirred = False
        self._version = 0
        self._synchronous = ""
        self._next_care = 0.0
        self._swept = False
        self._log_changed = 0.0
        self._asked_at = 0.0
        # A daemon: a process that forgets to close must still be able to end.
        self.thread: threading.Thread = threading.Thread(target=self._main, name="streamtools-sqlite", daemon=True)

    # --- for the event loop ---------------------------------------------------------------------

    def ask(self, what: Job | Waiter) -> None:
        """Have a job done, or a waiter wait."""
        self._asked.put(what)

    def stop(self) -> None:
        """End the thread after what was asked so far; waiting for locks ends at once."""
        self._halt.set()
        self._asked.put(None)

    # --- the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._connection = self._connect()
        except BaseException as error:
            self.gone = True
            self._opened(schema.explain(error, self._path) if isinstance(error, sqlite3.Error | OSError) else error)
            self._ended()
            return
        self._opened(None)
        try:
            while not self._stopped and self._broken is None:
                self._turn()
        except sqlite3.Error as error:
            self._broken = _connect_error(schema.explain(error, self._path))
        except BaseException as error:
            log.exception("The database thread of %s ended.", self._path)
            self._broken = ConnectionLost(f"The database thread of {self._path} ended: {error!r}")
        finally:
            self._end()

    def _connect(self) -> sqlite3.Connection:
        started = time.monotonic()
        while True:
            try:
                schema.check_path(self._path)
                connection = schema.connect(self._path)
                break
            except sqlite3.Error as error:
                if not schema.is_busy(error):
                    raise
                if self._halt.is_set() or time.monotonic() - started > self._busy_timeout:
                    raise ConnectError(schema.locked(self._path, time.monotonic() - started)) from error
                self._halt.wait(random.uniform(0.5, 1) * LOCK_MAX_DELAY)  # nosec B311: a pause
        self._tables = Tables(connection)
        self._room = Room(self._path, connection.execute)
        self._room.reserve()
        self._files = Files(self._path)
        return connection

    def _end(self) -> None:
        gone = self._broken or self._closed()
        self.gone = True  # from here on `ask` is answered by the event loop itself
        try:
            self._roll_back()
            if isinstance(gone, Moved):
                self._files.part(self._connection)
            self._connection.close()
        except sqlite3.Error as error:
            log.warning("Closing %s: %s", self._path, error)
        # What was answered already is not answered again: the first answer holds.
        left: list[Job | Waiter] = [*self._jobs, *self._waiters]
        left += [what for what in self._drain() if what is not None]
        self._jobs, self._waiters = [], []
        self._post([(what, None, gone) for what in left])
        self._ended()

    def _closed(self) -> ConnectionLost:
        return ConnectionLost(f"{self._path} was closed.")

    def _turn(self) -> None:
        jobs = self._jobs = self._gather()
        care = self._care()  # before those who only ask are answered, and wait no more
        if self._broken is not None:
            return
        ready = self._look_around()
        plain = [job for job in jobs if not job.full]
        if plain or ready or care:
            self._transaction([*care, *plain], ready, full=False)
        full = [job for job in jobs if job.full]
        if full and self._broken is None:
            self._transaction(full, [], full=True)
        if self._broken is None:
            self._jobs = []

    # --- waiting --------------------------------------------------------------------------------

    def _gather(self) -> list[Job]:
        jobs = []
        for what in self._drain(self._timeout()):
            if isinstance(what, Job):
                jobs.append(what)
            elif isinstance(what, Waiter):
                self._waiters.append(what)
            else:
                self._stopped = True
        if not self._listening():
            self._stopped = True
        return [job for job in jobs if not job.cancelled]

    def _drain(self, timeout: float = 0.0) -> list[Job | Waiter | None]:
        found = []
        try:
            found.append(self._asked.get(timeout=timeout) if timeout > 0 else self._asked.get_nowait())
            while True:
                found.append(self._asked.get_nowait())
        except Empty:
            return found

    def _timeout(self) -> float:
        """Seconds for which there is nothing to do unless someone asks."""
        if self._waiters and (self._stirred or any(waiter.fresh for waiter in self._waiters)):
            return 0.0
        now = time.monotonic()
        timeout = LIFE_CHECK_INTERVAL
        if self._waiters:
            timeout = POLL_INTERVAL
            if due := [waiter.due for waiter in self._waiters if waiter.due is not None]:
                timeout = min(timeout, max(min(due) - time.time(), self._pace.wait()))
        if any(holder.expires for holder in self._holders):
            timeout = min(timeout, self._next_care - now)
        return max(timeout, 0.0)

    def _look_around(self) -> list[Waiter]:
        """The waiters for whom something is ready, as far as can be seen without a lock."""
        self._waiters = [waiter for waiter in self._waiters if not waiter.cancelled and not waiter.holder.closed]
        if not self._waiters:
            return []
        try:
            stirred = self._stirred or self._has_changed()  # whoever looks anyway need not ask
            self._stirred = False
            now = time.time()
            ripe = now if not self._pace.wait() else 0.0  # what is due by then is to be woken for
            ready = [w for w in self._waiters if self._has_something(w, stirred, now if w.once else ripe)]
            self._answer_once([waiter for waiter in self._waiters if waiter.once and waiter not in ready])
            return ready
        except sqlite3.Error as error:
            if schema.is_busy(error):
                self._stirred = True
                self._halt.wait(LOCK_MAX_DELAY)
            else:
                self._fail(error, [], [*self._waiters])
            return []

    def _answer_once(self, waiters: list[Waiter]) -> None:
        """Tell those who only asked that there is nothing."""
        if waiters:
            self._waiters = [waiter for waiter in self._waiters if waiter not in waiters]
            self._post([(waiter, None, None) for waiter in waiters])

    def _has_changed(self) -> bool:
        if not self._may_have_changed():
            return False
        version: int = self._tables.value("PRAGMA data_version")
        changed = version != self._version
        self._version = version
        return changed

    def _may_have_changed(self) -> bool:
        # Asking SQLite takes some file locks; this takes one system call, and idle is what most are
        # most of the time. A commit is written to the log before it counts, so the log has changed
        # by then; should its time deceive us, SQLite is asked once a second all the same.
        now = time.time()
        try:
            changed = os.stat(self._path + "-wal").st_mtime
        except FileNotFoundError:
            return True
        if (
            changed == self._log_changed < self._asked_at - COMMIT_TIMEOUT
            and 0 <= now - self._asked_at < COMMIT_TIMEOUT
        ):
            return False
        self._log_changed, self._asked_at = changed, now
        return True

    def _has_something(self, waiter: Waiter, stirred: bool, ripe: float) -> bool:
        if waiter.holder.eager:
            waiter.holder.eager = False
            waiter.fresh = True  # if there is nothing after all, look properly
            return True
        if not (stirred or waiter.fresh or (waiter.due is not None and waiter.due <= ripe)):
            return False
        waiter.fresh = False
        waiter.due = None
        found = False
        for lane in waiter.holder.lanes:
            ready, due, there = self._tables.look(lane, waiter.holder.claim, waiter.holder.ordered_by)
            if not there:
                self._fail(ConnectionLost("The queue was deleted."), [], [waiter])
                return False
            found = found or ready or (due is not None and due <= ripe)
            if due is not None:
                waiter.due = due if waiter.due is None else min(due, waiter.due)
        return found

    # --- leases and the log ---------------------------------------------------------------------

    def _care(self) -> list[Job]:
        """From time to time: jobs that renew our leases, and end those of others that have run out."""
        now = time.monotonic()
        if now < self._next_care:
            return []
        self._next_care = now + min(CARE_INTERVAL, self._lease / 4)
        if self._files.moved():
            self._broken = self._files.error()
            return []
        self._cut_log()
        self._holders = {holder for holder in self._holders if not holder.closed}
        wall = time.time()
        jobs = []
        if any(h.expires and h.expires < wall + self._lease * 2 / 3 for h in self._holders):
            jobs.append(Job(self._renew, None, False, self._busy_timeout))
        if self._waiters and (not self._swept or self._has_expired(wall)):
            self._swept = True
            jobs.append(Job(_expire, None, False, self._busy_timeout))
        return jobs

    def _has_expired(self, now: float) -> bool:
        try:
            expiry = self._tables.next_expiry()
        except sqlite3.Error as error:
            if not schema.is_busy(error):
                raise
            return False
        return expiry is not None and expiry <= now

    def _renew(self, tables: Tables, arguments: Sequence[Any]) -> Sequence[Any]:
        expires = time.time() + self._lease
        for holder in self._holders:
            if holder.expires:
                holder.expires = expires if tables.renew(holder.claim, expires) else 0.0
        return [None for _ in arguments]

    def _cut_log(self) -> None:
        """A log that readers or writers never let come to its end grows; have it begin anew."""
        try:
            if os.stat(self._path + "-wal").st_size > schema.LOG_LIMIT:
                self._tables.run("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except FileNotFoundError:
            return
        except sqlite3.Error as error:
            if not schema.is_busy(error):
                raise

    # --- transactions ---------------------------------------------------------------------------

    def _transaction(self, jobs: list[Job], waiters: list[Waiter], *, full: bool, again: bool = False) -> None:
        new, moved = sum(job.new for job in jobs), sum(job.moved for job in jobs)
        try:
            if new or moved:
                self._room.check(new, moved)
            if not self._begin(jobs, waiters, "FULL" if full else "NORMAL"):
                return
            before = self._connection.total_changes
            outcomes = self._perform(jobs, waiters)
            if self._connection.total_changes != before:
                self._stirred = True
                if self._files.moved():
                    raise self._files.error()
            self._tables.run("COMMIT")
        except Exception as error:
            self._roll_back()
            if schema.is_full(error) and self._room.make() and not new and not again:
                self._transaction(jobs, waiters, full=full, again=True)
            elif len(jobs) + len(waiters) == 1 or _is_fatal(error):
                self._fail(error, jobs, waiters)
            else:
                self._one_by_one(jobs, waiters, full=full)
        else:
            served = [what for what, _, _ in outcomes]
            self._waiters = [waiter for waiter in self._waiters if waiter not in served]
            self._post(outcomes)

    def _one_by_one(self, jobs: list[Job], waiters: list[Waiter], *, full: bool) -> None:
        # So that one that cannot be done does not fail the others.
        for job in jobs:
            self._transaction([job], [], full=full)
        for waiter in waiters:
            self._transaction([], [waiter], full=full)

    def _begin(self, jobs: list[Job], waiters: list[Waiter], synchronous: str) -> bool:
        """Take the write lock; those whose patience ends before are failed. False when none is left."""
        if self._synchronous != synchronous:
            self._tables.run(f"PRAGMA synchronous={synchronous}")
            self._synchronous = synchronous
        started = time.monotonic()
        delay = LOCK_DELAY
        while True:
            try:
                self._tables.run("BEGIN IMMEDIATE")
                self.locked_since = None
                return True
            except sqlite3.Error as error:
                if not schema.is_busy(error):
                    raise
            self.locked_since = started
            waited = time.monotonic() - started
            self._lose_patience(jobs, waited)
            self._lose_patience(waiters, waited)
            if not jobs and not waiters:
                self.locked_since = None
                return False
            self._halt.wait(delay * random.uniform(0.5, 1))  # nosec B311: a pause
            delay = min(delay * 2, LOCK_MAX_DELAY)

    def _lose_patience(self, waiting: list[Any], waited: float) -> None:
        lost = [what for what in waiting if what.cancelled or waited > what.patience or self._halt.is_set()]
        if lost:
            waiting[:] = [what for what in waiting if what not in lost]
            error = self._closed() if self._halt.is_set() else ConnectionLost(schema.locked(self._path, waited))
            self._post([(what, None, error) for what in lost])
            self._waiters = [waiter for waiter in self._waiters if waiter not in lost]

    def _perform(self, jobs: Sequence[Job], waiters: Sequence[Waiter]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        kinds: dict[Run, list[Job]] = {}
        for job in jobs:
            kinds.setdefault(job.run, []).append(job)
        for run, alike in kinds.items():
            results = run(self._tables, [job.argument for job in alike])
            for job, result in zip(alike, results, strict=True):
                failed = isinstance(result, BaseException)
                outcomes.append((job, None if failed else result, result if failed else None))
        claims = ((waiter, self._claim(waiter)) for waiter in waiters)
        outcomes.extend((waiter, taken, None) for waiter, taken in claims if taken is not None)
        return outcomes

    def _claim(self, waiter: Waiter) -> Claimed | None:
        holder = waiter.holder
        if holder.closed or waiter.cancelled:
            return None
        now = time.time()
        if holder.expires < now + self._lease / 2:
            self._take_lease(holder, now + self._lease)
        limit = min(waiter.limit, max(1, CLAIM_BYTES // holder.size))
        for lane in holder.lanes:
            taken = self._tables.claim(
                lane, holder.claim, ordered_by=holder.ordered_by, limit=limit, alone=holder.alone, now=now
            )
            if taken is not None:
                if waiter.due is not None and waiter.due <= now:
                    self._pace.woke(len(taken.ids))
                holder.eager = len(taken.ids) == limit
                holder.size = max(taken.sizes[: len(taken.ids)]) or 1
                return taken
        return None

    def _take_lease(self, holder: Holder, expires: float) -> None:
        if not self._tables.lease(holder.claim, expires):
            # It ran out and others have what was in hand: under a new number, so that settlements
            # of before meet nothing.
            holder.claim = randbits(62)
            self._tables.new_lease(holder.claim, expires)
        holder.expires = expires
        self._holders.add(holder)

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._tables.run("ROLLBACK")
        for holder in self._holders:
            holder.expires = min(holder.expires, time.time())  # what was just renewed was not
        self._tables.forget_lanes()

    def _fail(self, error: BaseException, jobs: Sequence[Job], waiters: Sequence[Waiter]) -> None:
        if isinstance(error, sqlite3.Error):
            cause, error = error, schema.explain(error, self._path)
            error.__cause__ = cause
        if _is_fatal(error.__cause__ or error):
            self._broken = _connect_error(error)
        self._waiters = [waiter for waiter in self._waiters if waiter not in waiters]
        failed: list[Job | Waiter] = [*jobs, *waiters]
        self._post([(what, None, error) for what in failed])


def _expire(tables: Tables, arguments: Sequence[Any]) -> Sequence[Any]:
    if number := tables.expire(time.time()):
        log.warning("%d messages come back: the consumers that had them stopped renewing their lease.", number)
    return [None for _ in arguments]


def _is_fatal(error: BaseException) -> bool:
    """The connection is of no more use."""
    return isinstance(error, Moved) or schema.is_fatal(error)


def _connect_error(error: BaseException) -> ConnectError:
    return error if isinstance(error, ConnectError) else ConnectionLost(str(error))
