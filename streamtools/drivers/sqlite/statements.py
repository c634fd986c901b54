"""Statements that are long, or used in more than one place; each is prepared once for a connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from streamtools.wire import LAST

#: Rows in one INSERT; each size is one prepared statement, and what is missing is filled up.
SIZES: Final = (1, 16, 64, 256)
#: Row ids, as one parameter.
IDS: Final = "(SELECT value FROM json_each(:ids))"

#: Which ready rows may be claimed, by `ordered_by`. What another consumer has in hand goes before
#: all that is behind it: in the whole lane, or of the same key.
ALLOWED: Final[Mapping[str | None, str]] = {
    None: "",
    "queue": "AND r.id < coalesce((SELECT min(id) FROM held WHERE lane = :lane AND claim <> :claim), x'ff')",
    "key": "AND (r.key IS NULL OR r.key NOT IN (SELECT m.key FROM held h CROSS JOIN messages m ON m.id = h.id "
    "WHERE h.lane = :lane AND h.claim <> :claim AND m.key IS NOT NULL))",
}
#: What can be no time, as other programs may write it: infinity, a text or a blob, which are greater than any number,
#: or milliseconds. It counts as a time that is over, or nothing would ever come of it.
NO_TIME: Final = f"{{}} > {LAST}"
#: A message whose claim nobody renews, or ever will.
UNCLAIMED: Final = "h.claim NOT IN (SELECT id FROM claims)"
#: A row that leads to no message.
WITHOUT_MESSAGE: Final = "NOT EXISTS (SELECT 1 FROM messages m WHERE m.id = r.id)"
#: When the next delayed message of a lane is due: 0 if there is one whose time can never come.
NEXT_DUE: Final = (
    f"coalesce((SELECT 0 FROM later WHERE lane = :lane AND {NO_TIME.format('due')} LIMIT 1), "  # nosec B608: NO_TIME is a constant
    "(SELECT min(due) FROM later WHERE lane = :lane))"
)


def candidates(ordered_by: str | None) -> str:
    """The statement that reads what can be claimed, as one row."""
    return (
        f"SELECT {NEXT_DUE}, CAST(json_group_array(id) AS BLOB), CAST(json_group_array(count) AS BLOB), "  # nosec B608: constants
        "CAST(json_group_array(size) AS BLOB), "
        "CAST(group_concat(meta, char(30)) AS BLOB), CAST(group_concat(body, '') AS BLOB) FROM ("
        # As what they should be: other programs may have written anything.
        "SELECT r.id, CAST(r.count AS INTEGER) AS count, length(CAST(m.body AS BLOB)) AS size, "
        "replace(m.meta, char(30), '') AS meta, m.body "
        "FROM ready r CROSS JOIN messages m ON m.id = r.id "
        f"WHERE r.lane = :lane {ALLOWED[ordered_by]} ORDER BY r.id LIMIT :limit)"
    )


def _look(ordered_by: str | None) -> str:
    return (
        f"SELECT EXISTS (SELECT 1 FROM ready r WHERE r.lane = :lane {ALLOWED[ordered_by]}), {NEXT_DUE}, "  # nosec B608: constants
        "EXISTS (SELECT 1 FROM lanes WHERE id = :lane)"
    )


CANDIDATES: Final = {ordered_by: candidates(ordered_by) for ordered_by in ALLOWED}
LOOK: Final = {ordered_by: _look(ordered_by) for ordered_by in ALLOWED}


def of_meta(name: str, *types: str) -> str:
    """The expression for a field of a message's `meta`; NULL where it is not of these types, or `meta` is no JSON."""
    meta, path = "CAST(m.meta AS TEXT)", f"'$.{name}'"
    wanted = ", ".join(f"'{each}'" for each in types)
    return (
        f"CASE WHEN json_valid({meta}) THEN CASE WHEN json_type({meta}, {path}) IN ({wanted}) "
        f"THEN json_extract({meta}, {path}) END END"
    )


#: Bound instead of None, which takes longer to bind: no key, not delayed; and a row that is none.
NO_KEY: Final = 0
NO_DUE: Final = ""
NO_ROW: Final = (0, 0, 0, 0, 0, 0)


def _insert(rows: int) -> str:
    values = ",".join(["(" + ",".join("?" * len(NO_ROW)) + ")"] * rows)
    return (
        f"INSERT INTO messages SELECT column1, column2, nullif(column3, {NO_KEY}), nullif(column4, '{NO_DUE}'), "  # nosec B608: constants, and marks of parameters
        f"column5, column6 FROM (VALUES {values}) WHERE column1 <> {NO_ROW[0]}"
    )


INSERT: Final = {rows: _insert(rows) for rows in SIZES}
#: The last id that was taken, and the generation of the lanes. Rows that another program has written may have had the
#: next ids; what stands in its place may be none.
LAST_ID: Final = (
    "SELECT max(iif(last < 1 << 62, last, 0), coalesce((SELECT max(id) FROM messages WHERE id < 1 << 62), 0)), "
    "generation FROM sequence"
)
#: Lets go of a range of ids if a claim has all of it in hand, and of nothing otherwise. The parameters: the first id,
#: the last id, both again, the claim, and how many they are. (Numbered ones are deprecated from Python 3.12 on.)
REMOVE_RANGE: Final = (
    "DELETE FROM held WHERE id BETWEEN ? AND ? "
    "AND (SELECT count(*) FROM held WHERE id BETWEEN ? AND ? AND claim = ?) = ?"
)
