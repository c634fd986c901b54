"""Verdicts: what is to become of a delivery."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Self


class Kind(StrEnum):
    """The five ends that a delivery can come to."""

    ACK = "ack"
    RETRY = "retry"
    REJECT = "reject"
    DROP = "drop"
    #: Given back to the broker untouched: the consumer is shutting down.
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of a delivery: `ack`, `retry` after a delay, `reject`, `drop` or `release`.

    Attributes:
        kind: which of the five; its name will do.
        delay: for a retry, the seconds to wait.
        reason: for a reject, why.

    Raises:
        ValueError: there is no such kind.
    """

    kind: Kind
    delay: float = 0.0
    reason: str = ""

    def __post_init__(self) -> None:
        if type(self.kind) is not Kind:
            object.__setattr__(self, "kind", Kind(self.kind))

    @classmethod
    def retry(cls, delay: float | timedelta = 0.0) -> Self:
        """Run the message again, after `delay`: seconds, or a timedelta."""
        return cls(Kind.RETRY, delay=delay.total_seconds() if isinstance(delay, timedelta) else delay)

    @classmethod
    def reject(cls, reason: str = "") -> Self:
        """Move the message to the error queue."""
        return cls(Kind.REJECT, reason=reason)


ACK = Verdict(Kind.ACK)
DROP = Verdict(Kind.DROP)
RELEASE = Verdict(Kind.RELEASE)
