"""ConsumerClient: a consumer of the client library, and what the driver needs of its private parts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka

from streamtools.drivers.kafka.client.batches import Buffers, FetchedBytes
from streamtools.drivers.kafka.client.connect import DROP_TIMEOUT
from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.client.monitor import ConnectionMonitor
from streamtools.drivers.kafka.errors import CLIENT_ERRORS
from streamtools.settings import KafkaSettings

#: Seconds after which the library fetches quiet partitions although a buffer is full.
LIBRARY_PATIENCE: Final = 2.0


class ConsumerClient:
    """One consumer of the library, from before its start to its end.

    Parameters:
        consumer: the library's, not started.
        settings: of its Kafka.
        who: whose it is, for the log; without it, a lost connection is not logged.
    """

    def __init__(self, consumer: Any, settings: KafkaSettings, who: str | None = None) -> None:
        self.consumer: Any = consumer
        self._bytes = FetchedBytes(consumer._client)
        self._monitor: ConnectionMonitor | None = None
        if who is None:
            harden(consumer._client)
        else:
            self._monitor = ConnectionMonitor(consumer._client, who, settings)

    @property
    def client(self) -> Any:
        """The library's connections."""
        return self.consumer._client

    @property
    def cluster(self) -> Any:
        """What the library knows of the brokers and topics."""
        return self.consumer._client.cluster

    @property
    def is_connected(self) -> bool:
        """A broker is connected, as far as is known."""
        return self._monitor is not None and self._monitor.up

    def hand_over(self, buffers: type[Buffers]) -> None:
        """Have `getmany()` give out what these buffers make of a fetch. To be called once, after the start."""
        fetcher = self.consumer._fetcher
        fetcher._records = buffers(fetcher._records, self._bytes)

    def read_busy_partitions_first(self) -> None:
        """Have the library wait longer for a full buffer to be emptied before it fetches quiet partitions."""
        self.consumer._fetcher._prefetch_backoff = LIBRARY_PATIENCE

    async def get_many(self, *partitions: TopicPartition, **limits: Any) -> dict[TopicPartition, Any]:
        """What was fetched, as the library's `getmany`.

        Raises:
            KafkaError: a task of the library has ended without which nothing comes; `getmany` would wait for ever.
        """
        consumer = self.consumer
        found: dict[TopicPartition, Any] = await consumer.getmany(*partitions, **limits)
        for task in () if found else (consumer._fetcher._fetch_task, consumer._client._sync_task):
            if task.done() and not consumer._closed:
                error = None if task.cancelled() else task.exception()
                raise kafka.KafkaConnectionError(f"the client library has stopped reading: {error!r}") from error
        return found

    def position(self, partition: TopicPartition) -> int:
        """The next offset that the library hands over; 0 while it does not know."""
        subscription = self.consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None or partition not in assignment.tps:
            return 0
        state = assignment.state_value(partition)
        return int(state.position) if state.has_valid_position else 0

    def look_for_topics(self) -> None:
        """Look now whether topics exist that did not; by itself the library does so twice a minute."""
        self.consumer._client.force_metadata_update()

    def close_unread(self) -> None:
        """Close the connections whose answers nobody reads any more, so that the library makes others.

        When an event loop ends, asyncio cancels every task, those of the library among them. The library would wait
        for answers over these connections for as long as for a broker that is away.
        """
        for conn in [*self.consumer._client._conns.values()]:
            if conn._read_task is not None and conn._read_task.done():
                conn.close()

    async def drop(self) -> None:
        """End what is left of the consumer when its `stop()` has not finished, or was not called."""
        consumer = self.consumer
        consumer._closed = True
        coordinator, fetcher = consumer._coordinator, consumer._fetcher
        names = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task")
        tasks = {getattr(coordinator, name, None) for name in names} | {getattr(fetcher, "_fetch_task", None)}
        tasks |= getattr(fetcher, "_pending_tasks", set())
        left = {task for task in tasks if task is not None and not task.done()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=DROP_TIMEOUT)
        with suppress(*CLIENT_ERRORS):
            async with asyncio.timeout(DROP_TIMEOUT):
                await consumer._client.close()
        for task in tasks:
            if task is not None and task.done() and not task.cancelled():
                task.exception()  # looked at: it is reported where it matters
