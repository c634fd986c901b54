"""The command line: `streamtools`, or `python -m streamtools`."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Final, NoReturn

#: The packages that the extra `cli` installs.
PACKAGES: Final = ("typer", "rich")


def main() -> None:
    """Run the command line, and end the process with 0 (done), 1 (failed) or 2 (wrong usage)."""
    runs = sys.argv[1:2] == ["run"]
    # Importing takes a second. Until then nothing has begun, so a signal ends the process at once.
    signal.signal(signal.SIGTERM, _end_well if runs else _end)
    signal.signal(signal.SIGINT, _end_well if runs else _end)
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        from streamtools.text.installation import install_line

        sys.exit(
            f"The command line needs {' and '.join(missing)}, not installed here. "
            f"Install the extra: {install_line('cli')}"
        )
    import logging

    from streamtools.cli.app import app

    for stream in (sys.stdout, sys.stderr):  # a message may hold characters that the terminal's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    # The command itself prints errors; the client library would log each attempt as an error too.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    if not runs:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app(prog_name="streamtools")


def _end_well(number: int, frame: FrameType | None) -> NoReturn:
    """End `streamtools run` with 0, because the service has not begun."""
    os._exit(0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End another command with the signal's exit code, because it has not begun."""
    os._exit(128 + number)
