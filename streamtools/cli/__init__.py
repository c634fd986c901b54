"""The command line: `streamtools`, or `python -m streamtools`."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Final

from streamtools.installation import install_line

#: What the extra `cli` brings.
PACKAGES: Final = ("typer", "rich")


def main() -> None:
    """Run the command line; ends the process with 0 (done), 1 (it failed) or 2 (wrong usage)."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        sys.exit(
            f"The command line needs {' and '.join(missing)}, not installed here. "
            f"Install the extra: {install_line('cli')}"
        )
    from streamtools.cli.app import app

    for stream in (sys.stdout, sys.stderr):  # a message may hold what the terminal's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    # What fails is told by the command itself; the client library logs each try as an error besides.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    app(prog_name="streamtools")
