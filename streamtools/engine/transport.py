"""Transport: the hooks of a consumer's driver that the engine calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from streamtools.delivery import Delivery, Settlement


class Transport(Protocol):
    """A driver, or the wrapper of a driver; `ConsumerHooks` says what each hook does."""

    async def _receive(self, limit: int) -> Sequence[Delivery]: ...
    async def _poll(self, limit: int) -> Sequence[Delivery]: ...
    async def _settle(self, settlements: Sequence[Settlement]) -> None: ...
    async def _redeclare(self) -> None: ...
    async def _stop(self) -> None: ...
