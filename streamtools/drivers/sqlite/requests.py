"""What the event loop asks of the database thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import randbits
from typing import Any

from streamtools.drivers.sqlite.tables import Tables

#: Done once for all jobs of its kind in one transaction: their arguments in, their results out.
Run = Callable[[Tables, Sequence[Any]], Sequence[Any]]
#: What came of a request: the request, and its result or the error that it raises.
Answer = tuple["Request", Any]


@dataclass(slots=True, eq=False)
class Request:
    """What somebody waits for.

    Attributes:
        patience: seconds to wait for a lock on the file.
        future: where the answer goes; of the event loop, which alone touches it. None if nobody waits.
        cancelled: nobody waits for it any more.
    """

    patience: float
    future: Any = field(default=None, kw_only=True)
    cancelled: bool = field(default=False, kw_only=True)


@dataclass(slots=True, eq=False)
class Job(Request):
    """Something to be done in a transaction.

    Attributes:
        run: does it.
        argument: for `run`.
        full: it must be on the disk before it counts as done.
        new: bytes of messages that are sent.
        moved: bytes of what else is written, about, where it is much.
    """

    run: Run
    argument: Any
    full: bool = False
    new: int = 0
    moved: int = 0


@dataclass(slots=True, eq=False)
class Holder:
    """A consumer, as the database thread sees it.

    Attributes:
        lanes: what it reads, in this order.
        ordered_by: what keeps its order, as for a consumer.
        alone: a suspect is claimed alone.
        claim: the number under which it holds messages; a new one after a lease that ran out.
        expires: when its lease ends as far as is known, in seconds since the epoch; 0 when it has none.
        closed: its consumer has closed: nothing more is claimed for it.
        size: bytes of the largest body seen lately.
    """

    lanes: Sequence[int]
    ordered_by: str | None = None
    alone: bool = True
    claim: int = field(default_factory=lambda: randbits(62))
    expires: float = 0.0
    closed: bool = False
    size: int = 1


@dataclass(slots=True, eq=False)
class Waiter(Request):
    """A consumer that waits for messages.

    Attributes:
        once: it only asks, and is told when there is nothing.
        due: when the next delayed message is ready, in seconds since the epoch.
        fresh: nothing was looked up for it yet.
    """

    holder: Holder
    limit: int
    once: bool = False
    due: float | None = None
    fresh: bool = True
