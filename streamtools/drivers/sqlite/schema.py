"""The file: its tables, how it is opened, and what is wrong with it when it cannot be."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing, suppress
from functools import lru_cache
from pathlib import Path
from typing import Final

from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost, QueueError, StreamToolsError
from streamtools.wire import read_text

#: Marks a file as ours (`PRAGMA application_id`): "strm" in ASCII.
APPLICATION: Final = 0x7374726D
#: The version of the tables (`PRAGMA user_version`).
VERSION: Final = 1
#: The oldest SQLite with all that is used here: RETURNING came with 3.35.
OLDEST: Final = (3, 35, 0)
#: Pages written to the log before they are copied into the file: 4 MB of 4 KiB pages. Where the log still grows, the
#: file system writes its new size with each flush, which takes twice as long as to write over what is there.
CHECKPOINT_PAGES: Final = 1000
#: Bytes above which the log is cut back.
LOG_LIMIT: Final = 64 * 1024 * 1024
#: The permissions of a file that we make: messages are nobody else's business.
OWNER_ONLY: Final = 0o600
#: Memory for pages, in KiB.
CACHE_KIB: Final = 8 * 1024

# A message is in exactly one of ready, later and held; `messages` itself never changes, so that a
# claim and a lease write a few bytes and not the body. Ids are given by `sequence`, never twice: a
# settlement that comes late must not meet another message under its id.
TABLES: Final = """
CREATE TABLE sequence (last INTEGER NOT NULL, generation INTEGER NOT NULL);
INSERT INTO sequence VALUES (0, 1);
CREATE TABLE queues (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE lanes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue INTEGER NOT NULL REFERENCES queues (id),
    grp TEXT NOT NULL,
    joined INTEGER NOT NULL,
    UNIQUE (queue, grp)
);
CREATE TABLE bindings (
    exchange TEXT NOT NULL,
    type TEXT NOT NULL,
    topic TEXT NOT NULL,
    queue INTEGER NOT NULL REFERENCES queues (id),
    PRIMARY KEY (exchange, topic, queue)
) WITHOUT ROWID;
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    lane INTEGER NOT NULL,
    key TEXT,
    due REAL,
    meta TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE ready (
    lane INTEGER NOT NULL,
    id INTEGER NOT NULL,
    count INTEGER NOT NULL,
    key TEXT,
    PRIMARY KEY (lane, id)
) WITHOUT ROWID;
CREATE TABLE later (
    lane INTEGER NOT NULL,
    due REAL NOT NULL,
    id INTEGER NOT NULL,
    PRIMARY KEY (lane, due, id)
) WITHOUT ROWID;
CREATE TABLE held (
    id INTEGER PRIMARY KEY,
    claim INTEGER NOT NULL,
    lane INTEGER NOT NULL,
    count INTEGER NOT NULL
);
CREATE TABLE claims (id INTEGER PRIMARY KEY, expires REAL NOT NULL);
"""


#: A table of the file with its columns, as one text.
_TABLES_THERE: Final = (
    "SELECT m.name, (SELECT group_concat(name, ', ') FROM (SELECT name FROM pragma_table_info(m.name) ORDER BY cid)) "
    "FROM sqlite_master m WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite%'"
)
#: What to do about a file whose tables are not ours.
_MEND: Final = (
    "Another program has changed it. Stop all that use it, then restore a copy of it, or have a new one made: "
    "mv {path} {path}.changed (what waits in it stays there)."
)


class NoRoom(ConnectionLost):
    """The disk, or the file's allowance, is full; nothing was written."""


class TooBig(ConnectionLost):
    """A message is larger than SQLite takes; it was not written."""


class NoDirectory(ConnectError):
    """The directory of the file is missing."""


def absolute(path: str) -> str:
    """The file's absolute path; asks the operating system where we are.

    Raises:
        ConfigurationError: it cannot be a file's path.
    """
    if path == ":memory:":
        raise ConfigurationError(
            "sqlite:///:memory: would be lost with each connection. For queues in memory use asyncio://, "
            "for a file sqlite:///orders.db."
        )
    if "\0" in path:
        raise ConfigurationError("The path of a SQLite file cannot hold a NUL character.")
    return os.path.abspath(path)


