"""A queue that cannot be looked at, because RabbitMQ 4 ends the connection that asks.

It should say which argument differs, and fails where its text is longer than 255 bytes and not ASCII alone.
"""

from __future__ import annotations

from typing import Final

from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import Queue
from streamtools.errors import ConnectionLost
from streamtools.validation.checks import Declare

#: Questions about a queue that may end their connection.
FAILED_LOOKS: Final = 2


class CarefulLook:
    """Looks at one queue, and not again after it has ended the connection several times."""

    def __init__(self) -> None:
        self._failed = 0

    async def as_it_is(self, declarations: Declarations, wanted: Queue, declare: Declare) -> Queue | None:
        """The queue with its real arguments; None without permission, or if it has ended the connection each time.

        Raises:
            ConnectionLost: it has ended the connection, or that has ended otherwise.
        """
        if self._failed >= FAILED_LOOKS:
            return None
        try:
            return await declarations.as_it_is(wanted, declare)
        except ConnectionLost:
            self._failed += 1
            raise
