"""RabbitMQ 4 closes the connection when we ask what a queue is like.

It should answer which argument differs, but fails if its text is longer than 255 bytes and has other characters than
ASCII.
"""

from __future__ import annotations

from typing import Final

from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import Queue
from streamtools.errors import ConnectionLost
from streamtools.validation.checks import Declare

#: After this many questions about a queue that ended the connection, we do not ask again.
FAILED_LOOKS: Final = 2


class CarefulLook:
    """Asks what one queue is like; stops asking if that has ended the connection several times."""

    def __init__(self) -> None:
        self._failed = 0

    async def as_it_is(self, declarations: Declarations, wanted: Queue, declare: Declare) -> Queue | None:
        """Return the queue with its real arguments; None if we may not ask, or asking has ended the connection.

        Raises:
            ConnectionLost: the connection has ended, by the question or for another reason.
        """
        if self._failed >= FAILED_LOOKS:
            return None
        try:
            return await declarations.as_it_is(wanted, declare)
        except ConnectionLost:
            self._failed += 1
            raise