def check_path(path: str) -> None:
    """Say what is in the way of a file there.

    Raises:
        ConnectError: (permanent) its directory is missing, or it is one itself.
    """
    file = Path(path)
    if file.is_dir():
        raise ConnectError(f"{path} is a directory; name a file in it: sqlite:///{path}/queues.db", permanent=True)
    if not file.parent.is_dir():
        raise NoDirectory(
            f"The directory {file.parent} does not exist, so {file.name} cannot be made in it: "
            f"mkdir -p {file.parent}",
            permanent=True,
        )


def check_exists(path: str, wanted: str) -> None:
    """Say that there is no file there, for who only wants to look.

    Raises:
        ConnectError: (permanent) there cannot be one.
        QueueError: there is none.
    """
    check_path(path)
    if not os.path.lexists(path):
        raise QueueError(
            f"There is no file {path}, and so no {wanted} in it. Check the path; the first producer or "
            "consumer makes it (declare=True)."
        )


def connect(path: str) -> sqlite3.Connection:
    """Open the file and make the tables if it is new. Raises sqlite3.Error as it comes, and:

    Raises:
        ConnectError: (permanent) the file is not ours, or newer than this version.
        ConfigurationError: this Python's SQLite is too old.
    """
    if sqlite3.sqlite_version_info < OLDEST:
        raise ConfigurationError(
            f"This Python has SQLite {sqlite3.sqlite_version}; 3.35 is the oldest that works. Use a newer Python."
        )
    _create(path)
    # timeout=0: SQLite would sleep by itself, deaf to a close; the database thread waits instead.
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, cached_statements=256)
    connection.text_factory = read_text  # texts that other programs wrote need not be any
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: str) -> None:
    """Make the file the owner's alone, as SQLite then makes the two beside it; one that is there stays as it is."""
    path = os.path.realpath(path)  # through a link that leads to nothing yet
    try:
        # Not by opening it: to close the file again would end the locks that another thread has on it meanwhile.
        os.mknod(path, OWNER_ONLY)
    except FileExistsError:
        return
    except (OSError, AttributeError):  # not on this system, or not without root; or SQLite says what is in the way
        with suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, OWNER_ONLY))


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    run = connection.execute
    if run("PRAGMA application_id").fetchone()[0] != APPLICATION:
        _check_foreign(connection, path)
    (mode,) = run("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise ConnectError(
            f"{path} cannot be shared by several processes (journal_mode={mode} instead of wal): put it on a local "
            "disk, not on a network share.",
            permanent=True,
        )
    run("PRAGMA synchronous=FULL")
    run(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    run(f"PRAGMA journal_size_limit={LOG_LIMIT}")
    run(f"PRAGMA cache_size=-{CACHE_KIB}")
    # Some builds overwrite what is deleted with zeros; that is a write for each page let go.
    run("PRAGMA secure_delete=OFF")
    if run("PRAGMA user_version").fetchone()[0] != VERSION:
        run("BEGIN IMMEDIATE")
        try:
            _make_tables(connection, path)
            run("COMMIT")
        except BaseException:
            if connection.in_transaction:
                run("ROLLBACK")
            raise
    _check_tables(connection, path)


def _check_foreign(connection: sqlite3.Connection, path: str) -> None:
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        # Another process may just have made our tables.
        if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION:
            return
        raise ConnectError(
            f"{path} is a SQLite file of another application; streamtools wants one of its own. Name another file: "
            "sqlite:///streamtools.db",
            permanent=True,
        )


def _make_tables(connection: sqlite3.Connection, path: str) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConnectError(
            f"{path} was made by a newer streamtools (tables of version {version}; this one knows {VERSION}). "
            "Use that version here too; in a clone of it: pip install .",
            permanent=True,
        )
    if version == VERSION:
        return  # another process was first
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise ConnectError(
            f"{path} has the tables of streamtools, but their version is {version} instead of {VERSION}. "
            + _MEND.format(path=path),
            permanent=True,
        )
    for statement in TABLES.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id={APPLICATION}")
    connection.execute(f"PRAGMA user_version={VERSION}")


@lru_cache(maxsize=1)
def _own_tables() -> dict[str, str]:
    """Each table that we make, with its columns."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(TABLES)
        return dict(connection.execute(_TABLES_THERE).fetchall())


def _check_tables(connection: sqlite3.Connection, path: str) -> None:
    """Check that the tables have the columns that they were made with.

    Raises:
        ConnectError: (permanent) they do not.
    """
    there = dict(connection.execute(_TABLES_THERE).fetchall())
    for table, columns in _own_tables().items():
        if there.get(table) != columns:
            found = f"has the columns {there[table]}" if table in there else "is missing"
            raise ConnectError(
                f"{path} is not as streamtools has made it: the table {table!r} ({columns}) {found}. "
                + _MEND.format(path=path),
                permanent=True,
            )


def is_busy(error: BaseException) -> bool:
    """Someone else holds a lock on the file; it passes."""
    return isinstance(error, sqlite3.Error) and _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_fatal(error: BaseException) -> bool:
    """The connection cannot go on: the disk or the file itself is in trouble."""
    if not isinstance(error, sqlite3.Error) or is_full(error):
        return False
    return _code(error) == sqlite3.SQLITE_IOERR or _code(error) in _PERMANENT.keys() - _UNFIT


def is_too_big(error: BaseException) -> bool:
    """A value is larger than SQLite takes (1 GB by default)."""
    return isinstance(error, OverflowError | MemoryError) or (
        isinstance(error, sqlite3.Error) and _code(error) == sqlite3.SQLITE_TOOBIG
    )


def explain(error: BaseException, path: str) -> StreamToolsError:
    """Our error for one of SQLite's: what happened to the file and what to do about it."""
    if isinstance(error, StreamToolsError):
        return error
    code = _code(error) if isinstance(error, sqlite3.Error) else -1
    if isinstance(error, PermissionError):
        code = sqlite3.SQLITE_PERM
    if code == sqlite3.SQLITE_CANTOPEN and _has_no_file_left():
        return ConnectionLost(f"{path} cannot be opened: this process has too many files open already: ulimit -n")
    if code in _PERMANENT and getattr(error, "sqlite_errorcode", 0) not in _PASSING:
        return ConnectError(_PERMANENT[code].format(path=path, error=error), permanent=True)
    if is_full(error):
        return no_room(path)
    if is_too_big(error):
        return TooBig(f"SQLite does not take this: {error}. A message in {path} is under 1 GB.")
    return ConnectionLost(f"{path} could not be read or written: {error}.")


def _has_no_file_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def no_room(path: str) -> NoRoom:
    """The error for a disk that is full."""
    return NoRoom(
        f"There is no room for {path} to grow, so nothing was written: df -h {Path(path).parent}. "
        "Sends succeed again when there is room; waiting messages can be handled and purged meanwhile."
    )


def is_full(error: BaseException) -> bool:
    """The disk is full, be it for the file, its log or its index in shared memory."""
    return isinstance(error, sqlite3.Error) and (
        _code(error) == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE
    )


def locked(path: str, seconds: float) -> str:
    """What to say when another process does not let go of the file."""
    return (
        f"Another process has kept {path} locked for {seconds:.3g} s. Look for one with a write transaction "
        f"left open (a sqlite3 shell, a backup, a stopped process): fuser -v {path}"
    )


def _code(error: sqlite3.Error) -> int:
    return int(getattr(error, "sqlite_errorcode", -1) or -1) & 0xFF


#: What passes, though its kind does not: the file was moved away, or another process is making it usable again.
_PASSING: Final = frozenset(
    {sqlite3.SQLITE_READONLY_DBMOVED, sqlite3.SQLITE_READONLY_RECOVERY, sqlite3.SQLITE_READONLY_CANTLOCK}
)
#: A statement does not fit what stands in the file; the next one may.
_UNFIT: Final = frozenset(
    {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}
)
#: What is for good; all else passes: another's lock, a full disk, an error of the disk, a file that is another now.
_PERMANENT: Final = {
    sqlite3.SQLITE_NOTADB: "{path} is not a SQLite file. Name another file, or move this one away.",
    sqlite3.SQLITE_CORRUPT: "{path} is damaged ({error}). Stop all that use it, then save what can be read: "
    "sqlite3 {path} .recover | sqlite3 new.db",
    sqlite3.SQLITE_READONLY: "{path} cannot be written ({error}): this user needs write permission for the file "
    "and for its directory.",
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened: this user needs permission to read and write the file and "
    "its directory.",
    sqlite3.SQLITE_PERM: "{path} cannot be opened: this user needs permission to read and write it.",
    sqlite3.SQLITE_AUTH: "{path} cannot be opened: this user needs permission to read and write it.",
    **dict.fromkeys(_UNFIT, "{path} is not as streamtools has made it: {error}. " + _MEND),
}
