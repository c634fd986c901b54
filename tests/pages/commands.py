"""Commands as pages write them, read by the real command line without being run."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import typer

from streamtools.cli.app import app
from tests.pages.markdown import Page

NAME = "streamtools "


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
