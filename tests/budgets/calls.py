"""Calls of Python functions that a message takes, counted in a process of its own.

    python -m tests.budgets.calls PROTOCOL URL JOURNEY...

All threads count; a coroutine that goes on counts again. What each of two runs needs once, whatever the number of
messages, is left out by taking one from the other.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType

import streamtools
from streamtools.engine import loop
from tests.budgets.journeys import JOURNEYS, Journey

FEW, MANY = 200, 800
ROOT = Path(__file__).parents[2]
PACKAGE = os.path.dirname(streamtools.__file__)

#: Calls for each message, by function: "engine/loop.py Loop._work", or the name of a library.
Calls = dict[str, float]


def output_of(command: Sequence[str], timeout: float) -> str:
    """What a counting process prints; its hashes are the same each time.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"Counting failed: {done.stderr[-4000:]}")
    return done.stdout


class CallCounter:
    """Counts calls in all threads that begin after `install`, between `start` and `stop`."""

    def __init__(self) -> None:
        self._on = False
        self._threads: dict[int, Counter[CodeType]] = {}

    def install(self) -> None:
        threading.setprofile(self._count)
        sys.setprofile(self._count)

    def start(self) -> None:
        self._threads.clear()
        self._on = True

    def stop(self) -> None:
        self._on = False

    def functions(self) -> Counter[str]:
        """Calls by function."""
        found: Counter[str] = Counter()
        for thread in list(self._threads.values()):
            for code, number in list(thread.items()):
                found[_place(code)] += number
        return found

    def _count(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and self._on:
            thread = threading.get_ident()
            if (counter := self._threads.get(thread)) is None:
                counter = self._threads[thread] = Counter()
            counter[frame.f_code] += 1


def _place(code: CodeType) -> str:
    file = code.co_filename
    if file.startswith(PACKAGE + os.sep):
        return f"{file[len(PACKAGE) + 1 :]} {code.co_qualname}"
    for folder in ("/site-packages/", f"/python{sys.version_info.major}.{sys.version_info.minor}/"):
        if folder in file:
            return file.rpartition(folder)[2].partition("/")[0].removesuffix(".py")
    return "others"


def count_here(journey: Journey, url: str) -> Calls:
    """Calls for each message of a journey, in this process."""
    counter, counted = CallCounter(), []
    loop.SLICE = math.inf  # else a slow machine gives way to other tasks more often, which costs calls
    counter.install()
    for number in (FEW, MANY):
        asyncio.run(journey(url, number, counter))
        counter.stop()
        counted.append(counter.functions())
    sys.setprofile(None)
    few, many = counted
    found = {name: (many[name] - few[name]) / (MANY - FEW) for name in {*few, *many}}
    return {name: round(number, 3) for name, number in found.items() if abs(number) >= 0.01}


def count(protocol: str, url: str, journeys: Iterable[str]) -> dict[str, Calls]:
    """Calls for each message of each journey, counted in a fresh process.

    Raises:
        RuntimeError: it failed.
    """
    found: dict[str, Calls] = json.loads(
        output_of([sys.executable, "-m", __name__, protocol, url, *journeys], timeout=100)
    )
    return found


def main() -> None:
    """Print the calls as JSON."""
    protocol, url, *names = sys.argv[1:]
    print(json.dumps({name: count_here(JOURNEYS[protocol][name], url) for name in names}))


if __name__ == "__main__":
    main()
