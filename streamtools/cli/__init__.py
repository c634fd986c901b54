"""The command line: `streamtools`, or `python -m streamtools`."""

from __future__ import annotations

import sys
from typing import Final

#: What the extra `cli` brings.
PACKAGES: Final = frozenset({"typer", "rich"})


def main() -> None:
    """Run the command line; ends the process with 0 (done), 1 (it failed) or 2 (wrong usage)."""
    try:
        from streamtools.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        sys.exit(
            f'The command line needs {error.name}, which is not installed. Install it: pip install "streamtools[cli]"'
        )
    app(prog_name="streamtools")
