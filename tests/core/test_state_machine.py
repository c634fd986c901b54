"""Whatever is done with queues in whatever order: each message is where a plain model says, whole and once."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from streamtools import CONSUMER_LOOPS
from streamtools.settings import AsyncIOSettings, ProtocolSettings, SQLiteSettings
from tests.core.machine import SUSPECT, Reader
from tests.core.machine_verdicts import Machine
from tests.core.model import ERROR, ORDERS, Entry

#: For how long a lease lasts: no example is that long, and none ends but by the rule that says so.
LEASE = 10**6


class AsyncIOMachine(Machine):
    """In this process."""

    protocol = "asyncio"
    counts = False

    def address(self, connection: int) -> ProtocolSettings:
        """One broker for all."""
        return AsyncIOSettings(name=self.directory.name)  # queues outlive the event loop of one example


class SQLiteMachine(Machine):
    """One file, two connections to it, and consumers that stop renewing their lease."""

    protocol = "sqlite"
    counts = True

    def address(self, connection: int) -> ProtocolSettings:
        """Other settings make another connection."""
        return SQLiteSettings(path=str(self.directory / "queues.db"), lease=LEASE, busy_timeout=30 + connection)

    def _allowed(self, reader: Reader, ready: list[Entry]) -> list[Entry]:
        others = [
            hold.entry
            for other in self.readers
            for hold in other.holds
            if other is not reader and other.lane is reader.lane
        ]
        if reader.ordered_by == "queue":
            return [e for e in ready if all(e.place < other.place for other in others)]
        if reader.ordered_by == "key":
            return [e for e in ready if e.meta[3] is None or all(e.meta[3] != other.meta[3] for other in others)]
        return ready

    def _alone(self, batch: list[Entry]) -> list[Entry]:
        suspects = [place for place, entry in enumerate(batch) if entry.count >= SUSPECT]
        return batch[: max(1, suspects[0])] if suspects else batch

    @rule(data=st.data())
    @precondition(lambda self: any(reader.holds for reader in self.readers))
    def lose_the_lease(self, data: st.DataObject) -> None:
        """As if its process had stood still: what it has in hand is others' again, counted."""
        reader = data.draw(st.sampled_from([reader for reader in self.readers if reader.holds]))
        consumer: Any = reader.consumer
        consumer._holder.expires = 0.0
        consumer._suspect_until = 0.0
        with sqlite3.connect(self.directory / "queues.db", timeout=30) as connection:
            connection.execute("UPDATE claims SET expires = 0 WHERE id = ?", (consumer._holder.claim,))
        connection.close()
        for hold in reader.holds:
            self.model.put_back(reader.lane, hold.entry, count=1)
        self.stale += reader.holds
        reader.holds, reader.suspect = [], None
        self.run(self._watch())

    async def _watch(self) -> None:
        """Someone looks for leases that have run out."""
        watchman = CONSUMER_LOOPS["sqlite"](
            "quiet", url=SQLiteSettings(path=str(self.directory / "queues.db"), lease=0.2), error_queue="quiet"
        )
        async with watchman:
            receiving = asyncio.create_task(watchman.receive())
            await self._compare(ORDERS)
            await self._compare(ERROR)
            receiving.cancel()
            await asyncio.wait([receiving])


class TestAsyncIO(AsyncIOMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40, derandomize=False, print_blob=True, deadline=None)


class TestSQLite(SQLiteMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=30, derandomize=False, print_blob=True, deadline=None)
