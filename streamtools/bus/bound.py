"""BusHandler: all handlers of a bus as one handler, for a runner."""

from __future__ import annotations

from typing import Protocol

from streamtools.bus.fan_out import HandlerFanOut
from streamtools.consumer import BoundHandler, Consumer
from streamtools.engine.tasks.threads import Threads


class Served(Protocol):
    """A bus, as its loop knows it."""

    @property
    def consumer(self) -> Consumer: ...

    def make_decider(self, consumer: Consumer, threads: Threads) -> HandlerFanOut: ...


class BusHandler(BoundHandler):
    """All handlers of a bus as one handler, for a runner."""

    def __init__(self, bus: Served) -> None:
        self.bus: Served = bus
        self.name: str = f"bus {bus.consumer.queue}"

    @property
    def consumer(self) -> Consumer:  # type: ignore[override]
        """The consumer of the bus's queue."""
        return self.bus.consumer

    def make_decider(self, consumer: Consumer, threads: Threads) -> HandlerFanOut:
        """The handlers of the bus, compiled."""
        return self.bus.make_decider(consumer, threads)

    def __repr__(self) -> str:
        return f"<loop of {self.bus!r}>"
