"""Runs a bus in a harness: only its address is replaced, by the one of the harness."""

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
    """Let a bus send, request and subscribe at another address in this block; `start` and `stop` do nothing there.

    Operations that its own protocol does not support are still refused.
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
    """Makes a bus a source of a harness, like a routed handler."""

    def __init__(self, bus: Bus) -> None:
        self.loop: BoundHandler = bus.bound[0]
        self.name: str = self.loop.name
        self.bus: Bus = bus
        self.queue: str = bus._transport.own_queue
        self.options: dict[str, Any] = bus._transport.options

    def build(self, url: str) -> Consumer:
        """Return the consumer of the bus's queue; the bus has been moved to `url` before."""
        return self.bus.consumer

    @property
    def bindings(self) -> list[Binding]:
        """The present bindings of the queue."""
        return [*self.bus._subscriptions]


def parts_of(settlement: Settlement) -> list[Settlement]:
    """Return the settlement of each handler of a message."""
    return [part for _, part in settlement.parts] if isinstance(settlement, Shared) else [settlement]


def type_of(payload: object) -> str | None:
    """Return the name of a contract on the wire; None if the payload is not a contract."""
    return payload.__terms__.name if isinstance(payload, Contract) else None


def is_of(message: Message, what: str | type | None) -> bool:
    """Whether a message went to this queue or topic, or has this contract."""
    if isinstance(what, type) and issubclass(what, Contract):
        return message.type == what.__terms__.name
    return what is None or message.queue == what
