"""A consumer that the broker has forgotten: messages wait in its queue, and none is delivered.

RabbitMQ can forget a consumer, or acknowledgements that would make room for more, when a queue changes its leader
(github.com/rabbitmq/rabbitmq-server/pull/13095).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import MissingQueue
from streamtools.errors import QueueError

#: Seconds between two questions about a queue from which nothing comes.
SILENCE_POLL_INTERVAL: Final = 30.0


class ForgottenConsumer:
    """Ends a channel to which nothing is delivered, so that the consumer opens another one. It outlives channels."""

    def __init__(self) -> None:
        #: A channel was ended so, and nothing has come since.
        self._has_ended_one = False

    async def watch(self, channel: ConsumerChannel, is_stopping: Callable[[], bool]) -> None:
        """Fail the channel when messages wait in the queue, nothing is in hand, and none comes.

        Not again before something has come: another consumer may be the only one that the queue delivers to.
        """

        def is_idle() -> bool:
            return not (channel.in_hand or channel.receiving or is_stopping())

        waited_at = -1
        while True:
            await asyncio.sleep(SILENCE_POLL_INTERVAL)
            if self._has_ended_one and not channel.arrived:
                continue
            try:
                waits = is_idle() and (await Declarations(channel.connection).count(channel.queue))[0] > 0
            except MissingQueue:  # the broker does not tell each consumer that waits for its turn
                channel.fail("its queue was deleted")
                return
            except QueueError:
                return
            if waits and is_idle() and waited_at == channel.arrived:
                self._has_ended_one = True
                channel.fail("messages wait in the queue, and it delivers none")
                return
            waited_at = channel.arrived if waits else -1
