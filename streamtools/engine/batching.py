"""SettlementBatcher: gathers settlements into batches without a timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from streamtools.delivery import Settlement


class SettlementBatcher:
    """Settles settlements in batches: while one batch is being settled, new settlements gather for the next."""

    def __init__(self, settle: Callable[[list[Settlement]], Awaitable[None]]) -> None:
        self._settle = settle
        self._pending: list[Settlement] = []
        self._settling = False
        self._wake = asyncio.Event()

    @property
    def busy(self) -> bool:
        """Whether something that was added is not settled yet."""
        return self._settling or bool(self._pending)

    def add(self, settlement: Settlement) -> None:
        if not self._pending:
            self._wake.set()
        self._pending.append(settlement)

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._pending = self._pending, []
            self._settling = True
            await self._settle(batch)
            self._settling = False
