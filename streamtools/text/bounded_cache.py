"""What is made of texts that most messages share, such as content types: made once, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

K = TypeVar("K", str, bytes)
T = TypeVar("T")

#: Characters or bytes of a text that is kept. Longer ones do not recur: a stranger wrote them, to fill the memory.
SHORT: Final = 255
#: Texts that are kept at most.
MOST: Final = 1024


class BoundedCache(dict[K, T], Generic[K, T]):
    """What a function makes of each text.

    Parameters:
        make: the function; it always makes the same of one text.
    """

    def __init__(self, make: Callable[[K], T]) -> None:
        super().__init__()
        self._make: Callable[[K], T] = make

    def __missing__(self, text: K) -> T:
        made = self._make(text)
        if len(text) <= SHORT:
            if len(self) >= MOST:
                self.clear()
            self[text] = made
        return made
