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
# Command line

The extra `cli` brings the command `streamtools`; `python -m streamtools` is the same. What follows is what `--help`
says. [Operate](../operate/command-line.md) shows the commands at work.

Exit codes: 0 it is done, 1 it failed, 2 it was asked for wrongly; 130 and 143 when Ctrl-C or SIGTERM ended a command
that only looks. `--json` leaves nothing but JSON on stdout. Commands that destroy ask first, unless `--yes`.
"""


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
    yield f"{heading}\n```console\n$ {line}\n{said.rstrip()}\n```\n"
    for name, inner in getattr(command, "commands", {}).items():
        yield from _help(inner, [*path, name])
