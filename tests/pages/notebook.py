"""Runs the Python blocks of one page, one after the other, in one process: what one defines, the next one uses.

`await` may stand at the top, as in `python -m asyncio`. Started as a script: reads one JSON string for each
block, runs it, and prints the line END; an exception ends the process.
"""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from inspect import CO_COROUTINE
from pathlib import Path
from types import FunctionType

END = "--- the block has ended ---"


class Notebook:
    """The parent's end.

    Parameters:
        directory: where the blocks run.
        environment: their environment.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._errors = (directory / ".stderr").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-u", __file__],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, code: str) -> str:
        """Run one block; what it has printed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line == END + "\n":
                return "".join(printed)
            printed.append(line)
        self._process.wait()
        raise AssertionError(f"it printed {''.join(printed)!r} and ended:\n{self._stderr()}")

    def close(self) -> None:
        """Let the process end.

        Raises:
            AssertionError: it did not end well.
        """
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0, self._stderr()

    def kill(self) -> None:
        """What is left of it; safe to repeat."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()


def main() -> None:
    """Run what comes on stdin."""
    # As `python -m asyncio` would have it: a script's own directory is not the page's.
    sys.path[0] = ""
    names: dict[str, object] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            code = compile(json.loads(line), "<block>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if code.co_flags & CO_COROUTINE:
                runner.run(FunctionType(code, names)())
            else:
                exec(code, names)  # noqa: S102 - it is what this is for
            sys.stdout.write(END + "\n")


if __name__ == "__main__":
    main()
