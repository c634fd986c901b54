"""Publisher: the one producing client of an event loop and Kafka, with a PartitionSender for each partition."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaProducer

from streamtools.drivers.kafka.brokers.topics import Topic, Topics
from streamtools.drivers.kafka.client.connect import CLOSED, connection, started, stopped
from streamtools.drivers.kafka.client.monitor import ConnectionMonitor
from streamtools.drivers.kafka.client.producers import abandoned, leader_and_replicas
from streamtools.drivers.kafka.producing.partition_sender import PartitionSender
from streamtools.drivers.kafka.producing.partitions import PartitionChooser
from streamtools.drivers.kafka.producing.record import Records
from streamtools.drivers.kafka.producing.unconfirmed import ByteLimit, UnconfirmedBatch
from streamtools.drivers.kafka.records import COPY_ROOM
from streamtools.errors import Closed, ConnectError
from streamtools.settings import KafkaSettings


class Publisher:
    """Sends records over one idempotent producer, which is replaced by a new one after a failure.

    All who send to one Kafka share it, each by a `Sender`.

    Parameters:
        settings: of the Kafka.
        client_id: shown by the broker.
    """

    def __init__(self, settings: KafkaSettings, client_id: str) -> None:
        self.settings: KafkaSettings = settings
        self.partitions: PartitionChooser = PartitionChooser(settings)
        self._client_id = client_id
        self._producer: Any = None
        self._monitor: ConnectionMonitor | None = None
        self._senders: dict[tuple[str, int], PartitionSender] = {}
        self._renewing = asyncio.Lock()
        self._making = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._failed = False  # to connect anew
        self._closed = False

    async def open(self) -> None:
        """Connect, unless that was done and the last attempt to connect anew did not fail.

        Raises:
            ConnectError: no broker lets us in.
        """
        async with self._renewing:
            if self._producer is None or self._failed:
                failed, self._producer = self._producer, await self._new_producer()
                if failed is not None:
                    self._retire_later(failed)

    async def submit(self, batch: Sequence[Records], limit: ByteLimit, max_size: int) -> UnconfirmedBatch:
        """Take records over, in order, once they are within the limit; returns before they are confirmed.

        Parameters:
            limit: of unconfirmed bytes, whoever sends them.
            max_size: bytes of one message at most.
        """
        producer = await self.producer()
        if producer is None:
            raise Closed(CLOSED)
        batch, missing = await self.partitions.know(batch, producer)
        size = number = 0
        for item in batch:
            size += item.size
            number += item.number
        if limit.is_exceeded_by(size):
            await limit.wait_for(size)
        if self._closed:
            raise Closed(CLOSED)
        pending = UnconfirmedBatch(number, limit)
        limit.take(self.partitions.distribute(batch, pending, self._sender, missing=missing, max_size=max_size))
        if not batch:
            pending.done()  # an event may reach nobody
        return pending

    def redistribute(self, batch: Sequence[Records]) -> None:
        """Hand these over once more, as their topic has fewer partitions now."""
        for item in batch:
            trouble = self.partitions.trouble(item, item.size)
            if trouble is None:
                self._sender(item.topic, self.partitions.choose(item)).waiting.append(item)
            else:
                for single in item.singles():
                    single.fail(trouble)

    def _sender(self, topic: str, partition: int) -> PartitionSender:
        sender = self._senders.get((topic, partition))
        if sender is None:
            sender = self._senders[topic, partition] = PartitionSender(self, topic, partition)
        if sender.task is None or sender.task.done():
            sender.wake()  # its task begins once all of this batch is there
        return sender

    async def close(self) -> None:
        """End; what is not confirmed fails."""
        self._closed = True
        ends = [sender.close() for sender in self._senders.values()]
        await asyncio.gather(*ends, self.partitions.close(), return_exceptions=True)
        producer, self._producer = self._producer, None
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if producer is not None:
            await abandoned(producer)

    # --- topics -----------------------------------------------------------------------------------

    @property
    def topics(self) -> Topics:
        """What looks for topics over the same connection."""
        return Topics(self._producer.client, self.settings)

    async def make(self, topic: Topic) -> bool:
        """Make a topic that was deleted while it was in use; False if it is there again."""
        async with self._making:  # many find out at once
            while True:
                producer = await self.producer()
                topics = Topics(producer.client, self.settings)
                try:
                    if topic.name in await topics.look([topic.name]):
                        return False
                    await topics.declare([topic], True)
                except ConnectError:
                    if producer is self._producer:
                        raise
                else:
                    return True

    def what_it_waits_for(self) -> str:
        """A sentence on why something is not confirmed, as far as is known."""
        if self._monitor is None or not self._monitor.up:
            return f"no broker answers at {self.settings.safe_url}."
        for (topic, number), sender in self._senders.items():
            seen = leader_and_replicas(self._producer, topic, number)
            if not sender.is_sending or seen is None:
                continue
            leader, replicas, in_sync = seen
            if leader < 0:
                return f"partition {number} of {topic!r} has no leader."
            if in_sync < replicas:
                return (
                    f"of the {replicas} replicas of partition {number} of {topic!r} {in_sync} are in sync, and the "
                    "topic may need more (min.insync.replicas)."
                )
        return "no confirmation came, though a broker is connected."

    # --- producers --------------------------------------------------------------------------------

    async def producer(self) -> Any:
        """The producer to use now; None after the end."""
        if self._renewing.locked():
            async with self._renewing:
                pass
        return self._producer

    async def renew(self, failed: Any) -> None:
        """Use a new producer instead of `failed`, which ends once its last batches have."""
        async with self._renewing:
            if self._producer is not failed or self._closed:
                return
            self._producer = await self._new_producer()
            self._retire_later(failed)

    def _retire_later(self, producer: Any) -> None:
        task = asyncio.create_task(self._retire(producer))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, producer: Any) -> None:
        try:
            await stopped(producer, timeout=2 * self.settings.request_timeout)
        finally:
            await abandoned(producer)

    async def _new_producer(self) -> Any:
        producer = AIOKafkaProducer(
            **await connection(self.settings, self._client_id),
            enable_idempotence=True,
            max_request_size=self.settings.max_message + COPY_ROOM,
        )
        self._monitor = ConnectionMonitor(producer.client, f"Producer {self._client_id}", self.settings)
        self._failed = True
        await started(producer, self.settings, closed=lambda: self._closed)
        self._failed = False
        return producer
