"""How much the tests do that grow surer with length: a little in each run, all of it with STREAMTOOLS_LONG=1."""

from __future__ import annotations

import os
from typing import Final, TypeVar

T = TypeVar("T", int, float)

LONG: Final = os.environ.get("STREAMTOOLS_LONG", "").lower() not in ("", "0", "false")


def length(usual: T, long: T) -> T:
    """`usual`, or `long` where the long tests are asked for."""
    return long if LONG else usual
