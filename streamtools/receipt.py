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

    Awaiting it returns it: with `send(wait=False)`, where a protocol has that, once the broker holds the message.

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
