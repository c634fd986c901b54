"""What must be where: a broker's queues as plain lists, for the state machine to compare a driver with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from streamtools.message import Message

#: The seconds that everything here is a multiple of, so that the test's own running time rounds to nothing.
STEP = 100
#: Where messages are sent to, and where rejected ones go.
ORDERS, ERROR = "orders", "error"
QUEUES = (ORDERS, ERROR)
#: Wait of a message that the error queue's own consumer rejects: the default of Retry.max_delay.
ERROR_DELAY = 3 * STEP


@dataclass(eq=False)
class Entry:
    """One copy of a message, as it must be found.

    Attributes:
        meta: what is never to change: body, content type, type, key, headers.
        due: when it may be delivered, on the model's clock.
        expires: when it may no longer be, on the model's clock.
        error: the source queue, the reason and the attempts of its last failure.
        place: where it stands in its lane.
        count: deliveries without a verdict, where the broker counts.
        origin: the lane that it failed in.
    """

    id: str
    meta: tuple[object, ...]
    attempt: int = 1
    due: int = 0
    expires: int | None = None
    error: tuple[str, str, int] | None = None
    place: float = 0
    count: int = 0
    origin: Lane | None = None

    @property
    def seen(self) -> tuple[object, ...]:
        """What a receiver sees of it."""
        return (self.id, self.meta, self.attempt, self.error)


def seen(message: Message) -> tuple[object, ...]:
    """The same of a real message."""
    meta = (message.body, message.content_type, message.type, message.key, dict(message.headers))
    error = message.error
    details = None if error is None else (error.queue, error.reason, error.attempts)
    return (message.id, meta, message.attempt, details)


@dataclass(eq=False)
class Lane:
    """What one group has waiting of one queue."""

    queue: str
    entries: list[Entry] = field(default_factory=list)


@dataclass(eq=False)
class Topic:
    """One queue: a lane for each group that has ever come; before that, one lane that nobody has claimed."""

    lanes: dict[str | None, Lane]
    claimed: bool = False

    def __iter__(self) -> Iterator[Lane]:
        return iter(self.lanes.values())


class Model:
    """Every queue, and the clock.

    Parameters:
        keeps_place: a delayed message has the place in which it was sent, not that in which it became due.
    """

    def __init__(self, *queues: str, keeps_place: bool) -> None:
        self.topics = {queue: Topic({None: Lane(queue)}) for queue in queues}
        self.now = 0
        self._keeps_place = keeps_place
        self._places = count()

    # --- questions ------------------------------------------------------------------------------

    def ready(self, lane: Lane) -> list[Entry]:
        """What waits and is due, in its order."""
        return sorted((e for e in lane.entries if e.due <= self.now), key=lambda entry: entry.place)

    def all_ready(self, queue: str) -> list[tuple[Lane, Entry]]:
        """What waits and is due in all lanes of a queue, one lane after the other."""
        return [(lane, entry) for lane in self.topics[queue] for entry in self.ready(lane)]

    def numbers(self, queue: str) -> tuple[int, int]:
        """Messages ready and delayed."""
        ready = len(self.all_ready(queue))
        return ready, sum(len(lane.entries) for lane in self.topics[queue]) - ready

    # --- what happens ---------------------------------------------------------------------------

    def join(self, queue: str, group: str | None, *, latest: bool) -> Lane:
        """A consumer of a group has come."""
        topic = self.topics[queue]
        if not topic.claimed:
            topic.claimed = True
            topic.lanes = {group: topic.lanes[None]}
            if latest and group is not None:
                topic.lanes[group].entries.clear()
        return topic.lanes.setdefault(group, Lane(queue))

    def publish(self, queue: str, entry: Entry, lane: Lane | None = None, *, before: Entry | None = None) -> None:
        """A message has come: to one lane, or to each lane of its queue; behind all others, or before one of them."""
        for target in [lane] if lane is not None else self.topics[queue]:
            place = next(e.place - 0.5 for e in target.entries if e.id == before.id) if before else next(self._places)
            target.entries.append(replace(entry, place=place))

    def take(self, lane: Lane, entries: Iterable[Entry]) -> None:
        """These are in hand, or gone."""
        taken = set(entries)
        lane.entries = [entry for entry in lane.entries if entry not in taken]

    def put_back(self, lane: Lane, entry: Entry, *, count: int = 0) -> None:
        """It was not settled."""
        entry.count += count
        lane.entries.append(entry)

    def retry(self, lane: Lane, entry: Entry, *, delay: int = 0, reason: str = "") -> Entry:
        """It goes behind, as the next attempt."""
        again = replace(
            entry, attempt=entry.attempt + 1, due=self.now + delay if delay else 0, count=0,
            error=self._error(lane, entry, reason),
        )  # fmt: skip
        self.publish(lane.queue, again, lane)
        return lane.entries[-1]

    def reject(self, lane: Lane, entry: Entry, reason: str) -> None:
        """It goes to the error queue; from there back, after a while."""
        again = lane.queue == ERROR
        failed = replace(
            entry, due=self.now + ERROR_DELAY if again else 0, expires=None, count=0,
            error=self._error(lane, entry, reason), origin=entry.origin if again else lane,
        )  # fmt: skip
        self.publish(ERROR, failed)

    def move(self, queue: str, target: str | None, where: Callable[[Entry], bool], limit: int | None) -> int:
        """What is ready goes to another queue, or back where it failed; the number."""
        moved = [(lane, entry) for lane, entry in self.all_ready(queue)[:limit] if where(entry)]
        for lane, entry in moved:
            self.take(lane, [entry])
            home = (entry.error or ("", "", 0))[0]
            goal = target or home
            back = lane if goal == queue else entry.origin
            back = back if back in self.topics[goal] else None
            # Elsewhere than home it keeps where it failed, for its way from there.
            way = {} if goal != home and entry.error else {"error": None, "origin": None}
            fresh = replace(entry, attempt=1, due=0, expires=None, count=0, **way)
            self.publish(goal, fresh, back)
        return len(moved)

    def purge(self, queue: str) -> int:
        """Forget what waits; the number."""
        number = sum(len(lane.entries) for lane in self.topics[queue])
        for lane in self.topics[queue]:
            lane.entries.clear()
        return number

    def take_back(self, queue: str, id: str) -> bool:
        """Forget a delayed message; False when it is due, or not there."""
        found = [
            (lane, entry)
            for lane in self.topics[queue]
            for entry in lane.entries
            if entry.id == id and entry.due > self.now
        ]
        for lane, entry in found:
            self.take(lane, [entry])
        return bool(found)

    def delete(self, queue: str) -> None:
        """Forget a queue, all that is in it, and who read it."""
        self.topics[queue] = Topic({None: Lane(queue)})

    def advance(self, seconds: int) -> None:
        """Time passes, and delayed messages become due."""
        before, self.now = self.now, self.now + seconds
        lanes = [lane for topic in self.topics.values() for lane in topic]
        for lane in lanes if not self._keeps_place else ():
            for entry in sorted(lane.entries, key=lambda entry: (entry.due, entry.place)):
                if before < entry.due <= self.now:
                    entry.place = next(self._places)

    def _error(self, lane: Lane, entry: Entry, reason: str) -> tuple[str, str, int] | None:
        # In the error queue a message keeps what it says of the failure that brought it there.
        if lane.queue == ERROR and entry.error is not None:
            return entry.error
        return (lane.queue, reason, entry.attempt)
