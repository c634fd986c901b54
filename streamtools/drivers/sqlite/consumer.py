"""SQLiteConsumer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Unpack

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.sqlite.database import Session
from streamtools.drivers.sqlite.producer import FEATURES, bind, declare, insert, missing, refusal
from streamtools.drivers.sqlite.requests import Holder
from streamtools.drivers.sqlite.rows import Claimed, Rows, encode, size_of
from streamtools.drivers.sqlite.schema import NoDirectory, NoRoom, TooBig
from streamtools.drivers.sqlite.tables import SUSPECT, Tables
from streamtools.errors import Closed, ConnectError, ConnectionLost, QueueError, SendError
from streamtools.parameters import ConsumerParameters
from streamtools.settings import SQLiteSettings
from streamtools.verdicts import Copy


class Token(NamedTuple):
    """What settles a delivery: the row, and the claim under which it was taken.

    Attributes:
        origin: the lane that it failed in, where it was read from an error queue.
    """

    id: int
    claim: int
    lane: int
    origin: int | None


@dataclass(slots=True)
class Verdicts:
    """A batch of settlements as the database thread performs it.

    Attributes:
        acks: row ids to delete, by claim.
        releases: row ids to give back, by claim.
        moves: (row id, claim, what goes out first).
        new: bytes of what handlers send.
        moved: bytes of copies for a retry or the error queue, which take the place of what they are of.
    """

    acks: dict[int, list[int]] = field(default_factory=dict)
    releases: dict[int, list[int]] = field(default_factory=dict)
    moves: list[tuple[int, int, list[Rows]]] = field(default_factory=list)
    new: int = 0
    moved: int = 0

    def all(self) -> Iterator[tuple[int, int]]:
        """(claim, row id) of all that are done with."""
        yield from ((claim, row) for claim, rows in self.acks.items() for row in rows)
        yield from ((claim, row) for row, claim, _ in self.moves)


class SQLiteConsumer(Consumer, protocol="sqlite"):
    """Reads messages from a SQLite file, beside other consumers in this and other processes.

    A message is claimed under a lease (`SQLiteSettings.lease`), which the database thread renews: what a
    killed process had in hand comes back when its lease has run out, counted as one delivery; what a
    consumer has in hand when it closes goes back at once, uncounted. A settlement, with all that it
    sends, is one transaction; one that comes after its lease ran out does nothing.

    `ordered_by` holds across processes: with "queue" nothing is claimed that is behind a message which
    another consumer has in hand, with "key" nothing of its key.

    Groups: as long as no consumer has come, messages wait in the queue. The first one to come, with
    `group=` or without, takes over what waits there. From then on each message is kept once for each
    group that has ever come, the consumers without a group together being one of them; a group that is
    new begins with what is sent from then on. `offset="latest"` has the first group leave what waits.
    A retry goes back to the group whose handler failed, and so does a redrive from the error queue. A
    group whose consumers never come back keeps its messages; deleting the queue ends it.
    """

    features = FEATURES
    settings_class: ClassVar[type[SQLiteSettings]] = SQLiteSettings
    settings: SQLiteSettings
    _session: Session | None = None
    #: Set while it has a place among the consumers of the queue.
    _holder: Holder | None = None
    #: Set when the suspect that was received last is settled; None when there is none.
    _suspect: asyncio.Event | None = None

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        def __init__(self, queue: str, **options: Unpack[ConsumerParameters]) -> None: ...

    async def _open(self) -> None:
        await self._close()
        self._holder = None
        self._session = await self._reach()
        self._failed: set[tuple[int, int]] = set()
        self._holder = await self._join(self._session)

    async def _reach(self) -> Session:
        wanted = None if self.declare is True else f"queue {self.queue!r}"
        try:
            return await Session.open(self.settings, wanted=wanted)
        except (QueueError, NoDirectory) as error:
            if self._opened:
                raise ConnectionLost(str(error)) from error  # it was there: it may be being restored
            raise

    async def _declare(self, session: Session) -> None:
        await declare(session, [self.queue, self.error_queue], self.declare)

    async def _redeclare(self) -> None:
        if self._session is not None:
            await self._declare(self._session)

    async def _join(self, session: Session) -> Holder:
        await self._declare(session)
        for binding in self.bindings:
            await session.call(bind, (self.queue, binding), full=True)
        lane = await session.call(join, (self.queue, self.group or "", self.offset == "latest"), full=True)
        if lane is None:
            raise QueueError(
                f"There is no queue {self.queue!r} in {session.path}. Check the name, or make it: "
                f"streamtools queues create {self.queue}. Or use declare=True to have it made."
            )
        return Holder([lane], ordered_by=self.ordered_by)

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        if self._suspect is not None:
            await self._isolation(self._suspect)
        session, holder = self._session, self._holder
        if session is None or holder is None:
            raise Closed(f"{self!r} is not open.")
        taken = await session.claim(holder, limit)
        return self._deliveries(taken, holder) if taken is not None else []

    async def _poll(self, limit: int) -> Sequence[Delivery]:
        if self._suspect is not None:
            if not self._suspect.is_set() and asyncio.get_running_loop().time() < self._suspect_until:
                return []  # nothing else is handed over while it is out
            self._suspect = None
        session, holder = self._session, self._holder
        if session is None or holder is None:
            raise Closed(f"{self!r} is not open.")
        taken = await session.claim(holder, limit, once=True)
        return self._deliveries(taken, holder) if taken is not None else []

    def _deliveries(self, taken: Claimed, holder: Holder) -> list[Delivery]:
        if holder.alone and taken.counts[0] >= SUSPECT:
            self._isolate(taken.ids[0])
        deliveries = []
        read = taken.messages(self.queue)
        for (message, trouble, origin), row, count in zip(read, taken.ids, taken.counts, strict=True):
            deliveries.append(Delivery(message, Token(row, taken.claim, taken.lane, origin), count, trouble))
        return deliveries

    def _isolate(self, row: int) -> None:
        # What is taken while a suspect runs would be counted with it if it ends the process. Not for
        # ever: whoever settles in batches by hand may be waiting for more.
        self._suspect = asyncio.Event()
        self._suspect_row = row
        self._suspect_until = asyncio.get_running_loop().time() + self.settings.lease

    async def _isolation(self, settled: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._suspect_until):
                await settled.wait()
        self._suspect = None

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        if self._session is None:
            return  # closed: all that was in hand has gone back
        verdicts = self._verdicts(settlements)
        try:
            full = bool(verdicts.moves)
            refused = await self._session.call(settle, verdicts, full=full, new=verdicts.new, moved=verdicts.moved)
        except (NoRoom, TooBig) as error:
            if len(settlements) > 1:  # a few at a time take less
                return await self._settle_halves(settlements)
            if not verdicts.moves:
                raise
            rows = [row for _, _, rows in verdicts.moves for row in rows]
            raise refusal(str(error), rows, unfit=isinstance(error, TooBig)) from error
        except Closed:
            return  # closed meanwhile: likewise
        except ConnectError:
            self._failed.update(verdicts.all())
            raise
        if self._suspect is not None and any(s.delivery.token.id == self._suspect_row for s in settlements):
            self._suspect.set()
        if refused:
            raise missing(refused)

    async def _settle_halves(self, settlements: Sequence[Settlement]) -> None:
        middle = len(settlements) // 2
        refused: list[SendError] = []
        for half in (settlements[:middle], settlements[middle:]):
            try:
                await self._settle(half)
            except SendError as error:
                refused.append(error)
        if refused:
            raise SendError(
                str(refused[0]),
                refused=[each for error in refused for each in error.refused],
                messages=[each for error in refused for each in error.messages],
            )

    def _verdicts(self, settlements: Sequence[Settlement]) -> Verdicts:
        verdicts = Verdicts()
        for settlement in settlements:
            token: Token = settlement.delivery.token
            if settlement.verdict.kind.gives_back:
                verdicts.releases.setdefault(token.claim, []).append(token.id)
            elif settlement.outgoing:
                rows = self._rows(settlement, token)
                verdicts.moves.append((token.id, token.claim, rows))
                size = size_of(rows)
                if settlement.verdict.kind.copy is None:
                    verdicts.new += size
                else:
                    verdicts.moved += size
            else:
                verdicts.acks.setdefault(token.claim, []).append(token.id)
        return verdicts

    def _rows(self, settlement: Settlement, token: Token) -> list[Rows]:
        copy = settlement.verdict.kind.copy
        rows = []
        for message in settlement.outgoing:
            stays = message.queue == self.queue
            # A retry is for this group alone: the others have theirs.
            lane = token.lane if copy is Copy.RETRY and stays else None
            # What the error queue's own consumer does not settle for good still comes from where it failed first.
            origin = None if copy is None else token.origin if stays else token.lane
            rows.append(encode(message, lane=lane, origin=origin))
        return rows

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        if self._suspect is not None:
            self._suspect.set()
            self._suspect = None
        try:
            if self._holder is not None:
                # When the file cannot be reached, its lease brings back what is in hand.
                with contextlib.suppress(ConnectError):
                    await session.let_go(self._holder, [*self._failed])
        finally:
            await session.close()


class SQLiteReader(SQLiteConsumer):
    """Reads what waits in all lanes of a queue, for `peek` and `move`; joins no group and makes nothing."""

    drops_expired: ClassVar[bool] = False

    async def _join(self, session: Session) -> Holder:
        lanes = await session.call(lanes_of, self.queue, full=False)
        if not lanes:
            raise QueueError(f"There is no queue {self.queue!r} in {session.path}.")
        return Holder(lanes, alone=False)

    def _rows(self, settlement: Settlement, token: Token) -> list[Rows]:
        # Back to the group that it failed in; the others had it.
        # What keeps its error is put aside, and goes home from there.
        return [
            encode(message, lane=token.lane if message.queue == self.queue else token.origin)
            if message.error is None
            else encode(message, origin=token.origin)
            for message in settlement.outgoing
        ]


def join(tables: Tables, arguments: Sequence[tuple[str, str, bool]]) -> list[int | None]:
    """For each (queue, group, latest): the group's lane, None where the queue is missing."""
    return [
        tables.join(queue, group, latest=latest) if tables.has_queue(queue) else None
        for queue, group, latest in arguments
    ]


