"""A bus in a harness: at the harness's own address, and everything else as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any
from unittest.mock import patch

from streamtools.bus import Bus
from streamtools.bus.contracts import Contract
from streamtools.bus.fan_out import Shared
from streamtools.consumer import BoundHandler, Consumer
from streamtools.delivery import Settlement
from streamtools.exchange import Binding
from streamtools.message import Message


@asynccontextmanager
async def moved(bus: Bus, url: str) -> AsyncIterator[None]:
    """Until its end the bus sends, asks and subscribes at another address; to start or stop it does nothing.

    What its own protocol cannot do is refused all the same.
    """

    async def start() -> Bus:
        return bus

    async def stop() -> None:
        return None

    instead: dict[str, Any] = {"_transport": bus._transport.moved(url), "start": start, "stop": stop}
    with ExitStack() as stack:
        for name, value in instead.items():
            stack.enter_context(patch.object(bus, name, value))
        try:
            yield
        finally:
            await bus.close()


class BusProbe:
    """A bus as a source of a harness, like a routed handler."""

    def __init__(self, bus: Bus) -> None:
        self.loop: BoundHandler = bus.bound[0]
        self.name: str = self.loop.name
        self.bus: Bus = bus
        self.queue: str = bus._transport.own_queue
        self.options: dict[str, Any] = bus._transport.options

    def build(self, url: str) -> Consumer:
        """The consumer of its queue; the bus has been moved to `url`."""
        return self.bus.consumer

    @property
    def bindings(self) -> list[Binding]:
        """What the queue is bound to now."""
        return [*self.bus._subscriptions]


def parts_of(settlement: Settlement) -> list[Settlement]:
    """What each handler made of a message."""
    return [part for _, part in settlement.parts] if isinstance(settlement, Shared) else [settlement]


def type_of(payload: object) -> str | None:
    """The name on the wire of a contract."""
    return payload.__terms__.name if isinstance(payload, Contract) else None


def is_of(message: Message, what: str | type | None) -> bool:
    """Whether a message went to this queue or topic, or is of this contract."""
    if isinstance(what, type) and issubclass(what, Contract):
        return message.type == what.__terms__.name
    return what is None or message.queue == what
