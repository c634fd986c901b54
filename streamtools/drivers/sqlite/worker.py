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
import random
import sqlite3
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from streamtools.drivers.sqlite import schema
from streamtools.drivers.sqlite.file import Moved, OpenFile
from streamtools.drivers.sqlite.requests import Answer, Job, Request, Run, Waiter
from streamtools.drivers.sqlite.waiting import Waiting
from streamtools.errors import ConnectError, ConnectionLost
from streamtools.settings import SQLiteSettings

if TYPE_CHECKING:
    from streamtools.drivers.sqlite.database import Database

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds before another try for a lock, and the most of it.
LOCK_DELAY: Final = 0.0005
LOCK_MAX_DELAY: Final = 0.002


class Worker:
    """The thread.

    Parameters:
        path: the file.
        settings: lease and busy_timeout, in seconds.
        owner: is told in the event loop what becomes of the thread and of requests.
    """

    def __init__(self, path: str, settings: SQLiteSettings, owner: Database) -> None:
        self._path = path
        self._settings = settings
        self._owner = owner
        #: What is to be done; None to end the thread after what was asked before.
        self.inbox: SimpleQueue[Request | None] = SimpleQueue()
        self._halt = threading.Event()
        self._plain: list[Job] = []  # of this turn
        self._full: list[Job] = []
        #: The thread has ended, or is about to: what is asked now may get no answer.
        self.gone: bool = False
        #: Since when it waits for another process to let go of the file.
        self.locked_since: float | None = None
        self._broken: ConnectError | None = None
        self._stopped = False
        # A daemon: a process that forgets to close must still be able to end.
        self.thread: threading.Thread = threading.Thread(target=self._main, name="streamtools-sqlite", daemon=True)

    def stop(self) -> None:
        """End the thread after what was asked so far; waiting for locks ends at once."""
        self._halt.set()
        self.inbox.put(None)

    def _main(self) -> None:
        try:
            self._file = self._open()
        except BaseException as error:
            self.gone = True
            said = schema.explain(error, self._path) if isinstance(error, sqlite3.Error | OSError) else error
            self._owner.tell(self._owner.opened, said)
            self._owner.tell(self._owner.ended)
            return
        self._waiting = Waiting(self._path, self._file.tables, self._settings.lease)
        self._owner.tell(self._owner.opened, None)
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

    def _open(self) -> OpenFile:
        started = time.monotonic()
        while True:
            try:
                return OpenFile(self._path)
            except sqlite3.Error as error:
                if not schema.is_busy(error):
                    raise
                waited = time.monotonic() - started
                if self._halt.is_set() or waited > self._settings.busy_timeout:
                    raise ConnectError(schema.locked(self._path, waited)) from error
                self._halt.wait(random.uniform(0.5, 1) * LOCK_MAX_DELAY)  # nosec B311: a pause

    def _end(self) -> None:
        gone = self._broken or self._closed()
        self.gone = True  # from here on the event loop answers by itself
        try:
            self._file.close(moved=isinstance(gone, Moved))
        except sqlite3.Error as error:
            log.warning("Closing %s: %s", self._path, error)
        # What was answered already is not answered again: the first answer holds.
        left: list[Request] = [*self._plain, *self._full, *self._waiting.waiters]
        while not self.inbox.empty():
            if (request := self.inbox.get_nowait()) is not None:
                left.append(request)
        self._owner.tell(self._owner.answer, [(request, gone) for request in left if request.future is not None])
        self._plain, self._full, self._waiting.waiters = [], [], []
        self._owner.tell(self._owner.ended)

    def _closed(self) -> ConnectionLost:
        return ConnectionLost(f"{self._path} was closed.")

    # --- turns ------------------------------------------------------------------------------------

    def _turn(self) -> None:
        waiting = self._waiting
        self._gather()
        if time.monotonic() >= waiting.leases.next_care:
            self._care()  # before those who only ask are answered, and wait no more
        ready = self._look() if waiting.waiters and self._broken is None else []
        if (self._plain or ready) and self._broken is None:
            self._transaction(self._plain, ready, full=False)
        if self._full and self._broken is None:
            self._transaction(self._full, [], full=True)
        if self._broken is None:
            self._plain, self._full = [], []

    def _gather(self) -> None:
        """Wait until there is something to do, and take all that is asked."""
        inbox = self.inbox
        timeout = self._waiting.timeout() if inbox.empty() else 0.0
        try:
            requests = [inbox.get(timeout=timeout)]
        except Empty:
            self._stopped = timeout > 0 and not self._owner.listens()
            return
        while not inbox.empty():
            requests.append(inbox.get_nowait())
        for request in requests:
            if isinstance(request, Waiter):
                self._waiting.waiters.append(request)
            elif isinstance(request, Job):
                if not request.cancelled:
                    (self._full if request.full else self._plain).append(request)
            else:
                self._stopped = True

    def _care(self) -> None:
        """What is to be done from time to time."""
        if self._file.moved():
            self._broken = self._file.moved_error()
            return
        self._file.cut_log()
        patience = self._settings.busy_timeout
        self._plain[:0] = self._waiting.leases.due(waiting=bool(self._waiting.waiters), patience=patience)

    def _look(self) -> list[Waiter]:
        """The waiters for whom something is ready; those who only ask, and for whom nothing is, are told so."""
        try:
            ready, answers = self._waiting.look()
        except sqlite3.Error as error:
            if schema.is_busy(error):
                self._waiting.stirred = True
                self._halt.wait(LOCK_MAX_DELAY)
            else:
                self._fail(error, [], [*self._waiting.waiters])
            return []
        if answers:
            self._owner.tell(self._owner.answer, answers)
        return ready

    # --- transactions -----------------------------------------------------------------------------

    def _transaction(self, jobs: list[Job], waiters: list[Waiter], *, full: bool, again: bool = False) -> None:
        file = self._file
        try:
            if full:
                file.room.check(jobs)
            if not (file.begin(full=full) or self._wait_for_lock(jobs, waiters, full=full)):
                return
            answers = self._perform(jobs, waiters)
            file.commit()
        except Exception as error:
            self._undo(error, jobs, waiters, full=full, again=again)
        else:
            self._owner.tell(self._owner.answer, answers)
            self._waiting.committed(answers[len(jobs) :])

    def _perform(self, jobs: Sequence[Job], waiters: Sequence[Waiter]) -> list[Answer]:
        answers: list[Answer] = []
        kinds: dict[Run, tuple[list[Job], list[Any]]] = {}
        for job in jobs:
            alike, arguments = kinds.setdefault(job.run, ([], []))
            alike.append(job)
            arguments.append(job.argument)
        for run, (alike, arguments) in kinds.items():
            answers += zip(alike, run(self._file.tables, arguments), strict=True)
        for waiter in waiters:
            if (taken := self._waiting.claim(waiter)) is not None:
                answers.append((waiter, taken))
        return answers

    def _undo(self, error: Exception, jobs: list[Job], waiters: list[Waiter], *, full: bool, again: bool) -> None:
        """Roll back, and do again what can be done."""
        self._file.roll_back()
        self._waiting.rolled_back()
        if schema.is_full(error) and self._file.room.make() and not again and not any(job.new for job in jobs):
            self._transaction(jobs, waiters, full=full, again=True)
        elif len(jobs) + len(waiters) == 1 or _is_fatal(error):
            self._fail(error, jobs, waiters)
        else:  # so that one that cannot be done does not fail the others
            for job in jobs:
                self._transaction([job], [], full=full)
            for waiter in waiters:
                self._transaction([], [waiter], full=full)

    def _wait_for_lock(self, jobs: list[Job], waiters: list[Waiter], *, full: bool) -> bool:
        """Begin as soon as the lock is free; those whose patience ends before are failed. False if none is left."""
        started = self.locked_since = time.monotonic()
        delay = LOCK_DELAY
        try:
            while jobs or waiters:
                self._halt.wait(delay * random.uniform(0.5, 1))  # nosec B311: a pause
                delay = min(delay * 2, LOCK_MAX_DELAY)
                if self._file.begin(full=full):
                    return True
                waited = time.monotonic() - started
                self._lose_patience(jobs, waited)
                self._lose_patience(waiters, waited)
            return False
        finally:
            self.locked_since = None

    def _lose_patience(self, waiting: list[Any], waited: float) -> None:
        halted = self._halt.is_set()
        lost = [request for request in waiting if request.cancelled or waited > request.patience or halted]
        if lost:
            waiting[:] = [request for request in waiting if request not in lost]
            self._answer_all(lost, self._closed() if halted else ConnectionLost(schema.locked(self._path, waited)))

    def _fail(self, error: BaseException, jobs: Sequence[Job], waiters: Sequence[Waiter]) -> None:
        if isinstance(error, sqlite3.Error):
            cause, error = error, schema.explain(error, self._path)
            error.__cause__ = cause
        if _is_fatal(error.__cause__ or error):
            self._broken = _connect_error(error)
        self._answer_all([*jobs, *waiters], error)

    def _answer_all(self, requests: list[Request], error: BaseException) -> None:
        self._waiting.waiters = [waiter for waiter in self._waiting.waiters if waiter not in requests]
        self._owner.tell(self._owner.answer, [(request, error) for request in requests])


def _is_fatal(error: BaseException) -> bool:
    """The connection is of no more use."""
    return isinstance(error, Moved) or schema.is_fatal(error)


def _connect_error(error: BaseException) -> ConnectError:
    return error if isinstance(error, ConnectError) else ConnectionLost(str(error))
