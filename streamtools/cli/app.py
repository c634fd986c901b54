"""The commands, put together. Each one's own module says what it does."""

from __future__ import annotations

from typing import Annotated

import typer

from streamtools.cli.demo.command import demo
from streamtools.cli.doctor import doctor
from streamtools.cli.errors import errors
from streamtools.cli.messages import receive, send
from streamtools.cli.queues import queues
from streamtools.cli.run import run
from streamtools.cli.schema import schema
from streamtools.installation import DISTRIBUTION

app: typer.Typer = typer.Typer(
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
