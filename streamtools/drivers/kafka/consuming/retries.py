"""RetryPublisher: sends retries, rejected messages and what handlers have sent, without transactions.

When a retry comes stands in delays.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from streamtools.delivery import Settlement, publish_first
from streamtools.drivers.kafka.consuming.copies import Copies
from streamtools.drivers.kafka.consuming.delays import DelayedRecord
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.drivers.kafka.producing.record import not_held
from streamtools.drivers.kafka.producing.sender import Sender
from streamtools.drivers.kafka.records import COPY_ROOM
from streamtools.errors import Closed, SendError
from streamtools.message import Message
from streamtools.settings import KafkaSettings

#: Makes the settlement of a message whose handler has sent what Kafka refuses.
Reject = Callable[[Settlement, SendError], Settlement]


class RetryPublisher:
    """Sends for one membership.

    Parameters:
        sender_id: the client id by which it shares the producing client.
    """

    def __init__(self, settings: KafkaSettings, copies: Copies, *, sender_id: str | None = None) -> None:
        self._settings = settings
        self._copies = copies
        self._sender_id = sender_id
        self._sender: Sender | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def settle(self, settlements: Sequence[Settlement], done: list[Settlement], _reject: Reject) -> None:
        """Send the messages of these settlements; append to `done` those of which Kafka holds all.

        Raises:
            SendError: some messages were refused.
            ConnectError: the connection ended; nothing is known.
        """
        held, refused = await publish_first(self._publish, settlements)
        done += held
        if refused is not None:
            raise refused

    async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
        copies = [self._copies.one(*each) for each in zip(settlements, messages, strict=True)]
        try:
            await (await self._get_sender()).publish(copies)
        except SendError as error:
            error.messages = not_held(messages, copies)
            raise

    async def forward(self, batch: Sequence[DelayedRecord]) -> None:
        """Send copies of what is not due to the retry topic, and finish the records.

        Raises:
            SendError: some copies were refused.
            ConnectError: the connection ended; nothing is known.
        """
        await (await self._get_sender()).publish([self._copies.delayed(each) for each in batch])
        for delayed in batch:
            delayed.partition.offsets.finish(delayed.record.offset)

    async def _get_sender(self) -> Sender:
        async with self._opening:
            if self._closed:
                raise Closed("The consumer was closed.")
            if self._sender is None:
                sender = Sender(self._settings, self._sender_id, room=COPY_ROOM)
                await sender.open()
                if self._closed:  # meanwhile
                    await sender.close()
                    raise Closed("The consumer was closed.")
                self._sender = sender
            return self._sender

    async def pass_over(self, partitions: Collection[AssignedPartition]) -> None:
        """Nothing to do: the member commits positions itself."""

    async def release(self, partitions: Collection[AssignedPartition]) -> None:
        """Nothing to do: no partition has a producer of its own."""

    async def close(self) -> None:
        """Let go of the producing client."""
        self._closed = True
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.close()
