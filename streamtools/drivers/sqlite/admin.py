"""SQLiteAdmin."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final

from streamtools.admin import QueueAdmin
from streamtools.driver import Reader
from streamtools.drivers.sqlite.consumer import SQLiteReader
from streamtools.drivers.sqlite.database import Session
from streamtools.drivers.sqlite.file import Moved
from streamtools.drivers.sqlite.producer import bind, declare
from streamtools.drivers.sqlite.schema import NoRoom
from streamtools.drivers.sqlite.tables import Tables
from streamtools.errors import ConnectError, QueueError
from streamtools.exchange import Binding
from streamtools.queues import QueueInfo
from streamtools.settings import SQLiteSettings

#: Messages deleted in one transaction, so that others have their turn.
PURGE: Final = 5000
#: Bytes that each of them has written, about.
PAGES: Final = 512


class SQLiteAdmin(QueueAdmin, protocol="sqlite"):
    """Looks at the queues of a SQLite file. The numbers of all groups of a queue are added up.

    Messages whose `ttl` has passed count as waiting until a consumer meets and drops them.
    """

    settings_class: ClassVar[type[SQLiteSettings]] = SQLiteSettings
    settings: SQLiteSettings
    _session: Session | None = None
    _opened = False

    async def _open(self) -> None:
        await self._close()
        self._opened = True
        with suppress(QueueError):  # there is no file: looking makes none
            await self._connect("queue")

    async def _connect(self, wanted: str | None = None) -> Session:
        if not self._opened:
            raise ConnectError(f"{self!r} is not open: async with ADMINS['sqlite'](url=...) as admin: ...")
        if self._session is not None and self._session.gone:
            await self._leave()
        if self._session is None:
            # A thread of its own: counting a million messages must not hold up consumers.
            self._session = await Session.open(self.settings, use="admin", wanted=wanted)
        return self._session

    async def _close(self) -> None:
        self._opened = False
        await self._leave()

    async def _leave(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _list(self) -> Sequence[QueueInfo]:
        try:
            names = await self._call(names_of, None)
        except QueueError:
            return []
        found = []
        for name in names:
            with suppress(QueueError):  # it went meanwhile, or its name is no text that can be asked for
                found.append(await self._stats(name))
        return found

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        await declare(await self._connect(), [queue], True)

    async def _delete(self, queue: str) -> None:
        await self._purge(queue)
        await self._call(drop, queue, full=True)

    async def _purge(self, queue: str) -> int:
        last = await self._call(last_id, queue)
        number, most = 0, PURGE
        while True:
            try:
                more = await self._call(forget, (queue, last, most), full=True, moved=most * PAGES)
            except NoRoom:  # for that many at once
                if most == 1:
                    raise
                most = max(1, most // 8)
                continue
            if not more:
                return number
            number += more

    async def _stats(self, queue: str) -> QueueInfo:
        ready, delayed, in_hand, oldest = await self._call(numbers, queue)
        age = None if oldest is None else max(0.0, time.time() - oldest)
        return QueueInfo(name=queue, ready=ready, delayed=delayed, in_hand=in_hand, oldest=age)

    async def _bind(self, queue: str, binding: Binding) -> None:
        await self._call(bind, (queue, binding), full=True)

    async def _unbind(self, queue: str, binding: Binding) -> None:
        await self._call(unbind, (queue, binding), full=True)

    async def _cancel(self, queue: str, id: str) -> bool:  # noqa: A002
        return bool(await self._call(cancel, (queue, id), full=True))

    def _reader(self, queue: str, prefetch: int) -> Reader:
        return SQLiteReader(queue, url=self.settings, prefetch=max(1, prefetch), declare=False)

    async def _call(self, run: Any, argument: Any, *, full: bool = False, moved: int = 0) -> Any:
        name = argument[0] if isinstance(argument, tuple) else argument
        wanted = f"queue {name!r}"
        try:
            found = await (await self._connect(wanted)).call(run, argument, full=full, moved=moved)
        except Moved:  # nothing was done: ask the file that is there now
            await self._leave()
            found = await (await self._connect(wanted)).call(run, argument, full=full, moved=moved)
        if found is None:
            raise QueueError(f"There is no {wanted} in {self.settings.path}.")
        return found


def names_of(tables: Tables, arguments: Sequence[None]) -> list[list[str]]:
    """The names of all queues; a name that is no text is none that can be used."""
    names = [row[0] for row in tables.run("SELECT name FROM queues WHERE typeof(name) = 'text'").fetchall()]
    return [names for _ in arguments]


def last_id(tables: Tables, arguments: Sequence[str]) -> list[int | None]:
    """The last row id that waits in each queue; None where the queue is missing."""
    return [tables.last_id(queue) if tables.has_queue(queue) else None for queue in arguments]


def forget(tables: Tables, arguments: Sequence[tuple[str, int, int]]) -> list[int]:
    """Delete some of what waits in each queue up to a row id, in each lane so many at most; how many."""
    return [sum(tables.forget(lane, last, most) for lane in tables.lanes(queue)) for queue, last, most in arguments]


def drop(tables: Tables, arguments: Sequence[str]) -> list[bool]:
    """Delete queues, with what came in since they were purged."""
    for queue in arguments:
        for lane in tables.lanes(queue):
            tables.forget(lane, (1 << 63) - 1, None)
        tables.drop_queue(queue)
    return [True for _ in arguments]


def unbind(tables: Tables, arguments: Sequence[tuple[str, Binding]]) -> list[bool]:
    """Take bindings away."""
    for queue, binding in arguments:
        tables.unbind(queue, binding)
    return [True for _ in arguments]


def cancel(tables: Tables, arguments: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Forget delayed messages by id; whether each was there, None where its queue is missing."""
    now = time.time()
    return [tables.cancel(queue, id, now) if tables.has_queue(queue) else None for queue, id in arguments]


def numbers(tables: Tables, arguments: Sequence[str]) -> list[tuple[int, int, int, float | None] | None]:
    """For each queue: ready, delayed, in hand, and when its oldest message was sent."""
    now = time.time()
    return [tables.numbers(queue, now) if tables.has_queue(queue) else None for queue in arguments]
