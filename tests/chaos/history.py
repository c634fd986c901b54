"""The whole history of messages with keys, as consumers wrote it down together, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path


class History:
    """What was handled, in the order in which it happened.

    Each key has the numbers 0, 1, 2 ... in the order in which they were sent. A message may come again after a
    consumer died, and so may those behind it. But none may begin before the one before it has ended once, nor while
    another one of its key is at work.

    Attributes:
        ended: how often each (key, number) was handled to its end.
        at_work: key to (process, number), of those that have begun and not ended.
        by_process: how many each process has handled.
        broken: what was against the order, in words.
    """

    def __init__(self, path: Path) -> None:
        self.ended: Counter[tuple[str, int]] = Counter()
        self.at_work: dict[str, tuple[str, int]] = {}
        self.by_process: Counter[str] = Counter()
        self.broken: list[str] = []
        self._path = path
        self._position = 0
        self._rest = b""

    def read(self) -> History:
        """Take in what is new."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._position)
                new = file.read()
            self._position += len(new)
            *lines, self._rest = (self._rest + new).split(b"\n")
            self._take(line.decode().split() for line in lines)
        return self

    def _take(self, lines: Iterable[list[str]]) -> None:
        for what, process, *rest in lines:
            if what == "killed":
                self.at_work = {key: at for key, at in self.at_work.items() if at[0] != process}
            elif what == "begin":
                self._begin(process, rest[0], int(rest[1]))
            else:
                self._end(process, rest[0], int(rest[1]))

    def _begin(self, process: str, key: str, number: int) -> None:
        if key in self.at_work:
            self.broken.append(f"{key}/{number} begins in {process} while {self.at_work[key]} is at work")
        if number > 0 and not self.ended[key, number - 1]:
            self.broken.append(f"{key}/{number} begins in {process} before the one before it has ended")
        self.at_work[key] = process, number

    def _end(self, process: str, key: str, number: int) -> None:
        self.ended[key, number] += 1
        self.by_process[process] += 1
        self.at_work.pop(key, None)

    def killed(self, process: int) -> None:
        """Note that this process is no more; what it had at work never ends."""
        with self._path.open("ab") as file:
            file.write(f"killed {process}\n".encode())

    def counts(self) -> dict[str, int]:
        """The numbers that prove it."""
        return {
            "handled": len(self.ended),
            "repeats": self.ended.total() - len(self.ended),
            "against_the_order": len(self.broken),
        }
