"""Console blocks: each `$ ` line is typed, and the lines below it are what the reader is to see.

`...` stands for anything, alone on a line for any number of lines. `^C` at the beginning of a line is typed
once all above it has appeared. A command that ends in ` &` goes on beside what follows it, until `kill %1` or the
page's end. What differs from
run to run (times, ids, durations, versions) is not compared.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

#: Seconds for one command.
DEADLINE = 100.0
#: Seconds between two looks at a command's output.
LOOK = 0.02
INTERRUPT = "^C"
#: What no two runs have in common, and what stands for it.
_VARYING = [
    (re.compile(r"\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:\+00:00|Z)?"), "<time>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<id>"),
    (re.compile(r"\b[0-9a-f]{16}(?=[^0-9a-f]|$)"), "<id>"),
    (re.compile(r"\b\d[\d.,]* ?(?:ms|s|min)\b"), "<span>"),
    (re.compile(r"\b\d+(?:\.\d+){2,}\b(?!:)"), "<version>"),
    (re.compile(r"(?<=<time>) \d+(?= [A-Z]+ )|(?<=process )\d+"), "<pid>"),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r"[─-]{4,}"), "----"),
]


def plain(text: str) -> str:
    """The text without what varies, and without blank lines."""
    for pattern, name in _VARYING:
        text = pattern.sub(name, text)
    return "".join(f"{line.strip()}\n" for line in text.splitlines() if line.strip())


def check(promised: str, seen: str) -> None:
    """Raise AssertionError unless `seen` is what was promised."""
    assert re.fullmatch(_pattern(promised), plain(seen)), f"promised:\n{plain(promised)}\nseen:\n{plain(seen)}"


def _pattern(promised: str) -> str:
    lines = []
    for line in plain(promised).splitlines():
        if line == "...":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(re.escape(line).replace(re.escape("..."), ".*") + r"\n")
    return "".join(lines)


class Terminal:
    """A shell in one directory.

    Parameters:
        directory: where commands run; `export` holds for those that follow.
        environment: theirs.
        as_run: puts the addresses of the tests in place of those that the page names.
        as_written: does the reverse, in what commands print.
    """

    def __init__(
        self,
        directory: Path,
        environment: Mapping[str, str],
        as_run: Callable[[str], str],
        as_written: Callable[[str], str],
    ) -> None:
        self._directory = directory
        self._environment = dict(environment)
        self._as_run = as_run
        self._as_written = as_written
        self._beside: list[_Command] = []

    def run(self, text: str) -> None:
        """Type the commands of a block and look at what they print."""
        for written, promised in _commands(text):
            command = self._as_run(written)
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                self._environment[name] = value.strip("'\"")
            elif command.endswith(" &"):
                self._beside.append(self._start(command.removesuffix(" &")))
                self._beside[-1].wait_for(promised)
            elif command.startswith("kill %"):
                self._beside[int(command.removeprefix("kill %")) - 1].end()
            else:
                self._finish(self._start(command), promised)

    def _start(self, command: str) -> _Command:
        return _Command(command, self._directory, self._environment, self._as_written)

    def _finish(self, command: _Command, promised: str) -> None:
        before, interrupted, after = f"\n{promised}".partition(f"\n{INTERRUPT}")
        try:
            if interrupted:
                command.wait_for(before)
                command.interrupt()
            code = command.wait()
        finally:
            command.kill()
        check(before + "\n" + after, command.output)
        fails = "error:" in promised or "FAILED" in promised
        assert fails == bool(code), f"{command.text}: exit code {code}\n{command.output}"

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run some Python."""
        return subprocess.run(
            ["python", "-c", code],
            cwd=self._directory, env=self._environment, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip

    def close(self) -> None:
        """End what still runs, which is to end well."""
        for command in self._beside:
            command.end()

    def kill(self) -> None:
        """What still runs; safe to repeat."""
        for command in self._beside:
            command.kill()


def _commands(text: str) -> list[tuple[str, str]]:
    """(command, what it is to print) in order."""
    found: list[tuple[str, list[str]]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line.removeprefix("$ ")
            while command.endswith("\\"):
                command = command.removesuffix("\\") + next(lines).strip()
            found.append((command, []))
        else:
            found[-1][1].append(line)
    return [(command, "\n".join(printed)) for command, printed in found]


class _Command:
    """One command in a process group of its own, as a terminal gives it; both its outputs in one file."""

    def __init__(
        self, text: str, directory: Path, environment: Mapping[str, str], as_written: Callable[[str], str]
    ) -> None:
        self.text = text
        self._as_written = as_written
        self._log = directory / f".output-{time.monotonic_ns()}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", text],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._as_written(self._log.read_text("utf-8"))

    def wait_for(self, promised: str) -> None:
        """Wait until its output is what was promised; more may follow."""
        deadline = time.monotonic() + DEADLINE
        while not re.match(_pattern(promised), plain(self.output)):
            assert time.monotonic() < deadline, f"{self.text}: promised {promised!r}, seen:\n{self.output}"
            assert self._process.poll() is None, f"{self.text} has ended:\n{self.output}"
            time.sleep(LOOK)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        try:
            return self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.text} does not end:\n{self.output}") from None

    def end(self) -> None:
        """SIGTERM, upon which it is to end with 0. Safe to repeat."""
        if self._process.poll() is None:
            self._process.terminate()
        assert self.wait() == 0, self.output

    def kill(self) -> None:
        """What is left of it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def shims(directory: Path) -> Path:
    """A directory for PATH: this Python, its pytest and this streamtools by their names."""
    directory.mkdir()
    for name, arguments in (
        ("python", "-W error"),
        ("streamtools", "-m streamtools"),
        ("pytest", "-m pytest -p no:cacheprovider"),
    ):
        file = directory / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        file.chmod(0o755)
    return directory
