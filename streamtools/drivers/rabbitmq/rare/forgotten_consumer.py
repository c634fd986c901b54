"""The broker has forgotten a consumer: messages wait in its queue, but none is delivered.

When a queue changes its leader, RabbitMQ can forget a consumer, or acknowledgements that would make room for further
messages (github.com/rabbitmq/rabbitmq-server/pull/13095).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from streamtools.drivers.rabbitmq.consuming.consumer_channel import ConsumerChannel
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import MissingQueue
from streamtools.errors import QueueError

#: Seconds between two questions about a queue that delivers nothing.
SILENCE_POLL_INTERVAL: Final = 30.0


class ForgottenConsumer:
    """Ends a channel that gets no deliveries, so that the consumer opens another one. It outlives the channels."""

    def __init__(self) -> None:
        #: Whether this has ended a channel, and no message has come since.
        self._has_ended_one = False

    async def watch(self, channel: ConsumerChannel, is_stopping: Callable[[], bool]) -> None:
        """End the channel if messages wait in the queue, none is in hand, and none comes.

        It does so only once until a message comes: the queue may deliver only to another consumer.
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
            except MissingQueue:  # the broker does not tell every waiting consumer that the queue was deleted
                channel.fail("its queue was deleted")
                return
            except QueueError:
                return
            if waits and is_idle() and waited_at == channel.arrived:
                self._has_ended_one = True
                channel.fail("messages wait in the queue, and it delivers none")
                return
            waited_at = channel.arrived if waits else -1
