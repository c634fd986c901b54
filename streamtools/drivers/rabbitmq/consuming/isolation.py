"""Isolation: receives one message at a time while each may be a poison message.

When a process dies, the delivery count rises for every message that its consumer had in hand, not only for the one
that killed it. So a consumer begins with a prefetch of one. It takes its whole prefetch when a message comes that has
no such count. So the neighbours of a poison message do not get its count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel
from streamtools.drivers.rabbitmq.topology.queues import Queue
from streamtools.engine.loop import SUSPECT

#: A suspect that is not settled stays alone for this many seconds, even if the consumer asks for more messages.
ALONE_TIMEOUT: Final = 5.0


class Isolation:
    """Decides how many messages a channel may have in hand.

    Parameters:
        prefetch: the number after the first message that is not a suspect.
        queue: the real queue; None if we may not ask for it.
        is_ordered: whether the consumer handles messages in order.

    Attributes:
        is_narrow: whether every message so far is a suspect.
        widens_after: whether a message has come that is not a suspect, and must be settled before more are received.
    """

    def __init__(self, channel: ConsumerChannel, prefetch: int, queue: Queue | None, *, is_ordered: bool) -> None:
        self._channel = channel
        self._prefetch = prefetch
        self._is_ordered = is_ordered
        #: If true, another process may become the active consumer as soon as this one pauses.
        self._may_be_single_active = queue is None or queue.is_single_active
        #: A classic queue counts no deliveries, so none of its messages is a suspect.
        self.is_narrow: bool = prefetch > 1 and not (queue is not None and queue.is_classic)
        self.widens_after: bool = False
        self._widening: asyncio.Task[None] | None = None
        #: Until when the last received messages stay alone, on the loop's clock.
        self._alone_until = 0.0

    @property
    def prefetch(self) -> int:
        """The number of messages that we may have in hand now."""
        return 1 if self.is_narrow or self.widens_after else self._prefetch

    async def arrival(self, is_handled_alone: Callable[[], bool]) -> bool:
        """Wait for a delivery; return False if the prefetch was raised or is being raised: then call this again.

        The prefetch is raised if the consumer keeps its message and asks for more: a handler may gather several
        messages before it settles them, or the loop may hold a message whose copy the broker refuses. With a prefetch
        of one they would wait for ever.

        Parameters:
            is_handled_alone: returns whether a handler is running that needs no other message.
        """
        if self._widening is not None:
            await asyncio.wait({self._widening})
            self._widening = None
            return False
        channel = self._channel
        is_one = self.is_narrow or self.widens_after
        if not is_one or self._is_ordered or channel.buffer or not channel.in_hand:
            await channel.arrival()
            return True
        try:
            async with asyncio.timeout_at(self._alone_until):
                await channel.arrival()
        except TimeoutError:
            if self._may_be_single_active and is_handled_alone():
                self._alone_until += ALONE_TIMEOUT
                return False
            self.is_narrow = self.widens_after = False
            self._widening = channel.beside(self._widen)
            return False
        return True

    def raises_prefetch(self, count: int) -> bool:
        """Raise the prefetch if a message with this delivery count is not a suspect; return True while that goes on.

        The message is passed on only after that. If it was settled earlier, the broker would deliver the next message
        to the consumer that is being cancelled, and might put it back behind later messages (seen on 3.10).
        """
        if count >= SUSPECT:
            return False
        self.is_narrow = False
        if self._is_ordered or self._may_be_single_active:
            # While nobody consumes here, another process may become the active consumer. So this message is handled
            # first, alone, and the prefetch is raised when it is done.
            self.widens_after = True
            return False
        self._widening = self._channel.beside(self._widen)
        return True

    def handed_over(self) -> None:
        """Note that messages were passed on to the consumer."""
        self._alone_until = asyncio.get_running_loop().time() + ALONE_TIMEOUT

    async def widen_and_settle(self, acks: Sequence[int]) -> None:
        """Raise the prefetch, which was postponed until now, and acknowledge.

        Raises:
            ConnectionLost: the channel has ended.
        """
        self.widens_after = False
        self._widening = self._channel.beside(self._widen, acks)
        await asyncio.wait({self._widening})
        self._channel.check()

    async def _widen(self, acks: Sequence[int] = ()) -> None:
        await self._channel.widen(self._prefetch)
        self._channel.settle(acks)

    async def stop(self, timeout: float) -> int:
        """Stop changing the prefetch, and return it.

        Parameters:
            timeout: the seconds to wait for a change that has begun.
        """
        prefetch = self.prefetch
        self.is_narrow = False
        if self._widening is not None:
            await asyncio.wait({self._widening}, timeout=timeout)
            self._widening.cancel()
            await asyncio.wait({self._widening})
        return prefetch
