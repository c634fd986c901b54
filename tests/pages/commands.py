"""Commands as pages write them, read by the real command line without being run; and the page that shows them all."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import typer
from typer.testing import CliRunner

from streamtools.cli.app import app
from tests.pages.markdown import ROOT, Page

NAME = "streamtools "
REFERENCE = ROOT / "docs" / "reference" / "cli.md"
INTRODUCTION = """\
# Every command

The extra `cli` installs the command `streamtools`; `python -m streamtools` is the same. This page shows examples of
each command, and what its `--help` says. [Command line](../operate/command-line.md) explains them in use.

Exit codes: 0 for success, 1 for a failure, 2 for wrong usage; 130 and 143 if Ctrl-C or SIGTERM ended a command that
only looks. `--json` prints only JSON to standard output. Commands that delete something ask first, unless you say
`--yes`.
"""
#: What each command is most used for, by its path: lines for a shell.
EXAMPLES = {
    "run": """\
streamtools run service:runner                     # one process, until SIGTERM or Ctrl-C
streamtools run service:runner --workers 4         # four processes that share the work
streamtools run service:consumers --reload         # start again when a file changes
streamtools run service:runner --log-level debug""",
    "send": """\
streamtools send orders '{"id": 1}'
streamtools send orders '{"id": 1}' --header shop=north --key customer-7
streamtools send reminders 'call back' --delay 3600
streamtools send orders --file orders.jsonl        # one message for each line""",
    "receive": """\
streamtools receive orders                         # show ten messages; they stay
streamtools receive orders --follow                # show messages as they come
streamtools receive orders --max 1 --ack           # take one message out""",
    "schema": """\
streamtools schema shop.contracts:PlaceOrder shop.contracts:OrderPlaced""",
    "demo": """\
streamtools demo
streamtools demo --url amqp://guest:guest@localhost/""",
    "doctor": """\
streamtools doctor
streamtools doctor --json""",
    "queues list": """\
streamtools queues list
streamtools queues list --json""",
    "queues stats": """\
streamtools queues stats orders payments
streamtools queues stats orders --watch 2          # every two seconds""",
    "queues create": """\
streamtools queues create orders
streamtools queues create orders --partitions 12 --replication 3      # Kafka
streamtools queues create orders --option queue_type=classic          # RabbitMQ""",
    "queues alter": """\
streamtools queues alter orders --partitions 12
streamtools queues alter orders --retention 30d --retention-bytes 10GiB""",
    "queues seek": """\
streamtools queues seek orders --to beginning --group billing
streamtools queues seek orders --to 2h             # what came in the last two hours
streamtools queues seek orders --to 1200 --partition 3""",
    "queues purge": """\
streamtools queues purge orders
streamtools queues purge orders --yes              # without a question""",
    "queues delete": """\
streamtools queues delete orders --yes""",
    "errors list": """\
streamtools errors list
streamtools errors list --queue orders.error""",
    "errors show": """\
streamtools errors show --limit 5
streamtools errors show --filter exception=ConnectionError --filter handler=order""",
    "errors redrive": """\
streamtools errors redrive --filter exception=ConnectionError --dry-run
streamtools errors redrive --filter exception=ConnectionError --from orders --yes
streamtools errors redrive 393de82679d33d4d0000000000000001
streamtools errors redrive --queue orders.error --to inspection""",
    "errors purge": """\
streamtools errors purge --filter reason=*refused* --yes""",
}


def commands(page: Page) -> Iterator[str]:
    """Every command that a page only shows: in blocks for a shell, and within its sentences."""
    lines = [line for block in page.blocks if block.language in ("sh", "") for line in block.text.splitlines()]
    for text in (*lines, *page.spans):
        command = text.partition(" #")[0].strip()
        if command.startswith(NAME) and "..." not in command:
            yield command


def check_usage(command: str) -> None:
    """Raise AssertionError unless there is such a command with such arguments and options."""
    said = io.StringIO()
    whole = typer.main.get_command(app)
    _take_deeds(whole)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            whole.main(shlex.split(command)[1:], prog_name="streamtools")
    except SystemExit as end:
        # A sentence may name a command without its arguments.
        assert not end.code or "Missing argument" in said.getvalue(), f"{command}:\n{said.getvalue()}"


def _take_deeds(command: Any) -> None:
    """Let commands read their arguments and do nothing."""
    if hasattr(command, "commands"):
        command.no_args_is_help = False
        command.invoke_without_command = True
        for inner in command.commands.values():
            _take_deeds(inner)
    command.callback = lambda **arguments: None


def reference() -> str:
    """The page of all commands: what each one's `--help` says."""
    return INTRODUCTION + "".join(_help(typer.main.get_command(app), []))


def _help(command: Any, path: list[str]) -> Iterator[str]:
    line = " ".join(["streamtools", *path, "--help"])
    said = CliRunner().invoke(app, [*path, "--help"], prog_name="streamtools", env={"COLUMNS": "100"}).stdout
    heading = f"\n{'#' * (len(path) + 1)} {' '.join(path)}\n" if path else ""
    examples = EXAMPLES.get(" ".join(path))
    yield f"{heading}\n```sh\n{examples}\n```\n" if examples else heading
    yield f"\n```console\n$ {line}\n{said.rstrip()}\n```\n"
    for name, inner in getattr(command, "commands", {}).items():
        yield from _help(inner, [*path, name])
