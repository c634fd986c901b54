"""Receipt: what `send` returns."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from streamtools.message import sets_slots


@sets_slots
@dataclass(frozen=True, slots=True)
class Receipt:
    """What `send` returns: the broker holds the message.

    You can await it. With `send(wait=False)` (Kafka) this waits until the broker holds the message; otherwise it
    returns at once.

    Attributes:
        id: the message's id.
        queue: where it was sent.
    """

    id: str
    queue: str

    def __await__(self) -> Generator[Any, None, Receipt]:
        return self._confirmed().__await__()

    async def _confirmed(self) -> Receipt:
        return self
