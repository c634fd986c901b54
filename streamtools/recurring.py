"""What is made of texts that most messages share, such as content types: made once, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: Characters of a text that is kept. Longer ones do not recur: a stranger wrote them, and they would fill the memory.
SHORT: Final = 255
#: Texts that are kept at most.
MOST: Final = 1024


class Recurring(dict[str, T], Generic[T]):
    """What a function makes of each text.

    Parameters:
        make: the function; it always makes the same of one text.
    """

    def __init__(self, make: Callable[[str], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, text: str) -> T:
        made = self._make(text)
        if len(text) <= SHORT:
            if len(self) >= MOST:
                self.clear()
            self[text] = made
        return made
