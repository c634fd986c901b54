"""What is done with the tables, each within the transaction of whoever calls.

Every step of a statement lets go of Python's lock and has to win it back, for up to 5 ms where the
event loop is at work: one row for each step took 1,000 us a message there, and all rows in one step
take 50. Hence many rows in each INSERT, ids as one JSON parameter, and a claim that is read as one
row of aggregates. A parameter that is None or bytes takes 1 us to bind, as `sqlite3` looks for an
adapter of it; int, float, str and bytearray are bound at once. Hence other values for None in INSERTs.
It also lets go of Python's lock for each parameter that has a name.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain, repeat
from typing import Any, Final

from pydantic_core import from_json, to_json

from streamtools.drivers.sqlite import schema
from streamtools.drivers.sqlite import statements as sql
from streamtools.drivers.sqlite.rows import Claimed, Rows, Target
from streamtools.exchange import Binding, Exchange
from streamtools.wire import read_time

#: Delayed messages made ready at once.
RIPEN: Final = 1000
#: A message delivered this often without a verdict is claimed alone: it may be what ends the process.
SUSPECT: Final = 2
#: Bytes of a body under which it is bound as a bytearray: the copy costs less than what `sqlite3` does with bytes.
SMALL: Final = 8 * 1024
#: Bytes of bodies that a claim aims at, at most; it takes at least one message.
CLAIM_BYTES: Final = 16 * 1024 * 1024


class Tables:
    """The statements, on one connection; used by its thread alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.run: Callable[..., sqlite3.Cursor] = connection.execute
        #: Lanes in which messages were made ready since the last commit, by sends.
        self.filled: set[int] = set()
        #: Something else may have become ready since then, or will be at another time than before.
        self.stirred: bool = False
        self._generation = 0
        self._lanes: dict[str, list[int]] = {}
        #: Exchange name -> (exchange, pattern of topics, queue) of each binding.
        self._bindings: dict[str, list[tuple[Exchange, str, str]]] = {}

    def value(self, statement: str, parameters: Any = ()) -> Any:
        """The only value of the only row."""
        return self.run(statement, parameters).fetchone()[0]

    # --- queues and lanes -----------------------------------------------------------------------

    def has_queue(self, name: str) -> bool:
        """Whether there is a queue of this name."""
        return bool(self.value("SELECT EXISTS (SELECT 1 FROM queues WHERE name = ?)", (name,)))

    def make_queue(self, name: str) -> None:
        """Make a queue, unless it is there."""
        if self.has_queue(name):
            return
        self.run("INSERT INTO queues (name) VALUES (?)", (name,))
        self.run("INSERT INTO lanes (queue, grp, joined) SELECT id, '', 0 FROM queues WHERE name = ?", (name,))
        self._changed_lanes()

    def join(self, queue: str, group: str, *, latest: bool) -> int:
        """The lane of a group ("": no group), which is made, or taken over from nobody, if it is new."""
        found = self.run(
            "SELECT l.id, l.joined FROM lanes l JOIN queues q ON q.id = l.queue WHERE q.name = ? AND l.grp = ?",
            (queue, group),
        ).fetchone()
        if found is not None and found[1]:
            return int(found[0])
        self._changed_lanes()
        # Until a consumer has ever come, messages wait in a lane that no one has joined.
        orphan = self.run(
            "SELECT l.id FROM lanes l JOIN queues q ON q.id = l.queue WHERE q.name = ? AND NOT l.joined", (queue,)
        ).fetchone()
        if orphan is None:
            self.run(
                "INSERT INTO lanes (queue, grp, joined) SELECT id, ?, 1 FROM queues WHERE name = ?", (group, queue)
            )
            return int(self.value("SELECT last_insert_rowid()"))
        self.run("UPDATE lanes SET grp = ?, joined = 1 WHERE id = ?", (group, orphan[0]))
        if latest and group:
            self.forget(orphan[0], (1 << 63) - 1, None)
        return int(orphan[0])

    def lanes(self, queue: str) -> list[int]:
        """The lanes of a queue, none if there is no such queue."""
        found = self.run(
            "SELECT l.id FROM lanes l JOIN queues q ON q.id = l.queue WHERE q.name = ? ORDER BY l.id", (queue,)
        )
        return [row[0] for row in found.fetchall()]

    def forget(self, lane: int, last: int, limit: int | None) -> int:
        """Delete what waits in a lane up to row id `last`, `limit` rows of each kind at most; the number."""
        number = 0
        for kind in ("ready", "later"):
            ids = self.value(
                f"SELECT json_group_array(id) FROM (SELECT r.id FROM {kind} r CROSS JOIN messages m ON m.id = r.id "  # nosec B608: kind is one of the two names above
                "WHERE r.lane = ? AND r.id <= ? LIMIT ?)",
                (lane, last, -1 if limit is None else limit),
            )
            given = {"lane": lane, "ids": ids}
            self.run(f"DELETE FROM messages WHERE id IN {sql.IDS}", given)  # nosec B608: IDS is a constant
            found = self.run(f"DELETE FROM {kind} WHERE lane = :lane AND id IN {sql.IDS}", given).rowcount  # nosec B608: kind is one of the two names above
            if not found:
                self.run(f"DELETE FROM {kind} AS r WHERE r.lane = :lane AND {sql.WITHOUT_MESSAGE}", given)  # nosec B608: kind is one of the two names above
            number += found
        return number

    def last_id(self, queue: str) -> int:
        """The last row id of what waits in a queue: other programs choose theirs themselves."""
        return int(
            self.value(
                "SELECT coalesce(max(id), 0) FROM (SELECT (SELECT max(m.id) FROM ready r CROSS JOIN messages m "
                "ON m.id = r.id WHERE r.lane = l.value) AS id FROM json_each(:lanes) l UNION ALL "
                "SELECT (SELECT max(m.id) FROM later r CROSS JOIN messages m ON m.id = r.id WHERE r.lane = l.value) "
                "FROM json_each(:lanes) l)",
                {"lanes": to_json(self.lanes(queue)).decode()},
            )
        )

    def drop_queue(self, name: str) -> None:
        """Delete a queue that nothing waits in any more, with what consumers have in hand of it."""
        for lane in self.lanes(name):
            self.run("DELETE FROM messages WHERE id IN (SELECT id FROM held WHERE lane = ?)", (lane,))
            self.run("DELETE FROM held WHERE lane = ?", (lane,))
            self.run("DELETE FROM lanes WHERE id = ?", (lane,))
        self.run("DELETE FROM bindings WHERE queue = (SELECT id FROM queues WHERE name = ?)", (name,))
        self.run("DELETE FROM queues WHERE name = ?", (name,))
        self._changed_lanes()

    def exchange_type(self, name: str) -> str | None:
        """The type of an exchange that queues are bound to."""
        found = self.run("SELECT type FROM bindings WHERE exchange = ? LIMIT 1", (name,)).fetchone()
        return None if found is None else str(found[0])

    def bind(self, queue: str, binding: Binding) -> None:
        """Give a queue that exists the messages of a topic; safe to repeat."""
        exchange = binding.exchange
        made = self.run(
            "INSERT OR IGNORE INTO bindings SELECT ?, ?, ?, id FROM queues WHERE name = ?",
            (exchange.name, exchange.type, binding.topic, queue),
        )
        if made.rowcount:
            self._changed_lanes()

    def unbind(self, queue: str, binding: Binding) -> None:
        """Take a binding away; safe to repeat."""
        self.run(
            "DELETE FROM bindings WHERE exchange = ? AND topic = ? "
            "AND queue = (SELECT id FROM queues WHERE name = ?)",
            (binding.exchange.name, binding.topic, queue),
        )
        self._changed_lanes()

    def cancel(self, queue: str, id: str, now: float) -> bool:  # noqa: A002 - the field's name
        """Forget a message that is not due yet; False when there is none of this id."""
        given = {"lanes": to_json(self.lanes(queue)).decode(), "id": id, "now": now}
        found = self.value(
            "SELECT json_group_array(m.id) FROM json_each(:lanes) n JOIN later l ON l.lane = n.value "  # nosec B608: of_meta is given constants
            f"CROSS JOIN messages m ON m.id = l.id WHERE l.due > :now AND {sql.of_meta('id', 'text')} = :id",
            given,
        )
        self.run(f"DELETE FROM messages WHERE id IN {sql.IDS}", {"ids": found})  # nosec B608: IDS is a constant
        return self.run(f"DELETE FROM later WHERE id IN {sql.IDS}", {"ids": found}).rowcount > 0  # nosec B608: IDS is a constant

    def rolled_back(self) -> None:
        """Forget what was read and written in a transaction that was rolled back."""
        self._generation = 0
        self.filled.clear()
        self.stirred = False

    def _changed_lanes(self) -> None:
        # By chance, not by one more: a file that was restored may come to the same number another way.
        self.run("UPDATE sequence SET generation = abs(random() % 4611686018427387903) + 1")
        self._generation = 0
        self.stirred = True

    def _read_lanes(self, generation: int) -> None:
        self._lanes = {}
        found = self.run("SELECT q.name, l.id FROM queues q JOIN lanes l ON l.queue = q.id ORDER BY l.id")
        for name, lane in found.fetchall():
            self._lanes.setdefault(name, []).append(lane)
        self._bindings = {}
        found = self.run("SELECT b.exchange, b.type, b.topic, q.name FROM bindings b JOIN queues q ON q.id = b.queue")
        for name, kind, topic, queue in found.fetchall():
            with suppress(ValueError, TypeError):  # none of ours
                self._bindings.setdefault(name, []).append((Exchange(name, kind), topic, queue))
        self._generation = generation

    # --- in -------------------------------------------------------------------------------------

    def insert(self, batches: Sequence[Rows], now: float) -> list[Rows]:
        """Write rows, one copy for each lane that they go to; returned are those that must and cannot."""
        # The lanes are those of the last time, unless the generation says otherwise.
        number = copies = 0
        for rows in batches:
            number += len(rows.metas)
        last, delayed = self._take_ids(number), False
        absent: list[Rows] = []
        spread: list[tuple[Rows, int]] = []
        for rows in batches:
            target, lanes = rows.target, self._targets(rows.target)
            if not lanes and (target.mandatory or target.clash):
                absent.append(rows)
            for lane in lanes:
                spread.append((rows, lane))
                copies += len(rows.metas)
            if target.due is None:
                self.filled.update(lanes)
            else:
                self.stirred = delayed = True
        if not spread:
            return absent
        if copies > number:
            last = self._take_ids(copies)
        first = last - max(number, copies) + 1
        self._write(first, spread)
        if self._enqueue(first, last, now, delayed) != copies:  # RAISE(IGNORE) skips a row, and says nothing
            error = sqlite3.IntegrityError("a trigger in this file keeps messages out")
            error.sqlite_errorcode = sqlite3.SQLITE_CONSTRAINT_TRIGGER
            raise error
        return absent

    def stranded(self, batches: Iterable[Rows]) -> set[int]:
        """Those of `batches`, by `id()`, that must go somewhere and cannot."""
        self._take_ids(0)
        return {
            id(rows)
            for rows in batches
            if not self._targets(rows.target) and (rows.target.mandatory or rows.target.clash)
        }

    def _take_ids(self, number: int) -> int:
        found = self.run(sql.LAST_ID).fetchall()
        if not found:
            self.run("INSERT INTO sequence VALUES (?, abs(random() % 4611686018427387903) + 1)", (0,))
            found = self.run(sql.LAST_ID).fetchall()
        last, generation = found[0]
        self.run("UPDATE sequence SET last = ?", (last + number,))
        if generation != self._generation:
            self._read_lanes(generation)
        return int(last) + number

    def _targets(self, target: Target) -> Sequence[int]:
        if target.exchange is not None:
            bindings = self._bindings.get(target.exchange.name, ())
            if bindings and bindings[0][0].type != target.exchange.type:
                target.clash = bindings[0][0].type
                return []
            queues = {queue: None for exchange, topic, queue in bindings if exchange.matches(topic, target.queue)}
            return [lane for queue in queues for lane in self._lanes.get(queue, ())]
        lanes = self._lanes.get(target.queue, [])
        # A lane that has gone meanwhile: to whoever reads that queue now.
        return [target.lane] if target.lane in lanes else lanes

    def _write(self, first: int, spread: Sequence[tuple[Rows, int]]) -> None:
        """Write rows, each into its lane, under ids from `first` on."""
        written: list[tuple[Any, ...]] = []
        for rows, lane in spread:
            target, number = rows.target, first + len(written)
            key = sql.NO_KEY if target.key is None else target.key
            due = sql.NO_DUE if target.due is None else target.due
            small = max(map(len, rows.bodies)) < SMALL
            bodies = map(bytearray, rows.bodies) if small else rows.bodies
            ids = range(number, number + len(rows.metas))
            written += zip(ids, repeat(lane), repeat(key), repeat(due), rows.metas, bodies, strict=False)
        for start in range(0, len(written), sql.SIZES[-1]):
            some = written[start : start + sql.SIZES[-1]]
            size = sql.SIZES[bisect_left(sql.SIZES, len(some))]
            some += [sql.NO_ROW] * (size - len(some))
            self.run(sql.INSERT[size], [*chain.from_iterable(some)])

    def _enqueue(self, first: int, last: int, now: float, delayed: bool) -> int:
        given = first, last, now
        entered: int = self.run(
            "INSERT INTO ready SELECT lane, id, 0, key FROM messages "
            "WHERE id BETWEEN ? AND ? AND (due IS NULL OR due <= ?)",
            given,
        ).rowcount
        if delayed:
            entered += self.run(
                "INSERT INTO later SELECT lane, due, id FROM messages WHERE id BETWEEN ? AND ? AND due > ?", given
            ).rowcount
        return entered

    # --- out ------------------------------------------------------------------------------------

    def look(self, lane: int, claim: int, ordered_by: str | None) -> tuple[bool, float | None, bool]:
        """Whether something is ready to be claimed; when the next delayed one is due; whether the lane is there."""
        ready, due, there = self.run(sql.LOOK[ordered_by], {"lane": lane, "claim": claim}).fetchone()
        return bool(ready), due, bool(there)

    def claim(
        self, lane: int, claim: int, *, ordered_by: str | None, limit: int, alone: bool, now: float
    ) -> Claimed | None:
        """Take what is ready into hand.

        Parameters:
            alone: take a suspect by itself, so that no other is counted with it.
        """
        taken = self._read(lane, claim, ordered_by, limit, now)
        if taken is None:
            # What may be claimed and cannot be read leads to no message: it would count as ready for ever.
            self.run(
                f"DELETE FROM ready AS r WHERE r.lane = :lane AND {sql.WITHOUT_MESSAGE} {sql.ALLOWED[ordered_by]}",  # nosec B608: ALLOWED has constants
                {"lane": lane, "claim": claim},
            )
            return None
        if alone and max(taken.counts) >= SUSPECT:
            taken.keep(_before_suspect(taken.counts))
        given: dict[str, Any] = {"lane": lane, "claim": claim, "last": taken.ids[-1]}
        # All that is ready up to the last one, unless keys were left out between.
        which = "id <= :last"
        if ordered_by == "key":
            which, given["ids"] = f"id IN {sql.IDS}", to_json(taken.ids).decode()
        self.run(
            "INSERT OR REPLACE INTO held SELECT id, :claim, lane, count FROM ready "  # nosec B608: which is IDS, or a bound
            f"WHERE lane = :lane AND {which} AND id IN (SELECT id FROM messages)",
            given,
        )
        self.run(f"DELETE FROM ready WHERE lane = :lane AND {which}", given)  # nosec B608: which is IDS, or a bound
        return taken

    def _read(self, lane: int, claim: int, ordered_by: str | None, limit: int, now: float) -> Claimed | None:
        """What may be claimed, after what is due has been made ready."""
        given = {"lane": lane, "claim": claim, "limit": limit}
        ripened = False
        while True:
            try:
                due, ids, counts, sizes, meta, bodies = self.run(sql.CANDIDATES[ordered_by], given).fetchone()
            except (sqlite3.Error, OverflowError, MemoryError) as error:
                if given["limit"] == 1 or not schema.is_too_big(error):
                    raise
                given["limit"] = max(1, given["limit"] // 8)  # together they are more than SQLite joins
                continue
            if due is not None and due <= now and not ripened:
                self._ripen(lane, now)
                ripened = True
                continue
            if meta is None:
                return None
            return Claimed(claim, lane, from_json(ids), from_json(counts), from_json(sizes), meta, bodies or b"")

    def _ripen(self, lane: int, now: float) -> None:
        """Make ready what is due, and what has no time that can come."""
        self.run(f"UPDATE OR REPLACE later SET due = 0 WHERE lane = ? AND {sql.NO_TIME.format('due')}", (lane,))  # nosec B608: NO_TIME is a constant
        last = self.run(
            "SELECT due, id FROM (SELECT due, id FROM later WHERE lane = ? AND due <= ? ORDER BY due, id LIMIT ?) "
            "ORDER BY due DESC, id DESC LIMIT 1",
            (lane, now, RIPEN),
        ).fetchone()
        given = (lane, *last)
        self.run(
            "INSERT OR IGNORE INTO ready SELECT l.lane, l.id, 0, m.key FROM later l "
            "CROSS JOIN messages m ON m.id = l.id WHERE l.lane = ? AND (l.due, l.id) <= (?, ?)",
            given,
        )
        self.run("DELETE FROM later WHERE lane = ? AND (due, id) <= (?, ?)", given)

    def still_held(self, claim: int, ids: Sequence[int]) -> set[int]:
        """Those of `ids` that this claim still has in hand."""
        statement = f"SELECT json_group_array(id) FROM held WHERE claim = :claim AND id IN {sql.IDS}"  # nosec B608: IDS is a constant
        return set(from_json(self.value(statement, {"claim": claim, "ids": to_json(ids).decode()})))

    def remove(self, claim: int, ids: Sequence[int]) -> int:
        """Delete messages that this claim has in hand; the number. Others of `ids` are left."""
        first, last = min(ids), max(ids)
        number = last - first + 1
        # Mostly the ids have no gap and all are in hand: then no message needs to be looked up among them.
        if number == len({*ids}) and self.run(sql.REMOVE_RANGE, (first, last, first, last, claim, number)).rowcount:
            self.run("DELETE FROM messages WHERE id BETWEEN ? AND ?", (first, last))
            return number
        given = {"claim": claim, "ids": to_json(ids).decode()}
        held = f"held WHERE claim = :claim AND id IN {sql.IDS}"
        self.run(f"DELETE FROM messages WHERE id IN (SELECT id FROM {held})", given)  # nosec B608: held is a constant
        return self.run(f"DELETE FROM {held}", given).rowcount  # nosec B608: held is a constant

    def put_back(self, claim: int, ids: Sequence[int] | None = None, *, count: int = 0) -> int:
        """Make messages that this claim has in hand (all of them when `ids` is None) ready again; the number."""
        self.stirred = True
        given = {"claim": claim, "count": count, "ids": to_json(ids or []).decode()}
        which = "" if ids is None else f"AND h.id IN {sql.IDS}"
        self.run(
            "INSERT OR IGNORE INTO ready SELECT h.lane, h.id, CAST(h.count AS INTEGER) + :count, m.key FROM held h "  # nosec B608: which is IDS, a bound, or nothing
            f"CROSS JOIN messages m ON m.id = h.id WHERE h.claim = :claim {which}",
            given,
        )
        return self.run(f"DELETE FROM held AS h WHERE h.claim = :claim {which}", given).rowcount  # nosec B608: which is IDS, a bound, or nothing

    # --- leases ---------------------------------------------------------------------------------

    def lease(self, claim: int, expires: float) -> bool:
        """Renew the lease of a claim; False when there is none (any more)."""
        return self.run("UPDATE claims SET expires = ? WHERE id = ?", (expires, claim)).rowcount == 1

    def renew(self, claim: int, expires: float) -> bool:
        """The same if the claim has anything in hand; without, it needs none and the write is saved."""
        statement = (
            "UPDATE claims SET expires = :expires "
            "WHERE id = :claim AND EXISTS (SELECT 1 FROM held WHERE claim = :claim)"
        )
        return self.run(statement, {"claim": claim, "expires": expires}).rowcount == 1

    def new_lease(self, claim: int, expires: float) -> None:
        """Begin the lease of a claim."""
        self.run("INSERT INTO claims VALUES (?, ?)", (claim, expires))

    def end_lease(self, claim: int) -> int:
        """End a claim: what it has in hand goes back, uncounted; the number."""
        number = self.put_back(claim)
        self.run("DELETE FROM claims WHERE id = ?", (claim,))
        return number

    def next_expiry(self) -> float | None:
        """When the first lease ends; 0.0 where something is held that no lease would ever bring back."""
        expires = self.value(
            f"SELECT iif(EXISTS (SELECT 1 FROM held h WHERE {sql.UNCLAIMED}) OR EXISTS (SELECT 1 FROM claims WHERE "  # nosec B608: UNCLAIMED is a constant
            f"{sql.NO_TIME.format('expires')}), 0, (SELECT min(expires) FROM claims))"
        )
        return None if expires is None else float(expires)

    def expire(self, now: float) -> int:
        """Put back what consumers have in hand whose lease has run out, counted; the number."""
        number = 0
        self.stirred = True
        over = f"expires <= ? OR {sql.NO_TIME.format('expires')}"
        for claim in from_json(self.value(f"SELECT json_group_array(id) FROM claims WHERE {over}", (now,))):  # nosec B608: over is the constant above
            number += self.put_back(claim, count=1)
            self.run("DELETE FROM claims WHERE id = ?", (claim,))
        # What is held under no lease at all nothing else would ever bring back.
        self.run(
            "INSERT OR IGNORE INTO ready SELECT h.lane, h.id, CAST(h.count AS INTEGER) + 1, m.key FROM held h "  # nosec B608: UNCLAIMED is a constant
            f"CROSS JOIN messages m ON m.id = h.id WHERE {sql.UNCLAIMED}"
        )
        return number + self.run(f"DELETE FROM held AS h WHERE {sql.UNCLAIMED}").rowcount  # nosec B608: UNCLAIMED is a constant

    # --- numbers --------------------------------------------------------------------------------

    def numbers(self, name: str, now: float) -> tuple[int, int, int, float | None]:
        """Of one queue: messages ready, delayed, in hand, and when the oldest waiting one was sent."""
        ids = to_json(self.lanes(name)).decode()
        among = "lane IN (SELECT value FROM json_each(:ids))"
        ready, due, delayed, in_hand, oldest = self.run(
            f"SELECT (SELECT count(*) FROM ready WHERE {among}), "  # nosec B608: among is the constant above
            f"(SELECT count(*) FROM later WHERE {among} AND (due <= :now OR {sql.NO_TIME.format('due')})), "
            f"(SELECT count(*) FROM later WHERE {among} AND due > :now AND NOT {sql.NO_TIME.format('due')}), "
            f"(SELECT count(*) FROM held WHERE {among}), "
            f"(SELECT min({sql.of_meta('time', 'integer', 'real')}) FROM json_each(:ids) l CROSS JOIN messages m "
            "ON m.id = (SELECT min(r.id) FROM ready r WHERE r.lane = l.value))",
            {"ids": ids, "now": now},
        ).fetchone()
        return ready + due, delayed, in_hand, read_time(oldest)


def _before_suspect(counts: Sequence[int]) -> int:
    """How many to take so that a suspect, of which there is one, is alone."""
    return max(1, next(position for position, count in enumerate(counts) if count >= SUSPECT))
