"""Counts what happened to the messages of the demo, by their ids: a message that is delivered twice counts once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from streamtools.engine.tasks.waiting import is_set_within
from streamtools.errors import DecodeError, HandlerError, Reject
from streamtools.message import Message
from streamtools.types import Handler

#: If nothing happens for this many seconds, the demo ends with an error.
EVENT_TIMEOUT: Final = 30.0


class Tally:
    """A middleware that counts."""

    def __init__(self) -> None:
        self.handled: dict[str, set[str]] = defaultdict(set)
        self.retried: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.rejected: dict[str, set[str]] = defaultdict(set)
        self._changed = asyncio.Event()

    async def watch(self, message: Message, call_next: Handler) -> object:
        """Count one run of a handler."""
        try:
            result = await call_next(message)
        except (DecodeError, Reject):
            self.rejected[message.queue].add(message.id)
            raise
        except Exception:
            self.retried[message.queue].add((message.id, message.attempt))
            raise
        else:
            self.handled[message.queue].add(message.id)
            return result
        finally:
            self._changed.set()

    async def until(self, finished: Callable[[], bool]) -> None:
        """Wait until `finished()` is true.

        Raises:
            HandlerError: nothing has happened for EVENT_TIMEOUT seconds.
        """
        while not finished():
            self._changed.clear()
            if not await is_set_within(self._changed, EVENT_TIMEOUT):
                raise HandlerError(
                    f"No message was handled for {EVENT_TIMEOUT:g} s. Does another program consume the demo's queues?"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The numbers of one queue.

    Attributes:
        queue: its name in the service.
        sent: messages that the broker confirmed.
        handled: messages that a handler finished.
        retried: runs that failed and were repeated.
        dead_lettered: messages found in the error queue.
        redriven: messages put back from there.
    """

    queue: str
    sent: int
    handled: int
    retried: int
    dead_lettered: int
    redriven: int

    @property
    def adds_up(self) -> bool:
        """Whether every message that was sent was handled, or is still in the error queue."""
        return self.sent == self.handled + self.dead_lettered - self.redriven


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of the demo.

    Attributes:
        url: where it ran, without a password.
        rows: one for each queue, in the order of the service.
        left: messages in the error queue at the end, as the broker counts them.
        seconds: the time from the first send to the last settlement.
    """

    url: str
    rows: tuple[Row, ...]
    left: int
    seconds: float

    @property
    def total(self) -> Row:
        """All queues together."""
        names = ("sent", "handled", "retried", "dead_lettered", "redriven")
        return Row(queue="total", **{name: sum(getattr(row, name) for row in self.rows) for name in names})

    @property
    def rate(self) -> float:
        """The messages that were sent, confirmed, received, handled and acknowledged per second."""
        return self.total.handled / self.seconds

    @property
    def adds_up(self) -> bool:
        """Whether no message is missing and none exists twice."""
        total = self.total
        return all(row.adds_up for row in self.rows) and self.left == total.dead_lettered - total.redriven