def lanes_of(tables: Tables, arguments: Sequence[str]) -> list[list[int]]:
    """For each queue: its lanes."""
    return [tables.lanes(queue) for queue in arguments]


def settle(tables: Tables, arguments: Sequence[Verdicts]) -> list[list[Rows]]:
    """Perform all batches at once; for each, what could not go out, whose deliveries are still in hand."""
    acks: dict[int, list[int]] = {}
    refused: list[list[Rows]] = []
    for verdicts in arguments:
        refused.append(_move(tables, verdicts.moves, acks) if verdicts.moves else [])
        for claim, ids in verdicts.acks.items():
            acks.setdefault(claim, []).extend(ids)
        for claim, ids in verdicts.releases.items():
            tables.put_back(claim, ids)
    for claim, ids in acks.items():
        tables.remove(claim, ids)
    return refused


def _move(tables: Tables, moves: Sequence[tuple[int, int, list[Rows]]], acks: dict[int, list[int]]) -> list[Rows]:
    asked: dict[int, list[int]] = {}
    for row, claim, _ in moves:
        asked.setdefault(claim, []).append(row)
    held = {claim: tables.still_held(claim, ids) for claim, ids in asked.items()}
    valid = []
    for number, claim, rows in moves:
        if number in held[claim]:
            held[claim].discard(number)  # a second settlement of the same delivery does nothing
            valid.append((number, claim, rows))
    stranded = tables.stranded(row for _, _, rows in valid for row in rows)
    refused: list[Rows] = []
    out: list[Sequence[Rows]] = []
    for number, claim, rows in valid:
        if bad := [row for row in rows if id(row) in stranded]:
            refused.extend(bad)
        else:
            out.append(rows)
            acks.setdefault(claim, []).append(number)
    if out:
        insert(tables, out)
    return refused
