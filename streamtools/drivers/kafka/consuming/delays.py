"""Waiting for a time on Kafka, which delivers at once: a topic whose partitions are tiers of delay.

A message enters the tier whose length is the longest that does not exceed its delay, and stays there so
long; then it enters the next one for what is left, and so on until it is due. All that is in one tier
stays equally long, so the first to come is the first to go, and nobody waits behind another. Each group
has such a topic of its own (`orders.retry`), because a retry is for one group alone.

A delay is a floor: in the shortest tier a message may wait behind another, no longer than that tier is.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

#: Seconds that each partition holds a message back; the first one holds nothing back.
DELAY_LEVELS: Final = (0.0, 0.25, 2.0, 15.0, 120.0, 1800.0)


def level_of(seconds: float, partitions: int = len(DELAY_LEVELS)) -> int:
    """The partition for a message that is due in so many seconds.

    Parameters:
        partitions: that the topic has.
    """
    if seconds <= 0:
        return 0
    return min(max(1, bisect_right(DELAY_LEVELS, seconds) - 1), partitions - 1)


def leaves_at(partition: int, entered: float, due: float | None) -> float:
    """When a message leaves its tier: when it is due, or when it has been there so long as the tier is.

    Parameters:
        partition: the tier.
        entered: when it came, in seconds since the epoch.
        due: when it may be delivered; at once when None.
    """
    if due is None:
        return 0.0
    if partition <= 1 or partition >= len(DELAY_LEVELS):
        return due
    return min(due, entered + DELAY_LEVELS[partition])
