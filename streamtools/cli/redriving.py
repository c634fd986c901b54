"""Which messages `streamtools errors redrive` moves, and where to; `streamtools.redrive` moves them.

Where a message failed stands in the message. Whoever may write to the error queue may have written it, and may not be
allowed to write to that queue. So nothing goes to a queue that the operator has not named or confirmed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from shlex import quote
from typing import TYPE_CHECKING, Final

from streamtools.cli import output

if TYPE_CHECKING:
    from streamtools.admin import QueueAdmin
    from streamtools.message import Message

#: Queues that are named in one sentence, at most.
NAMED: Final = 20
#: Characters of a queue's name that are shown: no queue has more.
NAME_SHOWN: Final = 255


class Movable:
    """Chooses the messages that a redrive moves: those that were selected and have a target. It notes the others.

    Parameters:
        chosen: selects messages, by filter or by id.
        to: where all of them go; each to the queue that it failed in when None.
        sources: only those that failed in one of these queues; all when there are none.
    """

    def __init__(self, chosen: Callable[[Message], bool], to: str | None, sources: Sequence[str] | None) -> None:
        self._meant = chosen
        self.to = to
        self._sources = frozenset(sources or ())
        #: Queues that are known not to be there.
        self.missing: frozenset[str] = frozenset()
        #: Queues that messages may go to.
        self.allowed: set[str] = {to} if to is not None else set(self._sources)
        self._own: str | None = None
        self.begin()

    def begin(self) -> None:
        """Forget what stayed so far."""
        #: Ids of messages that do not say where they failed.
        self._homeless: list[str] = []
        #: Queues that are not there, and queues that were not named, with the number of messages that would go there.
        self._nowhere: Counter[str] = Counter()
        self._unnamed: Counter[str] = Counter()

    def _chosen(self, message: Message) -> bool:
        from streamtools.engine.messages.origin import failed_in_queue

        return self._meant(message) and (not self._sources or failed_in_queue(message) in self._sources)

    def target(self, message: Message) -> str | None:
        """Its target; None if it was not selected, or its queue is unknown."""
        from streamtools.engine.messages.origin import failed_in_queue

        return (self.to or failed_in_queue(message)) if self._chosen(message) else None

    def targets(self, seen: Iterable[Message], limit: int | None) -> Counter[str]:
        """Where those would go that can, and how many to each."""
        found: Counter[str] = Counter()
        for message in seen:
            if limit is not None and found.total() >= limit:
                break
            if (target := self.target(message)) is not None and target not in self.missing:
                found[target] += 1
        return found

    def allow_own(self, error_queue: str) -> None:
        """Allow the queue whose own error queue this is, such as `orders` for `orders.error`.

        Whoever may write to a queue's own error queue is that queue's own service.
        """
        self._own = error_queue

    def __call__(self, message: Message) -> bool:
        target = self.target(message)
        if target is None:
            if self._chosen(message):
                self._homeless.append(message.id)
            return False
        if target in self.missing:
            self._nowhere[target] += 1
            return False
        if not self._may_go_to(target):
            self._unnamed[target] += 1
            return False
        return True

    def _may_go_to(self, target: str) -> bool:
        from streamtools.engine.messages.origin import belongs_to

        return target in self.allowed or (self._own is not None and belongs_to(self._own, target))

    def say_what_stays(self, queue: str) -> None:
        """End with exit code 1 if a selected message stays."""
        lines = [
            f"{_of(number, queue)} cannot move: there is no queue {name[:NAME_SHOWN]!r}."
            for name, number in list(self._nowhere.items())[:NAMED]
        ]
        if number := len(self._homeless):
            shown = ", ".join(name[:NAME_SHOWN] for name in self._homeless[:3]) + (", ..." if number > 3 else "")
            lines.append(
                f"{_of(number, queue)} cannot move: unknown where it failed ({shown}). Name a queue: --to QUEUE."
            )
        if self._unnamed:
            options = " ".join(f"--from {quote(name)}" for name in told_whole(self._unnamed))
            lines.append(
                f"{_of(self._unnamed.total(), queue)} did not move, since you have not named where to: "
                f"{told(self._unnamed)}. If that is right: {options}."
            )
        if lines:
            output.fail(" ".join(lines))


def told(targets: Mapping[str, int]) -> str:
    """Queues, each with its number of messages, in words."""
    shown = [f"{targets[name]:,} to {name[:NAME_SHOWN]!r}" for name in sorted(targets)[:NAMED]]
    more = len(targets) - len(shown)
    return ", ".join(shown) + (f", and to {more:,} more queues" if more else "") if targets else "no queue"


def told_whole(targets: Iterable[str]) -> list[str]:
    """The queues whose whole names `told` shows: the operator's answer is about no others."""
    return [name for name in sorted(targets)[:NAMED] if len(name) <= NAME_SHOWN]


def _of(number: int, queue: str) -> str:
    return f"{output.counted(number, 'message')} of {queue}"


async def missing_queues(admin: QueueAdmin, names: Iterable[str]) -> frozenset[str]:
    """Those of these queues that are not there."""
    from streamtools.errors import ConfigurationError

    missing = set()
    for name in set(names):
        try:
            await admin.stats(name)
        except ConfigurationError:  # no such queue, or no name of one
            missing.add(name)
    return frozenset(missing)
