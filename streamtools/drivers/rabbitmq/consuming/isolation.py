"""One message at a time, until one comes that cannot have ended a process.

The delivery count rises for every message that a dead consumer held, not only for the one that killed it. So a
consumer begins with a prefetch of one, and takes its whole prefetch once it meets a message that nobody died with;
then the messages around one that ends the process do not share its count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel
from streamtools.drivers.rabbitmq.topology.queues import Queue
from streamtools.engine.loop import SUSPECT

#: Seconds for which a suspect that is not settled stays alone, even if more messages are asked for.
ALONE_TIMEOUT: Final = 5.0


class Isolation:
    """Decides how many messages a channel may have in hand.

    Parameters:
        prefetch: how many, once a message has come that is no suspect.
        queue: the queue as it is; None where we may not look.
        is_ordered: the consumer handles messages in order.

    Attributes:
        is_narrow: every message that has come so far is a suspect.
        widens_after: one has come that is not, and is to be settled before more is taken.
    """

    def __init__(self, channel: ConsumerChannel, prefetch: int, queue: Queue | None, *, is_ordered: bool) -> None:
        self._channel = channel
        self._prefetch = prefetch
        self._is_ordered = is_ordered
        #: Another process may become the queue's consumer as soon as this one pauses.
        self._may_be_single_active = queue is None or queue.is_single_active
        #: In a classic queue, which counts no deliveries, nobody is a suspect.
        self.is_narrow: bool = prefetch > 1 and not (queue is not None and queue.is_classic)
        self.widens_after: bool = False
        self._widening: asyncio.Task[None] | None = None
        #: Until when the messages that were handed over last stay alone, on the loop's clock.
        self._alone_until = 0.0

    @property
    def prefetch(self) -> int:
        """Messages that the broker may have us hold now."""
        return 1 if self.is_narrow or self.widens_after else self._prefetch

    async def arrival(self, is_handled_alone: Callable[[], bool]) -> bool:
        """Wait for a delivery; False when the prefetch has been raised, or is about to be: wait again.

        It is raised for those that hold their message and ask for more: a handler that gathers several messages
        before it settles them, and a loop that keeps a message whose copy the broker refuses. With one message at a
        time they would wait for ever.

        Parameters:
            is_handled_alone: the handler needs no other message beside its own.
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
        """Raise the prefetch if a message that was delivered so often is no suspect; True while that is under way.

        The message is handed over only then: were it settled before, the broker would deliver the next to the
        consumer that is about to be cancelled, and may take it back behind later ones (seen on 3.10).
        """
        if count >= SUSPECT:
            return False
        self.is_narrow = False
        if self._is_ordered or self._may_be_single_active:
            # Another process may become the active one while nobody consumes here: this message is
            # handled first, alone, and the rest is taken once it is done.
            self.widens_after = True
            return False
        self._widening = self._channel.beside(self._widen)
        return True

    def handed_over(self) -> None:
        """Note that messages were handed to the consumer."""
        self._alone_until = asyncio.get_running_loop().time() + ALONE_TIMEOUT

    async def widen_and_settle(self, acks: Sequence[int]) -> None:
        """Raise the prefetch, which was put off until now, and acknowledge.

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
        """Do not change the prefetch any more.

        Parameters:
            timeout: seconds for a change that is under way.

        Returns:
            the prefetch.
        """
        prefetch = self.prefetch
        self.is_narrow = False
        if self._widening is not None:
            await asyncio.wait({self._widening}, timeout=timeout)
            self._widening.cancel()
            await asyncio.wait({self._widening})
        return prefetch
