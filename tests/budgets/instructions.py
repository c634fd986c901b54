"""Instructions of the processor that a message takes, counted by valgrind.

    python -m tests.budgets.instructions        every journey that is counted

One build of Python takes other instructions than the next. So each number is a multiple of what one message takes by
hand: from an `asyncio.Queue` to a function, decoded from JSON.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

from streamtools.drivers.http import HTTPConsumer
from streamtools.drivers.sqlite import SQLiteConsumer
from streamtools.engine import loop
from tests.budgets.calls import output_of
from tests.budgets.journeys import BODY, JOURNEYS, Journey, Meter

FEW, MANY = 100, 300
#: Imported before any is counted.
DRIVERS = HTTPConsumer, SQLiteConsumer
#: By protocol, the journeys that are counted.
COUNTED = {
    "asyncio": ["send", "handle", "request"],
    "sqlite": ["send", "receive", "handle"],
    "http": ["send", "handle"],
}
BY_HAND = "by hand"


class Everything(Meter):
    """Valgrind counts from the beginning to the end; the difference of two runs has what their messages take."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


async def by_hand(_: str, number: int, meter: Meter) -> None:
    """What the others are compared with."""
    queue: asyncio.Queue[bytes] = asyncio.Queue()

    async def handle(order: object) -> None: ...

    for _n in range(number):
        queue.put_nowait(BODY)
    for _n in range(number):
        await handle(json.loads(await queue.get()))


def is_there() -> bool:
    """Whether valgrind is installed."""
    return shutil.which("valgrind") is not None


def count() -> dict[str, float]:
    """Instructions for each message of each journey, as multiples of one by hand.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={folder}/%p"]
        command = [*valgrind, sys.executable, "-m", "tests.budgets.instructions", folder]
        runs: dict[str, list[int]] = json.loads(output_of(command, timeout=300))
        few_and_many = {name: [_instructions(Path(folder, str(pid))) for pid in pids] for name, pids in runs.items()}
    found = {name: (many - few) / (MANY - FEW) for name, (few, many) in few_and_many.items()}
    return {name: number / found[BY_HAND] for name, number in found.items() if name != BY_HAND}


def _instructions(file: Path) -> int:
    return int(file.read_text().rpartition("summary:")[2].split()[0])


def _run(journey: Journey, url: str, number: int) -> int:
    """The id of a copy of this process that has moved so many messages; valgrind wrote what it took."""
    if not (pid := os.fork()):
        status = 1
        try:
            asyncio.run(journey(url, number, Everything()))
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("A journey failed.")
    return pid


def main() -> None:
    """Inside valgrind: print the ids of the processes. Else print what is counted."""
    if not sys.argv[1:]:
        for name, number in count().items():
            print(f"{number:8.2f}  {name}")
        return
    loop.SLICE = math.inf  # as tests.budgets.calls has it
    urls = {"asyncio": "asyncio://budgets?maxsize=10000", "sqlite": f"sqlite:///{sys.argv[1]}/queues.db", "http": ""}
    journeys = {f"{p}, {name}": (JOURNEYS[p][name], urls[p]) for p, names in COUNTED.items() for name in names}
    every = {BY_HAND: (by_hand, ""), **journeys}
    print(json.dumps({name: [_run(*each, number) for number in (FEW, MANY)] for name, each in every.items()}))


if __name__ == "__main__":
    main()
