"""The delays between attempts to reach a broker."""

from __future__ import annotations

import random
from typing import Final

#: Seconds before the second attempt to reach a broker; doubled each time, up to MAX_BACKOFF.
BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0
#: If a deadline is nearer than this many seconds, nothing is tried again.
LAST_TRY_MARGIN: Final = 0.2


def backoff(attempt: int) -> float:
    """Return the seconds to wait after failed attempt `attempt` (1 is the first), varied at random by a quarter."""
    return float(min(BACKOFF * 2 ** min(attempt - 1, 16), MAX_BACKOFF) * random.uniform(0.75, 1.25))  # nosec B311: a pause


def backoff_within(attempt: int, left: float) -> float | None:
    """Return `backoff(attempt)`, shortened to fit into the `left` seconds; None if no further attempt fits."""
    delay = backoff(attempt)
    if delay < left:
        return delay
    return left / 2 if left > LAST_TRY_MARGIN else None
