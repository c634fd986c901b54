"""Prints what the commands say: results on stdout, notes for a person on stderr.

With `--json`, stdout holds JSON alone. Text that came in a message is never trusted: invisible characters are shown
as escapes, so that none of them reaches a terminal (see `streamtools.text.escaping`).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import typer

from streamtools.text.escaping import escaped, visible_block, visible_json
from streamtools.wire import read_time

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Exit codes.
FAILED = 1
USAGE = 2
#: The most characters of one cell of a table; a text of a message may have any number.
CELL: Final = 500
#: Matches the user and the password in a URL, but not the words "user:password" in hints. A path has only one "/".
PASSWORD: Final = re.compile(r"(?<=:/)/?(?!/?user:password@)[^\s/:@]*:\S+(?=@)")
#: Beginnings of file names: in a traceback, frames of these files stand between a command and the service's own code.
MACHINERY: Final = (
    str(Path(__file__).parents[1]) + os.sep,
    *(str(Path(str(module.__file__)).parent) + os.sep for module in (asyncio, importlib)),
    "<frozen importlib",
    "uvloop/",
)


#: Matches the beginning of the line with which we print a message's head.
_HEAD: Final = re.compile("^---", re.MULTILINE)


@cache
def out() -> Console:
    """The console on stdout."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


@cache
def err() -> Console:
    """The console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str = "") -> None:
    """Print a result, on one line."""
    print(escaped(text))


def say_block(text: str) -> None:
    """Print a text of a message, which may have several lines; change lines that look like the head of a message."""
    print(_HEAD.sub("  ---", escaped(text, lines=True)))


def note(text: str) -> None:
    """Print a note for the person at the terminal, on one line, without passwords in URLs."""
    print(harmless(text), file=sys.stderr, flush=True)


def harmless(text: str) -> str:
    """Return a text that is safe for a terminal: on one line, without passwords in URLs."""
    return escaped(PASSWORD.sub("***", text))


def fail(text: str, code: int = FAILED) -> NoReturn:
    """Print an error, and end with this exit code."""
    note(f"error: {text}")
    raise typer.Exit(code)


def print_trace(error: Exception) -> None:
    """Print the traceback of a service's error from the service's own code on; all of it if it has no such code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(MACHINERY):
        trace = trace.tb_next
    if trace is None and not isinstance(error, SyntaxError):  # a SyntaxError names the line itself
        trace = error.__traceback__
    print(visible_block("".join(traceback.format_exception(type(error), error, trace)).rstrip()), file=sys.stderr)


def print_json(data: Any) -> None:
    """Print a JSON document on one line; invisible characters and lone surrogates are escaped."""
    print(visible_json(json.dumps(data, ensure_ascii=False, default=str)), flush=True)


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table; the columns in `right` are aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def print_table(made: Table, rows: Iterable[Sequence[object]]) -> None:
    """Fill the table and print it."""
    from rich.text import Text

    for row in rows:
        made.add_row(*(Text(cell(value)) for value in row))
    out().print(made)


class Bar:
    """A progress bar on stderr, which disappears at the end. Without a terminal there is no bar."""

    def __init__(self, text: str) -> None:
        from rich.progress import Progress

        self._bars = Progress(console=err(), transient=True, disable=not err().is_terminal)
        self._task = self._bars.add_task(text, total=None)

    def expect(self, total: int | None) -> None:
        """Set how much there is to do."""
        self._bars.update(self._task, total=total)

    def advance(self, done: int = 1) -> None:
        """Add what was done."""
        self._bars.update(self._task, advance=done)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


def cell(value: object) -> str:
    """Return a value as a person reads it; `-` if it is not known."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    return escaped(text if len(text) <= CELL else f"{text[:CELL]}...")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 message" or "2,000 messages"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def moment(seconds: float | None) -> str | None:
    """Return seconds since the epoch as RFC 3339 in UTC; None if that is not a time."""
    seconds = read_time(seconds)
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


def age(seconds: float | None) -> str:
    """Return a span of time in its largest unit."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def at_terminal() -> bool:
    """Whether there is a person at a terminal, who can be asked."""
    return sys.stdin.isatty()


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone.

    Raises:
        typer.Exit: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    if not at_terminal():
        fail(f"{question} There is no terminal to ask at; repeat the command with --yes.", USAGE)
    if not typer.confirm(escaped(question), err=True):
        note("Nothing was changed.")
        raise typer.Exit(FAILED)
