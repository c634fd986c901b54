"""What can be done with queues, each time compared with a plain model; the state machine of test_state_machine.py."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamtools import ADMINS, CONSUMER_LOOPS, PRODUCERS, Consumer, Delivery, codec
from streamtools.settings import ProtocolSettings
from streamtools.testing.waiting import TIMEOUT, eventually
from tests.core import strategies
from tests.core.clock import Clock
from tests.core.model import ERROR, ORDERS, QUEUES, STEP, Entry, Lane, Model, seen

T = TypeVar("T")
#: A message delivered this often without a verdict is taken alone.
SUSPECT = 2
#: Seconds for what goes back behind a cancellation.
PATIENCE = 5.0

bodies = st.binary(max_size=12) | strategies.text | strategies.json
keys = st.sampled_from([None, "a", "b"])
delays = st.sampled_from([0, 0, 0, STEP, 2 * STEP])


@dataclass(eq=False)
class Hold:
    """A delivery in hand."""

    delivery: Delivery
    entry: Entry


@dataclass(eq=False, repr=False)
class Reader:
    """A consumer that receives by hand, and what it has in hand."""

    name: str
    consumer: Consumer
    lane: Lane
    ordered_by: str | None
    holds: list[Hold] = field(default_factory=list)
    suspect: Hold | None = None

    def __repr__(self) -> str:
        return self.name


class Queues(RuleBasedStateMachine):
    """Sending, and receiving by hand."""

    protocol: ClassVar[str]
    #: The broker counts deliveries; a suspect is taken alone; claims respect `ordered_by` of others.
    counts: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self._patch = patch.object(time, "time", self.clock)
        self._patch.start()
        self.runner = asyncio.Runner(loop_factory=self.clock.new_loop)
        self.directory = Path(tempfile.mkdtemp(prefix="streamtools-"))
        self.model = Model(*QUEUES, keeps_place=self.counts)
        self.readers: list[Reader] = []
        #: Deliveries that are no longer in anyone's hand: whatever their verdict, nothing happens.
        self.stale: list[Hold] = []
        self._numbers = count()

    # --- how a subclass differs -----------------------------------------------------------------

    def address(self, connection: int) -> ProtocolSettings:
        """Where the broker is; by one of two connections."""
        raise NotImplementedError

    # --- beginning and end ----------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the event loop."""

        async def limited() -> T:
            async with asyncio.timeout(2 * TIMEOUT):
                return await work

        return self.runner.run(limited())

    @initialize()
    def begin(self) -> None:
        self.producers = [PRODUCERS[self.protocol](ORDERS, url=self.address(n)) for n in range(2)]
        self.admin = ADMINS[self.protocol](url=self.address(0))
        self.run(self._begin())

    async def _begin(self) -> None:
        await self.admin.open()
        for queue in QUEUES:
            await self.admin.create(queue)
        for producer in self.producers:
            await producer.open()

    def teardown(self) -> None:
        try:
            if hasattr(self, "producers"):
                self.run(all_of([self._close_reader(reader) for reader in self.readers]))
                self.wait(100)
                self.run(self._empty_everything())
        finally:
            try:
                self.run(self._close())
            finally:
                self.runner.close()
                self._patch.stop()
                shutil.rmtree(self.directory)

    async def _empty_everything(self) -> None:
        """What the model says is there, comes; and nothing else."""
        for queue in QUEUES:
            for group in list(self.model.topics[queue].lanes):
                reader = await self._open(queue, group)
                while any(self._expected(reader, 10)):
                    for hold in await self._receive(reader, 10):
                        await hold.delivery.ack()
                        reader.holds.remove(hold)
                        reader.suspect = None
                await self._close_reader(reader)
        for queue in QUEUES:
            await self._compare(queue)
            info = await self.admin.stats(queue)
            assert (info.ready, info.delayed, info.in_hand) == (0, 0, 0)

    async def _close(self) -> None:
        for reader in self.readers:
            await reader.consumer.close()
        for one in (*getattr(self, "producers", ()), *([self.admin] if hasattr(self, "admin") else [])):
            await one.close()

    # --- sending --------------------------------------------------------------------------------

    @rule(
        body=bodies, key=keys, headers=strategies.headers, type=strategies.some, delay=delays,
        ttl=st.sampled_from([None, None, None, STEP]), by=st.integers(0, 1),
    )  # fmt: skip
    def send(self, body: Any, delay: int, ttl: int | None, by: int, **options: Any) -> None:
        """One message, with all that can be said about it."""
        entry = self._entry(body, delay=delay, ttl=ttl, **options)
        receipt = self.run(self.producers[by].send(body, id=entry.id, delay=delay, ttl=ttl, **options))
        assert (receipt.id, receipt.queue) == (entry.id, ORDERS)
        self.model.publish(ORDERS, entry)

    @rule(number=st.integers(1, 12), key=keys, delay=delays, by=st.integers(0, 1))
    def send_many(self, number: int, key: str | None, delay: int, by: int) -> None:
        """A batch, in order."""
        entries = [self._entry(n, key=key, delay=delay) for n in range(number)]
        receipts = self.run(self.producers[by].send_many(range(number), key=key, delay=delay))
        for entry, receipt in zip(entries, receipts, strict=True):
            entry.id = receipt.id
            self.model.publish(ORDERS, entry)

    @rule(spins=st.integers(0, 6), by=st.integers(0, 1))
    def send_and_cancel(self, spins: int, by: int) -> None:
        """It arrives whole, for every group, or not at all."""
        entry, after = self._entry("perhaps"), self._entry("after")
        sent = self.run(self._cancelled(self.producers[by].send("perhaps", id=entry.id), spins))
        self.run(self.producers[by].send("after", id=after.id))
        self.model.publish(ORDERS, after)
        found = [m.id for m in self.run(self.admin.peek(ORDERS, limit=10**6))].count(entry.id)
        assert found in (0 if sent is None else 1, len(self.model.topics[ORDERS].lanes))
        if not found:  # as one does who was cancelled; and no example may depend on chance
            self.run(self.producers[by].send("perhaps", id=entry.id))
        self.model.publish(ORDERS, entry, before=after if found else None)

    @rule(by=st.integers(0, 1))
    def reopen_producer(self, by: int) -> None:
        """Nothing is lost by closing."""
        self.run(self.producers[by].close())
        self.run(self.producers[by].open())

    def _entry(self, body: Any, delay: int = 0, ttl: int | None = None, **options: Any) -> Entry:
        key, type, headers = (options.get(name) for name in ("key", "type", "headers"))
        meta = (*codec.encode(body), type, key, headers or {})
        now = self.model.now
        expires = None if ttl is None else now + ttl
        return Entry(f"m{next(self._numbers)}", meta, due=now + delay if delay else 0, expires=expires)

    # --- consumers ------------------------------------------------------------------------------

    @rule(
        queue=st.sampled_from([ORDERS, ORDERS, ERROR]), group=st.sampled_from([None, None, "a", "b"]),
        ordered_by=st.sampled_from([None, None, "queue", "key"]), latest=st.booleans(), connection=st.integers(0, 1),
    )  # fmt: skip
    @precondition(lambda self: len(self.readers) < 4)
    def open_consumer(self, queue: str, group: str | None, **options: Any) -> None:
        """One more, of any group, by either connection."""
        self.readers.append(self.run(self._open(queue, group, **options)))

    async def _open(
        self, queue: str, group: str | None, *, ordered_by: Any = None, latest: bool = False, connection: int = 0
    ) -> Reader:
        consumer = CONSUMER_LOOPS[self.protocol](
            queue, url=self.address(connection), group=group, ordered_by=ordered_by,
            offset="latest" if latest else "earliest",
        )  # fmt: skip
        await consumer.open()
        lane = self.model.join(queue, group, latest=latest)
        return Reader(f"reader{next(self._numbers)}", consumer, lane, ordered_by)

    @rule(data=st.data())
    @precondition(lambda self: self.readers)
    def close_consumer(self, data: st.DataObject) -> None:
        """What it has in hand goes back to its place, uncounted."""
        reader = data.draw(st.sampled_from(self.readers))
        self.readers.remove(reader)
        self.run(self._close_reader(reader))

    @rule(data=st.data())
    @precondition(lambda self: self.readers)
    def reopen_consumer(self, data: st.DataObject) -> None:
        """The same, and it can be used again."""
        reader = data.draw(st.sampled_from(self.readers))
        self.run(self._close_reader(reader))
        self.run(reader.consumer.open())

    async def _close_reader(self, reader: Reader) -> None:
        await reader.consumer.close()
        for hold in reader.holds:
            self.model.put_back(reader.lane, hold.entry)
        self.stale += reader.holds
        reader.holds, reader.suspect = [], None

    # --- receiving ------------------------------------------------------------------------------

    @rule(data=st.data(), limit=st.integers(1, 12))
    @precondition(lambda self: self.readers)
    def receive(self, data: st.DataObject, limit: int) -> None:
        """What is first in its lane, whole, in order."""
        reader = data.draw(st.sampled_from(self.readers))
        if any(self._expected(reader, limit)):
            self.run(self._receive(reader, limit))

    @rule(data=st.data())
    @precondition(lambda self: self.readers)
    def receive_nothing(self, data: st.DataObject) -> None:
        """Nothing comes where nothing is."""
        idle = [reader for reader in self.readers if not self.expected(reader, 1)]
        if idle:
            self.run(self._receive(data.draw(st.sampled_from(idle)), 1))

    @rule(data=st.data(), limit=st.integers(1, 5), spins=st.integers(0, 6))
    @precondition(lambda self: self.readers)
    def receive_and_cancel(self, data: st.DataObject, limit: int, spins: int) -> None:
        """All of it is handed over or none; given back or never taken, it is where it was."""
        reader = data.draw(st.sampled_from(self.readers))
        fresh, expired = self._expected(reader, limit)
        if expired:
            return  # whether these are gone by then cannot be told
        taken = self.run(self._cancelled(reader.consumer.receive(limit), spins))
        for hold in [] if taken is None else self._took(reader, taken, fresh):
            self.run(hold.delivery.release())
            self.model.put_back(reader.lane, hold.entry)
            reader.holds.remove(hold)
            reader.suspect = None

    @rule(data=st.data(), number=st.integers(1, 5))
    @precondition(lambda self: self.readers)
    def receive_what_is_sent_meanwhile(self, data: st.DataObject, number: int) -> None:
        """Whoever waits has what comes, and the rest stays."""
        waiting = [
            r for r in self.readers if r.lane.queue == ORDERS and not any(self._expected(r, 1)) and not r.suspect
        ]
        waiting = [r for r in waiting if r.ordered_by is None]
        if not waiting:
            return
        reader = data.draw(st.sampled_from(waiting))
        entries = [self._entry(n) for n in range(number)]

        async def both() -> list[Delivery]:
            receiving = asyncio.create_task(reader.consumer.receive(number))
            for _ in range(3):
                await asyncio.sleep(0)
            for entry, receipt in zip(entries, await self.producers[0].send_many(range(number)), strict=True):
                entry.id = receipt.id
                self.model.publish(ORDERS, entry)
            return await receiving

        taken = self.run(both())
        self._took(reader, taken, self.expected(reader, number))

    def expected(self, reader: Reader, limit: int) -> list[Entry]:
        """What a receive must return."""
        return self._expected(reader, limit)[0]

    def _expected(self, reader: Reader, limit: int) -> tuple[list[Entry], list[Entry]]:
        """The same, and what has expired and vanishes on the way."""
        gone: list[Entry] = []
        while True:
            ready = [e for e in self.model.ready(reader.lane) if e not in gone]
            batch = self._alone(self._allowed(reader, ready)[:limit]) if reader.suspect is None else []
            expired = [e for e in batch if e.expires is not None and e.expires <= self.model.now]
            fresh = [e for e in batch if e not in expired]
            gone += expired
            if fresh or not batch:
                return fresh, gone

    def _allowed(self, reader: Reader, ready: list[Entry]) -> list[Entry]:
        return ready

    def _alone(self, batch: list[Entry]) -> list[Entry]:
        return batch

    async def _receive(self, reader: Reader, limit: int) -> list[Hold]:
        fresh, expired = self._expected(reader, limit)
        taken = await reader.consumer.receive(limit, timeout=TIMEOUT if fresh else 0)
        self.model.take(reader.lane, expired)
        return self._took(reader, taken, fresh)

    def _took(self, reader: Reader, taken: list[Delivery], entries: list[Entry]) -> list[Hold]:
        assert [seen(d.message) for d in taken] == [entry.seen for entry in entries]
        assert [d.redeliveries for d in taken] == [entry.count if self.counts else 0 for entry in entries]
        assert {d.message.queue for d in taken} <= {reader.lane.queue}
        self.model.take(reader.lane, entries)
        holds = [Hold(d, entry) for d, entry in zip(taken, entries, strict=True)]
        reader.holds += holds
        if self.counts and holds and holds[0].entry.count >= SUSPECT:
            reader.suspect = holds[0]
        return holds

    async def _cancelled(self, work: Coroutine[Any, Any, T], spins: int) -> T | None:
        """The result, if it was there before the cancellation."""
        task = asyncio.create_task(work)
        for _ in range(spins):
            await asyncio.sleep(0)
        if spins == 6:
            await asyncio.wait([task], timeout=0.002)
        task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    @rule(steps=st.integers(1, 4))
    def wait(self, steps: int) -> None:
        """Time passes."""
        self.clock.offset += steps * STEP
        self.model.advance(steps * STEP)
        self.run(asyncio.sleep(0))

    # --- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_numbers_are_the_models(self) -> None:
        """As an operator sees them."""
        if hasattr(self, "admin"):
            for queue in QUEUES:
                self.run(self._compare(queue))

    async def _compare(self, queue: str) -> None:
        expected = (*self.model.numbers(queue), self._in_hand(queue))
        numbers: list[tuple[int | None, ...]] = [()]

        async def equal() -> bool:
            info = await self.admin.stats(queue)
            numbers[0] = (info.ready, info.delayed, info.in_hand)
            return numbers[0] == expected

        try:
            await eventually(equal, timeout=PATIENCE)  # what a cancelled receive took goes back behind it
        except TimeoutError:
            assert numbers[0] == expected, f"ready, delayed and in hand in {queue!r}"

    def _in_hand(self, queue: str) -> int:
        return sum(len(reader.holds) for reader in self.readers if reader.lane.queue == queue)


async def all_of(work: list[Any]) -> None:
    await asyncio.gather(*work)
