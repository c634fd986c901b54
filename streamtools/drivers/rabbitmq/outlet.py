"""Publishing over one connection, on a fresh channel once a queue has said no, or nothing for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Final

from streamtools.drivers.rabbitmq.frames import NeverSent
from streamtools.drivers.rabbitmq.link import Link
from streamtools.drivers.rabbitmq.publisher import Limits, Publisher
from streamtools.errors import ConnectionLost, SendError
from streamtools.message import Message

#: Seconds between tries of what a queue did not take; the last one again and again.
DELAYS: Final = (0.05, 0.15, 0.5, 1.5)


class Outlet:
    """Publishes over one connection, and again what a queue did not take.

    A quorum queue without a leader for a moment (just declared, or the leader's node has gone) says no in the
    same way as one that is full. And a channel whose first message met it so is told no for ever after, while
    another channel of the same connection is not (seen on 3.10): hence each try has a new one.

    Parameters:
        patience: seconds for which what a queue has not taken is tried again.
    """

    def __init__(self, link: Link, publisher: Publisher, limits: Limits, patience: float) -> None:
        self._link = link
        self._publisher = publisher
        self._limits = limits
        self._patience = patience
        self._renewing = asyncio.Lock()

    @classmethod
    async def open(cls, link: Link, limits: Limits, *, patience: float = sum(DELAYS)) -> Outlet:
        """Open a channel for publishing on this connection."""
        return cls(link, await Publisher.open(link, limits), limits, patience)

    @property
    def error(self) -> ConnectionLost | None:
        """Why it is of no use any more."""
        return self._publisher.error

    async def publish(self, messages: Sequence[Message]) -> None:
        """Return when the broker holds all of them, each in the queue that it names.

        Raises:
            SendError: naming those it does not take; it holds the others.
            ConnectionLost: the connection ended; nothing is known of what was not confirmed.
        """
        begun = time.monotonic()
        publisher = self._publisher
        if publisher.stuck:
            publisher = await self._renew(publisher)
        refused, nacked = await publisher.publish(messages)
        # A no may be long in coming, and then some tries are due all the same.
        deadline = max(begun + self._patience, time.monotonic() + min(self._patience, sum(DELAYS)))
        for delay in chain(DELAYS, repeat(DELAYS[-1])):
            if not nacked or time.monotonic() + delay > deadline:
                break
            await asyncio.sleep(delay)
            publisher = await self._renew(publisher)
            more, nacked = await publisher.publish([m for m in messages if m.id in nacked])
            refused |= more
        if refused or nacked:
            raise _refusal(messages, refused | nacked)

    async def _renew(self, publisher: Publisher) -> Publisher:
        """A channel that is newer than this one; the old one is closed when nobody uses it any more."""
        async with self._renewing:
            if self._publisher is publisher:
                self._publisher = await Publisher.open(self._link, self._limits, after=publisher)
                publisher.retire()
            return self._publisher


def _refusal(messages: Sequence[Message], refused: dict[str, str]) -> SendError:
    reasons = list(dict.fromkeys(refused.values()))
    text = " ".join(reasons[:3]) + (f" And {len(reasons) - 3} more." if len(reasons) > 3 else "")
    count = f"{len(refused)} of {len(messages)} messages: " if len(messages) > 1 else ""
    return SendError(
        count + text,
        refused=[m.id for m in messages if m.id in refused],
        unfit=[id_ for id_, why in refused.items() if isinstance(why, NeverSent)],
    )
