"""One file as the event loop sees it: shared by the producers and consumers of the loop.

They share the database thread, so that what one sends and another settles meets in one transaction
instead of in a queue for the file's lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final

from streamtools.drivers.sqlite.requests import Answer, Holder, Job, Request, Run, Waiter
from streamtools.drivers.sqlite.rows import Claimed
from streamtools.drivers.sqlite.schema import absolute, check_exists, locked
from streamtools.drivers.sqlite.tables import Tables
from streamtools.drivers.sqlite.worker import Worker
from streamtools.engine.tasks.sharing import Lease, Sharing
from streamtools.errors import Closed, ConnectionLost
from streamtools.settings import SQLiteSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds that closing waits for another process's lock before it leaves things to the lease.
CLOSE_TIMEOUT: Final = 2.0


class Database:
    """The database thread's other end.

    Parameters:
        path: the file.
        settings: lease and busy_timeout, in seconds.
    """

    def __init__(self, path: str, settings: SQLiteSettings) -> None:
        self._loop = asyncio.get_running_loop()
        self.path: str = path
        self.settings: SQLiteSettings = settings
        self.pid: int = os.getpid()
        self._opening: asyncio.Future[None] = self._loop.create_future()
        self._ending: asyncio.Future[None] = self._loop.create_future()
        self.worker: Worker = Worker(path, settings, self)

    @classmethod
    async def open(cls, path: str, settings: SQLiteSettings) -> Database:
        """Open the file in a thread of its own.

        Raises:
            ConnectError: the file cannot be used; permanent where trying again cannot help.
        """
        database = cls(path, settings)
        database.worker.thread.start()
        try:
            await database._opening
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """End the thread and close the file."""
        self.worker.stop()
        await self._ending

    def give_back(self, result: Any) -> None:
        """Undo what nobody waits for any more."""
        if isinstance(result, Claimed):
            self.worker.inbox.put(Job(self.settings.busy_timeout, release, (result.claim, result.ids)))

    # --- for the database thread ----------------------------------------------------------------

    def listens(self) -> bool:
        """Whether the event loop still lives."""
        return not self._loop.is_closed()

    def tell(self, function: Any, *arguments: Any) -> None:
        """Have a function called in the event loop."""
        with suppress(RuntimeError):  # the loop was closed: nobody waits, and the thread ends by itself
            self._loop.call_soon_threadsafe(function, *arguments)

    # --- told in the event loop -----------------------------------------------------------------

    def answer(self, answers: Sequence[Answer]) -> None:
        """These requests are answered."""
        for request, result in answers:
            future = request.future
            if future is None or future.done():
                self.give_back(result)
                if future is None and isinstance(result, BaseException):
                    log.warning("Something that %s needs from time to time failed: %s", self.path, result)
            elif isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    def opened(self, error: BaseException | None) -> None:
        """The file is open, or cannot be."""
        if self._opening.done():
            return
        if error is None:
            self._opening.set_result(None)
        else:
            self._opening.set_exception(error)

    def ended(self) -> None:
        """The thread ends."""
        if not self._ending.done():
            self._ending.set_result(None)


#: By process, file, settings and kind of use. A forked child leaves those of its parent alone: closing SQLite's
#: files could take the parent's locks away.
_databases: Final[Sharing[Database]] = Sharing(Database.close, is_dead=lambda database: database.worker.gone)


class Session:
    """One producer's, consumer's or admin's use of a database; ended by `close()`."""

    def __init__(self, lease: Lease[Database]) -> None:
        self._lease = lease
        self._database = lease.value
        self._pending: set[Request] = set()
        self.path: str = self._database.path
        self.closed: bool = False

    @classmethod
    async def open(cls, settings: SQLiteSettings, *, use: str = "", wanted: str | None = None) -> Session:
        """A session with the file, which is opened if it is not.

        Parameters:
            use: sessions for different uses have threads of their own.
            wanted: what is looked for in a file that must be there; it is made when None.

        Raises:
            ConnectError: the file cannot be used; permanent where trying again cannot help.
            ConfigurationError: the path cannot be one.
            QueueError: the file is missing, and is not to be made.
        """
        path = await asyncio.to_thread(absolute, settings.path)
        if wanted is not None:
            await asyncio.to_thread(check_exists, path, wanted)
        key = (os.getpid(), path, settings.lease, settings.busy_timeout, use)
        return cls(await _databases.acquire(key, lambda: Database.open(path, settings)))

    @property
    def gone(self) -> bool:
        """The file cannot be used by this session any more: it was moved, or is in trouble."""
        return self._database.worker.gone

    def what_it_waits_for(self) -> str | None:
        """Why nothing is written at present: another process has locked the file; None where that is not so."""
        since = self._database.worker.locked_since
        return None if since is None else locked(self.path, time.monotonic() - since)

    def call(
        self, run: Run, argument: Any, *, full: bool, patience: float | None = None, new: int = 0, moved: int = 0
    ) -> Coroutine[Any, Any, Any]:
        """Have something done in a transaction, together with what else is asked meanwhile.

        Parameters:
            full: return when it is on the disk, not only in the operating system's hands.
            patience: seconds to wait for another process's lock; `busy_timeout` when None.
            new: bytes of messages that are sent.
            moved: bytes of what else is written, about, where it is much; there must be room for either.

        Raises:
            NoRoom: there is none.
            ConnectionLost: it was not done.
            Closed: the session was closed before it was done; it may be done all the same.
        """
        patience = self._database.settings.busy_timeout if patience is None else patience
        return self._ask(Job(patience, run, argument, full, new, moved))

    def claim(self, holder: Holder, limit: int, *, once: bool = False) -> Coroutine[Any, Any, Claimed | None]:
        """Wait for messages and take them into hand. When cancelled, nothing stays in hand.

        Parameters:
            once: do not wait; None when there is nothing.

        Raises:
            ConnectionLost: the file cannot be used any more, or is locked for too long.
            Closed: the session was closed.
        """
        return self._ask(Waiter(self._database.settings.busy_timeout, holder, limit, once))

    async def let_go(self, holder: Holder, failed: Sequence[tuple[int, int]]) -> None:
        """Have what a holder has in hand made ready for others, and whoever waits with it raise Closed.

        Parameters:
            failed: (claim, row id) of those whose verdict is known but could not be written; they come
                back counted, so that the next connection knows them again.
        """
        holder.closed = True  # its lease is renewed no more, whether the rest succeeds or not
        for request in [request for request in self._pending if isinstance(request, Waiter)]:
            self._abandon(request)
        # After the settlements that wait already, which are of the same kind.
        await self.call(end_claims, (holder, failed), full=True, patience=CLOSE_TIMEOUT)

    async def close(self) -> None:
        """End it; whoever waits for an answer has Closed raised. Safe to repeat."""
        if self.closed:
            return
        self.closed = True
        for request in [*self._pending]:
            self._abandon(request)
        if self._database.pid == os.getpid():
            await self._lease.release()

    async def _ask(self, request: Request) -> Any:
        database = self._database
        if self.closed:
            raise Closed(f"{self.path} was closed.")
        if database.pid != os.getpid():  # a child has no thread
            raise ConnectionLost(f"{self.path} was opened before this process was forked; it is opened anew.")
        future = request.future = asyncio.get_running_loop().create_future()
        database.worker.inbox.put(request)
        if database.worker.gone:
            future.cancel()
            raise ConnectionLost(f"{self.path} was closed.")
        self._pending.add(request)
        try:
            return await future
        except asyncio.CancelledError:
            request.cancelled = True
            if future.done() and not future.cancelled() and future.exception() is None:
                database.give_back(future.result())
            raise
        finally:
            self._pending.discard(request)

    def _abandon(self, request: Request) -> None:
        request.cancelled = True
        if not request.future.done():
            request.future.set_exception(Closed(f"{self.path} was closed."))


def end_claims(tables: Tables, arguments: Sequence[tuple[Holder, Sequence[tuple[int, int]]]]) -> list[int]:
    """For each holder: end its claim, so that what it has in hand is ready again."""
    for _, failed in arguments:
        for claim, row in failed:
            tables.put_back(claim, [row], count=1)
    return [tables.end_lease(holder.claim) for holder, _ in arguments]


def release(tables: Tables, arguments: Sequence[tuple[int, Sequence[int]]]) -> Sequence[None]:
    """Give messages back, uncounted."""
    for claim, ids in arguments:
        tables.put_back(claim, ids)
    return [None] * len(arguments)
