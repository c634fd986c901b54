"""`streamtools demo`: runs the demo, and prints what happens."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from streamtools.cli import output
from streamtools.cli.session import Json, Url, address, drive, plain_errors, source
from streamtools.protocols import URL_VARIABLE
from streamtools.text.escaping import escaped

if TYPE_CHECKING:
    from rich.progress import Progress

    from streamtools.cli.demo.flow import Course
    from streamtools.cli.demo.tally import Result
    from streamtools.redrive import ErrorGroup

#: With this address the demo uses a temporary file, so that nothing is left behind.
EMBEDDED: Final = "sqlite://"
COLUMNS: Final = ("sent", "handled", "retried", "dead-lettered", "redriven")


def demo(*, url: Url = None, json: Json = False) -> None:
    """Run a service of three handlers on 3,000 orders.

    They show retries, an error queue and a redrive. Without an address it uses its own SQLite file, which is deleted
    at the end. On a broker it uses its own queues, which are deleted at the end.
    """
    with _place(url) as where, _quiet():
        from streamtools.cli.demo.flow import prepare

        with plain_errors():
            course = prepare(where)
        result = drive(_tell(course, Silent() if json else Teller()))
    if json:
        output.print_json(_as_data(result))
    else:
        _print_result(result)
    if not result.adds_up:
        output.fail("the numbers do not add up; please report this with the table above.")


async def _tell(course: Course, narrator: Silent | Teller) -> Result:
    with narrator:
        return await course.run(narrator)


@contextmanager
def _place(url: str | None) -> Iterator[str]:
    if source(url) != "the default" and address(url) != EMBEDDED:
        yield address(url)
        return
    with TemporaryDirectory(prefix="streamtools-demo-") as directory:
        yield f"sqlite:///{directory}/demo.db"


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing: lines about each retry and rejection would hide the output of the demo."""
    log = logging.getLogger("streamtools")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class Silent:
    """Prints nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass

    def phase(self, text: str, total: int) -> None:
        """Nothing."""

    def progress(self, done: int) -> None:
        """Nothing."""

    def errors(self, groups: Sequence[ErrorGroup]) -> None:
        """Nothing."""


class Teller:
    """Prints a line for each phase, and a progress bar while it lasts."""

    def __init__(self) -> None:
        self._number = 0
        self._text = ""
        self._begin = 0.0
        self._bar: Progress | None = None
        self._new_bar = _bars()  # this imports the library now, not while messages wait

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._end(finished=error is None)

    def phase(self, text: str, total: int) -> None:
        """Begin a phase."""
        self._end()
        self._number += 1
        self._text, self._begin = text, time.monotonic()
        self._bar = self._new_bar()
        self._bar.add_task(f"{self._number}  {text}", total=total)
        self._bar.start()

    def progress(self, done: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)

    def errors(self, groups: Sequence[ErrorGroup]) -> None:
        """Print the content of the error queue, as `streamtools errors list` shows it."""
        self._end()
        self._number += 1
        print(f"{self._number}  The error queue holds what no retry could help:")
        made = output.table("", "failed in", "exception", "count", "the latest one's reason", right=["count"])
        for group in groups:
            name = group.queue.rpartition(".")[2], group.exception.rpartition(".")[2]
            made.add_row(*name, str(group.count), escaped(group.reason))
        output.out().print(made)

    def _end(self, *, finished: bool = True) -> None:
        bar, self._bar = self._bar, None
        if bar is None:
            return
        bar.stop()
        if finished:
            number = int(bar.tasks[0].completed)
            print(f"{self._number}  {self._text}: {number:,} in {time.monotonic() - self._begin:.1f} s")


def _bars() -> Callable[[], Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = output.out()

    def make() -> Progress:
        # The bar is transient: when a phase ends, its line replaces the bar.
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), MofNCompleteColumn()
        return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    return make


def _print_result(result: Result) -> None:
    made = output.table(f"\nOn {result.url}", "queue", *COLUMNS, right=COLUMNS)
    made.show_footer = True
    rows = [(row.queue, *_numbers(row)) for row in result.rows]
    for column, value in zip(made.columns, ("together", *_numbers(result.total)), strict=True):
        column.footer = output.cell(value)
    output.print_table(made, rows)
    total = result.total
    print(
        f"{total.handled:,} messages handled in {result.seconds:.1f} s: {result.rate:,.0f} a second, each sent, "
        f"confirmed, received and acknowledged."
    )
    if result.adds_up:
        print(
            f"The numbers add up: sent = handled + dead-lettered - redriven; {result.left} wait in the error queue."
        )
    if result.url.startswith(("sqlite", "asyncio")):
        print(f"On RabbitMQ: {URL_VARIABLE}=amqp://guest:guest@localhost/ {_command()} demo")


def _command() -> str:
    """Return the command to type next: in a checkout `make`, which also installs the client library."""
    if Path("Makefile").is_file() and Path("streamtools", "cli", "demo").is_dir():
        return "make"
    return "streamtools" if sys.argv[0].endswith("/streamtools") else "python -m streamtools"


def _numbers(row: Any) -> tuple[int, ...]:
    return (row.sent, row.handled, row.retried, row.dead_lettered, row.redriven)


def _as_data(result: Result) -> dict[str, Any]:
    total = asdict(result.total)
    del total["queue"]
    return {
        "url": result.url,
        **total,
        "left": result.left,
        "seconds": round(result.seconds, 3),
        "rate": round(result.rate, 1),
        "adds_up": result.adds_up,
        "queues": {row.queue: {n: v for n, v in asdict(row).items() if n != "queue"} for row in result.rows},
    }
