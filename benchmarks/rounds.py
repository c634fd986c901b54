"""Rounds: alternating measurements of several contenders, with medians, spread and ratios.

A figure here is never quoted alone: machines drift, so contenders take turns within one run and the
ratios of their medians are what counts.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Contender:
    """One thing measured.

    Attributes:
        name: as it stands in the table.
        run: does the work once; returns how many messages were moved, and the wall and CPU seconds.
        rates: messages per second, one for each round.
        cpu: CPU microseconds per message, one for each round.
    """

    name: str
    run: Callable[[], tuple[int, float, float]]
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Stopwatch:
    """Wall and CPU seconds of a `with` block, in this process."""

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu


def compare(title: str, contenders: list[Contender], *, rounds: int = 5) -> dict[str, float]:
    """Run the contenders in turns, print a table, and return the ratio of each to the last.

    Parameters:
        contenders: the last one is what the others are compared with.
        rounds: counted rounds, after one that warms up.
    """
    for number in range(rounds + 1):
        # Each round in another order, so that no one always runs after the same neighbour.
        shift = number % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            messages, wall, cpu = contender.run()
            if number:
                contender.rates.append(messages / wall)
                contender.cpu.append(cpu / messages * 1e6)
    return _table(title, contenders, rounds)


def _table(title: str, contenders: list[Contender], rounds: int) -> dict[str, float]:
    base = statistics.median(contenders[-1].rates)
    print(f"\n{title}\n{sys.implementation.name} {platform.python_version()}, {rounds} rounds, median (min-max)\n")
    print(f"{'':34} {'msg/s':>26} {'CPU us/msg':>20} {'ratio':>7}")
    ratios = {}
    for c in contenders:
        rate, cpu = statistics.median(c.rates), statistics.median(c.cpu)
        ratios[c.name] = rate / base
        spread = f"{rate:,.0f} ({min(c.rates):,.0f}-{max(c.rates):,.0f})"
        print(f"{c.name:34} {spread:>26} {f'{cpu:.1f} ({min(c.cpu):.1f}-{max(c.cpu):.1f})':>20} {rate / base:>6.2f}x")
    return ratios
