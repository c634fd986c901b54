"""How a consumer is a member of its group."""

from __future__ import annotations

from dataclasses import dataclass

from streamtools.drivers.kafka.consuming.starts import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionConfig:
    """How to be a member.

    Attributes:
        group: the group.
        topics: all of these.
        pattern: all topics whose whole name matches, besides; None for none.
        start: where a new group begins.
        static_id: this member's name, by which it keeps its partitions over a restart.
        deadline: seconds for handlers at work when a partition is taken away.
        retry_topic: of which a new group has everything.
        exactly_once: offsets are committed by transactions, and by nothing else.
    """

    group: str
    topics: tuple[str, ...]
    retry_topic: str
    pattern: str | None = None
    start: Start = Start()
    static_id: str | None = None
    deadline: float = 30.0
    exactly_once: bool = False
