"""SubscriptionConfig: how a consumer joins its group, and which topics it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamtools.drivers.kafka.consuming.starts import Start
from streamtools.drivers.kafka.names import BINDINGS, RETRY


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionConfig:
    """How a consumer joins its group.

    Attributes:
        group: the group.
        topics: topics to consume.
        pattern: consume also the topics whose whole name matches this expression; None for none.
        start: where a new group begins.
        static_id: this member's own name, by which it keeps its partitions over a restart.
        revoke_timeout: seconds for handlers at work when a partition is revoked.
        retry_topic: the group's; a new group reads all of it.
        exactly_once: offsets are committed by transactions alone.
    """

    group: str
    topics: tuple[str, ...]
    retry_topic: str
    pattern: str | None = None
    start: Start = Start()
    static_id: str | None = None
    revoke_timeout: float = 30.0
    exactly_once: bool = False


def subscription(pattern: str | None, topics: tuple[str, ...], error_topic: str) -> str | None:
    """An expression for `topics` and for the topics that match `pattern`; None without a pattern.

    The pattern alone never matches retry topics, the bindings, and `error_topic`.
    """
    if pattern is None:
        return None
    own = "|".join(re.escape(topic) for topic in topics)
    others = rf"(?!{re.escape(error_topic)}$|{re.escape(BINDINGS)}$)(?!.*{re.escape(RETRY)}(?:\.|$))"
    return rf"(?:{own})$|{others}(?:{pattern})$"
