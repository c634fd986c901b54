"""Verdicts: what is to become of a delivery."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final, NamedTuple, Self


# A further copy is to be known where these two are told apart: `retry_copy` and `error_copy`
# (engine/messages/failures.py), `Dispatcher._log` and `_rejected` (engine/dispatch.py), `_answer_failure`
# (bus/fan_out.py), and in the drivers `_route` (asyncio), `_rows` (SQLite) and copies.py (Kafka).
class Copy(StrEnum):
    """Which copy of the message a verdict sends before the delivery is finished."""

    #: To the same queue, as the next attempt.
    RETRY = "retry"
    #: To the error queue.
    ERROR = "error"


class _Effect(NamedTuple):
    """What a verdict does; see `VerdictKind`."""

    gravity: int
    copy: Copy | None = None
    gives_back: bool = False


_EFFECTS: Final[dict[str, _Effect]] = {
    "ack": _Effect(gravity=0),
    "retry": _Effect(gravity=2, copy=Copy.RETRY),
    "reject": _Effect(gravity=3, copy=Copy.ERROR),
    "drop": _Effect(gravity=1),
    "release": _Effect(gravity=0, gives_back=True),
}


# A further kind needs its effect above, a signal that a handler raises (`errors.Signal` and `Retry._decide`, which
# takes an unknown signal for an error), a method of `Delivery`, and a response over HTTP (`settlement_response`).
# Type checkers and tests tell of the last two.
class VerdictKind(StrEnum):
    """The five verdicts on a delivery.

    Attributes:
        gives_back: the broker gets the delivery back as it came; every other kind finishes it.
        copy: the copy of the message that it sends; None for none.
        gravity: of the errors in one group, the one with the gravest verdict decides.
    """

    gives_back: bool
    copy: Copy | None
    gravity: int

    ACK = "ack"
    RETRY = "retry"
    REJECT = "reject"
    DROP = "drop"
    #: Given back to the broker untouched: the consumer is shutting down.
    RELEASE = "release"

    def __init__(self, name: str) -> None:
        self.gravity, self.copy, self.gives_back = _EFFECTS[name]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done with a delivery: `ack`, `retry` after a delay, `reject`, `drop` or `release`.

    Attributes:
        kind: which of the five; its name as a text works as well.
        delay: for a retry, the seconds to wait.
        reason: for a reject, why.

    Raises:
        ValueError: there is no such kind.
    """

    kind: VerdictKind
    delay: float = 0.0
    reason: str = ""

    def __post_init__(self) -> None:
        if type(self.kind) is not VerdictKind:
            object.__setattr__(self, "kind", VerdictKind(self.kind))

    @classmethod
    def retry(cls, delay: float | timedelta = 0.0) -> Self:
        """Handle the message again after `delay`: seconds, or a timedelta."""
        return cls(VerdictKind.RETRY, delay=delay.total_seconds() if isinstance(delay, timedelta) else delay)

    @classmethod
    def reject(cls, reason: str = "") -> Self:
        """Move the message to the error queue."""
        return cls(VerdictKind.REJECT, reason=reason)


ACK = Verdict(VerdictKind.ACK)
DROP = Verdict(VerdictKind.DROP)
RELEASE = Verdict(VerdictKind.RELEASE)
#: The older name.
Kind = VerdictKind
