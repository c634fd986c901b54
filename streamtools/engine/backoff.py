"""Pauses between attempts to reach a broker."""

from __future__ import annotations

import random
from typing import Final

#: Seconds before the second attempt to reach a broker; doubled each time, up to MAX_BACKOFF.
BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0
#: Seconds before a deadline within which nothing is tried again.
LAST_TRY_MARGIN: Final = 0.2


def backoff(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt` (1 is the first), spread by a quarter."""
    return float(min(BACKOFF * 2 ** min(attempt - 1, 16), MAX_BACKOFF) * random.uniform(0.75, 1.25))  # nosec B311: a pause


def backoff_within(attempt: int, left: float) -> float | None:
    """The same, shortened so that the last attempts come before the `left` seconds are over; None when they are."""
    delay = backoff(attempt)
    if delay < left:
        return delay
    return left / 2 if left > LAST_TRY_MARGIN else None
