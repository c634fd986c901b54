"""What the event loop asks of the database thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import randbits
from typing import Any

from streamtools.drivers.sqlite.tables import Tables

#: Done once for all jobs of its kind in one transaction: their arguments in, their results out.
Run = Callable[[Tables, Sequence[Any]], Sequence[Any]]
#: What came of a job: the job, its result, its error.
Outcome = tuple["Job | Waiter", Any, BaseException | None]


@dataclass(slots=True, eq=False)
class Job:
    """Something to be done in a transaction.

    Attributes:
        run: does it.
        argument: for `run`.
        full: it must be on the disk before it counts as done.
        patience: seconds to wait for a lock on the file.
        new: bytes of messages that are sent.
        moved: bytes of what else is written, about, where it is much.
        future: where the result goes; of the event loop, which alone touches it.
        cancelled: nobody waits for it any more.
    """

    run: Run
    argument: Any
    full: bool
    patience: float
    new: int = 0
    moved: int = 0
    future: Any = None
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class Holder:
    """A consumer, as the database thread sees it.

    Attributes:
        lanes: what it reads, in this order.
        claim: the number under which it holds messages; a new one after a lease that ran out.
        expires: when its lease ends as far as is known, in seconds since the epoch; 0 when it has none.
    """

    lanes: Sequence[int]
    ordered_by: str | None = None
    alone: bool = True
    claim: int = field(default_factory=lambda: randbits(62))
    expires: float = 0.0
    #: Its consumer has closed: nothing more is claimed for it.
    closed: bool = False
    #: The last claim took all that it was allowed to, so that there is likely more.
    eager: bool = False
    #: Bytes of the largest body seen lately.
    size: int = 1


@dataclass(slots=True, eq=False)
class Waiter:
    """A consumer that waits for messages.

    Attributes:
        due: when the next delayed message is ready, in seconds since the epoch.
        fresh: nothing was looked up for it yet.
        once: it only asks, and is told when there is nothing.
    """

    holder: Holder
    limit: int
    patience: float
    future: Any = None
    cancelled: bool = False
    due: float | None = None
    fresh: bool = True
    once: bool = False
