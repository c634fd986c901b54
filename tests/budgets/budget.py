"""The budgets: what each journey may cost, as recorded, and what has grown where it costs more.

Recorded for each journey: the calls of the package's own functions and of all functions, and the calls by file. A
budget is a little more than what was recorded: on a short way, one call more is too much.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.budgets.calls import Calls

FILE: Final = Path(__file__).with_name("calls.json")
#: The Python on which budgets are recorded; on later ones the same takes fewer calls.
PYTHON: Final = (3, 11)
#: How much more than what was recorded is allowed: a share of it, and calls.
SHARE, CALLS = 0.02, 0.5
#: Files that have grown by fewer calls are not named.
WORTH_NAMING: Final = 0.1


class Cost(NamedTuple):
    """Calls for each message.

    Attributes:
        own: of the package's own functions.
        all: of these and of all others, of libraries and of Python.
        files: by file of the package, or library.
    """

    own: float
    all: float
    files: dict[str, float]

    @classmethod
    def of(cls, calls: Calls) -> Cost:
        files: defaultdict[str, float] = defaultdict(float)
        for place, number in calls.items():
            files[place.partition(" ")[0]] += number
        own = sum(number for file, number in files.items() if file.endswith(".py"))
        return cls(round(own, 2), round(sum(files.values()), 2), {f: round(files[f], 2) for f in sorted(files)})


def recorded() -> dict[str, dict[str, Cost]]:
    """By protocol and journey."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text("utf-8"))
    return {protocol: {name: Cost(**cost) for name, cost in each.items()} for protocol, each in found.items()}


def record(protocol: str, costs: dict[str, Cost]) -> None:
    """Take these costs as the new budgets.

    Raises:
        SystemExit: this is another Python.
    """
    if sys.version_info[:2] != PYTHON:
        raise SystemExit(
            "Budgets are recorded on CPython {}.{}: the same takes fewer calls on later ones.".format(*PYTHON)
        )
    kept = recorded() if FILE.exists() else {}
    kept[protocol] = kept.get(protocol, {}) | costs
    plain = {protocol: {name: cost._asdict() for name, cost in each.items()} for protocol, each in kept.items()}
    FILE.write_text(json.dumps(plain, indent=1) + "\n", "utf-8")


def limit(number: float) -> float:
    """The budget for what was recorded as this number of calls."""
    return number * (1 + SHARE) + CALLS


def is_within(cost: Cost, budget: Cost) -> bool:
    """Whether a journey keeps its budget."""
    return cost.own <= limit(budget.own) and cost.all <= limit(budget.all)


def excess(protocol: str, name: str, calls: Calls, budget: Cost) -> str:
    """What is to be said of a journey that costs more than its budget: what has grown, and how to see it."""
    cost = Cost.of(calls)
    costs = (
        f"{protocol}, {name}: each message takes {cost.own:g} calls of the package's functions (budget "
        f"{limit(budget.own):.1f}, recorded {budget.own:g}) and {cost.all:g} of all (budget {limit(budget.all):.1f}, "
        f"recorded {budget.all:g}). Grown:"
    )
    more = {file: number - budget.files.get(file, 0) for file, number in cost.files.items()}
    grown = [
        f"  {file}: {cost.files[file]:g}, was {budget.files.get(file, 0):g}{_functions(file, calls)}"
        for file in sorted(more, key=more.__getitem__, reverse=True)
        if more[file] >= WORTH_NAMING
    ]
    command = f".venv/bin/python -m tests.budgets {protocol} {name!r}"
    see = f"To see all: {command}. If it is worth it, record it: {command} --record"
    return "\n".join([costs, *grown, see])


def _functions(file: str, calls: Calls) -> str:
    found = {place.partition(" ")[2]: number for place, number in calls.items() if place.startswith(f"{file} ")}
    ranked = sorted(found, key=found.__getitem__, reverse=True)
    return "".join([" (", ", ".join(f"{function} {found[function]:g}" for function in ranked), ")"]) if ranked else ""
