"""Counting: what was confirmed, what was handled, and what that leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


class Tally:
    """What became of numbered messages; handled means that their handler came to its end."""

    def __init__(self, confirmed: Iterable[int] = ()) -> None:
        self.confirmed = set(confirmed)
        self.handled: Counter[int] = Counter()

    @property
    def missing(self) -> set[int]:
        """Confirmed, and never handled."""
        return self.confirmed - set(self.handled)

    @property
    def repeats(self) -> int:
        """Runs beyond the first one of each message."""
        return self.handled.total() - len(self.handled)

    def counts(self) -> dict[str, int]:
        """The numbers that prove it."""
        return {
            "confirmed": len(self.confirmed),
            "handled": len(self.handled),
            "repeats": self.repeats,
            "missing": len(self.missing),
        }


def show(title: str, tally: Mapping[str, object] | None = None, **more: object) -> None:
    """Print counts for the reader of the test's output."""
    counts = {**(tally or {}), **more}
    print(
        f"\n{title}: " + ", ".join(f"{name.replace('_', ' ')} {_readable(value)}" for name, value in counts.items())
    )


def _readable(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
