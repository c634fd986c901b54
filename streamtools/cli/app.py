"""Puts the commands together; each command has its own module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from streamtools.cli.demo.command import demo
from streamtools.cli.doctor import doctor
from streamtools.cli.errors import errors
from streamtools.cli.messages import receive, send
from streamtools.cli.output import harmless
from streamtools.cli.queues import queues
from streamtools.cli.run import run
from streamtools.cli.schema import schema
from streamtools.text.installation import DISTRIBUTION


class _Commands(TyperGroup):
    """The commands. If the parser of options quotes what was typed in an error, that is escaped too."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the options before the command's name."""
        with _harmless_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Read the rest, and run the command."""
        with _harmless_errors():
            return super().invoke(ctx)


@contextmanager
def _harmless_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told: Any = error  # a ClickException, of click or of the copy of it in typer
        if hasattr(told, "format_message") and isinstance(told.message, str):
            told.message = harmless(told.message)
        raise


app: typer.Typer = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Producers and consumers on any broker: run services, look into queues, put failed messages back.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version(DISTRIBUTION))
        raise typer.Exit


@app.callback()
def streamtools(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Producers and consumers on any broker: run services, look into queues, put failed messages back."""


app.command()(run)
app.command()(send)
app.command()(receive)
app.add_typer(queues, name="queues")
app.add_typer(errors, name="errors")
app.command()(schema)
app.command()(demo)
app.command()(doctor)
