"""One file as the event loop sees it: shared by the producers and consumers of the loop.

They share the database thread, so that what one sends and another settles meets in one transaction
instead of in a queue for the file's lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary, ref

from streamtools.drivers.sqlite.requests import Holder, Job, Outcome, Run, Waiter
from streamtools.drivers.sqlite.rows import Claimed
from streamtools.drivers.sqlite.schema import absolute, check_exists, locked
from streamtools.drivers.sqlite.tables import Tables
from streamtools.drivers.sqlite.worker import Worker
from streamtools.errors import Closed, ConnectionLost
from streamtools.settings import SQLiteSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds that closing waits for another process's lock before it leaves things to the lease.
CLOSE_TIMEOUT: Final = 2.0

#: Databases of before a fork: closing SQLite's files in the child could take its parent's locks away,
#: so they are kept from being collected there.
_FORKED: Final[list[Any]] = []


class Database:
    """The database thread's other end.

    Parameters:
        path: the file.
        settings: as given to the producer or consumer.
    """

    #: By event loop, so that it ends with the loop; then by file, settings and kind of use.
    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, Database]]] = WeakKeyDictionary()

    def __init__(self, path: str, settings: SQLiteSettings, key: Any) -> None:
        loop = asyncio.get_running_loop()
        self.path = path
        self.settings = settings
        self._key = key
        self._pid = os.getpid()
        self._users = 0
        # Weak, and no future kept for longer than someone waits: this object is the value of a mapping
        # that is to end with the loop.
        self._loop = ref(loop)
        self._opening: asyncio.Future[None] | None = loop.create_future()
        self._ending: asyncio.Future[None] | None = None
        self._ended = False
        self._worker = Worker(
            path, settings, post=self._post, opened=self._on_opened, ended=self._on_ended, listening=self._listens
        )
        self._worker.thread.start()

    # --- lifetime -------------------------------------------------------------------------------

    @classmethod
    async def attach(cls, settings: SQLiteSettings, *, use: str = "", wanted: str | None = None) -> Database:
        """The open database of this file in the running loop.

        Parameters:
            use: databases for different uses are apart, each with its own thread.
            wanted: what is looked for in a file that must be there; it is made when None.

        Raises:
            ConnectError: the file cannot be used; permanent where trying again cannot help.
            ConfigurationError: the path cannot be one.
            QueueError: the file is missing, and is not to be made.
        """
        path = await asyncio.to_thread(absolute, settings.path)
        if wanted is not None:
            await asyncio.to_thread(check_exists, path, wanted)
        databases = cls._all.setdefault(asyncio.get_running_loop(), {})
        key = (path, settings.lease, settings.busy_timeout, use)
        database = databases.get(key)
        if database is not None and database._pid != os.getpid():
            _FORKED.append(databases.pop(key))
            database = None
        if database is None or database._worker.gone:
            database = databases[key] = cls(path, settings, key)
        database._users += 1
        try:
            if database._opening is not None:
                await asyncio.shield(database._opening)
        except BaseException:
            await database.detach()
            raise
        return database

    async def detach(self) -> None:
        """Let go; with the last user the thread ends and the file is closed."""
        self._users -= 1
        if self._users > 0 or self._pid != os.getpid():
            return
        databases = self._all.get(asyncio.get_running_loop(), {})
        if databases.get(self._key) is self:
            del databases[self._key]
        self._worker.stop()
        if not self._ended:
            self._ending = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._ending)

    @property
    def gone(self) -> bool:
        """Its thread has ended: the file was moved or is in trouble."""
        return self._worker.gone

    def what_it_waits_for(self) -> str | None:
        """That another process has locked the file, where that is so."""
        since = self._worker.locked_since
        return None if since is None else locked(self.path, time.monotonic() - since)

    # --- asking ---------------------------------------------------------------------------------

    def ask(self, what: Job | Waiter) -> None:
        """Hand something to the database thread; the answer goes into its future.

        Raises:
            ConnectionLost: the thread has ended, or this is a forked child, which has none.
        """
        if self._pid != os.getpid():
            raise ConnectionLost(f"{self.path} was opened before this process was forked; it is opened anew.")
        self._worker.ask(what)
        if self._worker.gone:
            raise ConnectionLost(f"{self.path} was closed.")

    def tell(self, run: Run, argument: Any) -> None:
        """Have something done that nobody waits for."""
        self._worker.ask(Job(run, argument, False, self.settings.busy_timeout))

    # --- answers, called in the database thread -------------------------------------------------

    def _listens(self) -> bool:
        loop = self._loop()
        return loop is not None and not loop.is_closed()

    def _post(self, outcomes: list[Outcome]) -> None:
        self._call(self._answer, outcomes)

    def _on_opened(self, error: BaseException | None) -> None:
        self._call(self._answer_opened, error)

    def _on_ended(self) -> None:
        self._call(self._answer_ended)

    def _call(self, function: Any, *arguments: Any) -> None:
        loop = self._loop()
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # the loop was closed: nobody waits, and the thread ends by itself

    # --- answers, in the event loop -------------------------------------------------------------

    def _answer(self, outcomes: Sequence[Outcome]) -> None:
        for what, result, error in outcomes:
            future = what.future
            if future is None or future.done():
                self._answer_nobody(what, result, error)
            elif error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _answer_nobody(self, what: Job | Waiter, result: Any, error: BaseException | None) -> None:
        if isinstance(result, Claimed):
            self.tell(release, (result.claim, result.ids))
        elif error is not None and what.future is None:
            log.warning("Something that %s needs from time to time failed: %s", self.path, error)

    def _answer_opened(self, error: BaseException | None) -> None:
        opening, self._opening = self._opening, None
        if opening is None:
            return
        if error is None:
            opening.set_result(None)
        else:
            opening.set_exception(error)
            opening.exception()  # everyone who waited may have been cancelled

    def _answer_ended(self) -> None:
        self._ended = True
        if self._ending is not None:
            self._ending.set_result(None)
            self._ending = None


class Session:
    """One producer's, consumer's or admin's use of a database; ended by `close()`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pending: set[Job | Waiter] = set()
        self.path: str = database.path
        self.closed: bool = False

    @classmethod
    async def open(cls, settings: SQLiteSettings, *, use: str = "", wanted: str | None = None) -> Session:
        """A session with the file, which is opened if it is not; parameters and errors as for `Database.attach`."""
        return cls(await Database.attach(settings, use=use, wanted=wanted))

    @property
    def gone(self) -> bool:
        """The file cannot be used by this session any more."""
        return self._database.gone

    def what_it_waits_for(self) -> str | None:
        """Why nothing is written at present; None where nothing is in the way."""
        return self._database.what_it_waits_for()

    async def call(
        self, run: Run, argument: Any, *, full: bool, patience: float | None = None, new: int = 0, moved: int = 0
    ) -> Any:
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
        return await self._ask(Job(run, argument, full, patience, new, moved))

    async def claim(self, holder: Holder, limit: int, *, once: bool = False) -> Claimed | None:
        """Wait for messages and take them into hand. When cancelled, nothing stays in hand.

        Parameters:
            once: do not wait; None when there is nothing.

        Raises:
            ConnectionLost: the file cannot be used any more, or is locked for too long.
            Closed: the session was closed.
        """
        waiter = Waiter(holder, limit, self._database.settings.busy_timeout, once=once)
        return await self._ask(waiter)  # type: ignore[no-any-return]

    async def let_go(self, holder: Holder, failed: Sequence[tuple[int, int]]) -> None:
        """Have what a holder has in hand made ready for others, and whoever waits with it raise Closed.

        Parameters:
            failed: (claim, row id) of those whose verdict is known but could not be written; they come
                back counted, so that the next connection knows them again.
        """
        holder.closed = True  # its lease is renewed no more, whether the rest succeeds or not
        for what in [what for what in self._pending if isinstance(what, Waiter)]:
            self._abandon(what)
        # After the settlements that wait already, which are of the same kind.
        await self.call(end_claims, (holder, failed), full=True, patience=CLOSE_TIMEOUT)

    async def close(self) -> None:
        """End it; whoever waits for an answer has Closed raised. Safe to repeat."""
        if self.closed:
            return
        self.closed = True
        for what in [*self._pending]:
            self._abandon(what)
        await self._database.detach()

    async def _ask(self, what: Job | Waiter) -> Any:
        if self.closed:
            raise Closed(f"{self.path} was closed.")
        future = what.future = asyncio.get_running_loop().create_future()
        self._database.ask(what)
        self._pending.add(what)
        try:
            return await future
        except asyncio.CancelledError:
            what.cancelled = True
            if future.done() and not future.cancelled() and future.exception() is None:
                self._undo(future.result())
            raise
        finally:
            self._pending.discard(what)

    def _abandon(self, what: Job | Waiter) -> None:
        what.cancelled = True
        if not what.future.done():
            what.future.set_exception(Closed(f"{self.path} was closed."))

    def _undo(self, result: Any) -> None:
        if isinstance(result, Claimed):
            self._database.tell(release, (result.claim, result.ids))


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
