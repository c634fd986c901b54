"""Sender: sends records for one producer or consumer, over the Publisher that all on one event loop share.

Each Sender has a limit of its own for what is not confirmed: one that sends faster than Kafka takes it makes nobody
else wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streamtools.drivers.kafka.brokers.topics import Topic, Topics
from streamtools.drivers.kafka.client.connect import CLOSED
from streamtools.drivers.kafka.producing.publisher import Publisher
from streamtools.drivers.kafka.producing.record import Records, refused
from streamtools.drivers.kafka.producing.unconfirmed import ByteLimit, UnconfirmedBatch
from streamtools.engine.tasks.sharing import Lease, Sharing
from streamtools.errors import Closed
from streamtools.settings import KafkaSettings

#: Shown by brokers when nobody has given a client id.
CLIENT_ID: Final = "streamtools"
_PUBLISHERS: Final = Sharing(Publisher.close)


class Sender:
    """Sends records for one producer or consumer.

    Parameters:
        settings: of the Kafka; senders with equal settings share a Publisher.
        client_id: shown by the broker; senders with another one have a Publisher of their own.
        room: bytes that a message may have beyond `max_message`.
    """

    def __init__(self, settings: KafkaSettings, client_id: str | None, *, room: int = 0) -> None:
        self._settings = settings
        self._client_id = client_id or CLIENT_ID
        self._max_size = settings.max_message + room
        self._limit = ByteLimit()
        self._pending: set[UnconfirmedBatch] = set()
        self._lease: Lease[Publisher] | None = None
        self._closed = False

    async def open(self) -> Topics:
        """Connect, if nobody has; returns what looks for topics over the same connection.

        Raises:
            ConnectError: no broker lets us in.
            Closed: `close()` was called meanwhile.
        """
        lease = await _PUBLISHERS.acquire((self._settings, self._client_id), self._new_publisher)
        try:
            await lease.value.open()  # the last attempt to connect anew may have failed
            if self._closed:
                raise Closed(CLOSED)
        except BaseException:
            await lease.release()
            raise
        self._lease = lease
        return lease.value.topics

    async def publish(self, batch: Sequence[Records]) -> None:
        """Return when all are confirmed.

        Raises:
            SendError: naming those that Kafka refuses; the others of the batch are confirmed.
            ConnectError: the connection ended, and no new one can be made.
        """
        if self._lease is None:
            raise Closed(CLOSED)
        pending = await self._lease.value.submit(batch, self._limit, self._max_size)
        self._pending.add(pending)
        try:
            if self._lease is None:
                raise Closed(CLOSED)
            await pending.future
        finally:
            pending.given_up = True
            self._pending.discard(pending)
        if pending.failed:
            raise refused(pending.failed, self._settings, batch)

    def what_it_waits_for(self) -> str:
        """A sentence on why something is not confirmed, as far as is known."""
        return self._lease.value.what_it_waits_for() if self._lease is not None else "it is not connected."

    def partitions(self, topic: str) -> int | None:
        """How many partitions a topic has, or had when it was last seen; None if it never was."""
        return self._lease.value.partitions.count(topic) if self._lease is not None else None

    async def make(self, topic: Topic) -> bool:
        """Make a topic that was deleted while it was in use; False if it is there again."""
        if self._lease is None:
            raise Closed(CLOSED)
        return await self._lease.value.make(topic)

    async def close(self) -> None:
        """End; what is not confirmed fails. Safe to repeat."""
        self._closed = True
        lease, self._lease = self._lease, None
        for pending in self._pending:
            pending.given_up = True
            pending.fail(Closed("The producer was closed before this was confirmed."))
        self._pending.clear()
        self._limit.clear()
        if lease is not None:
            await lease.release()

    async def _new_publisher(self) -> Publisher:
        publisher = Publisher(self._settings, self._client_id)
        try:
            await publisher.open()
        except BaseException:
            await publisher.close()
            raise
        return publisher
