"""What the driver needs of the private parts of the library's producers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import Any

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.structs import PartitionMetadata

from streamtools.drivers.kafka.client.connect import CLOSE_TIMEOUT
from streamtools.drivers.kafka.errors import CLIENT_ERRORS


async def abandoned(producer: Any) -> None:
    """End a producer at once, with what it has not sent; its own `stop()` waits for the brokers."""
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    with suppress(*CLIENT_ERRORS):  # a TimeoutError is an OSError
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await producer.client.close()
    # Each batch fails, so that nobody waits for it; and it warns of no error that nobody has looked at.
    accumulator = producer._message_accumulator
    for batch in (*accumulator._pending_batches, *chain.from_iterable(accumulator._batches.values())):
        for future in (batch.future, batch._drain_waiter):
            future.add_done_callback(_look_at)
    producer._message_accumulator.fail_all(kafka.ProducerClosed())
    producer._closed = True
    if sender is not None:
        await asyncio.wait({sender}, timeout=CLOSE_TIMEOUT)


def learn(cluster: Any, topic: str, partitions: Iterable[Any]) -> None:
    """Tell the library who leads the partitions of a topic, from a broker's answer.

    By itself it asks for all of its topics, once for each new one, and senders to new topics wait for each other.
    """
    known = cluster._partitions[topic] = {}
    for error, number, leader, replicas, in_sync, *_ in partitions:
        known[number] = PartitionMetadata(topic, number, leader, replicas, in_sync, error)
        if leader >= 0:
            cluster._broker_partitions[leader].add(TopicPartition(topic, number))


def fail_batches(producer: Any, topic: str, partition: int, error: Exception) -> None:
    """Fail the batches that a producer has not sent to a partition; those on their way are not among them."""
    accumulator = producer._message_accumulator
    for batch in accumulator._batches.pop(TopicPartition(topic, partition), ()):
        if batch.retry_count:  # a repeated batch is not among the pending ones, and its end removes it from them
            accumulator._pending_batches.add(batch)
        batch._drain_waiter.add_done_callback(_look_at)
        batch.failure(error)


def next_number(producer: Any, topic: str, partition: int) -> int:
    """The sequence number of the next message to a partition, by which Kafka notices a repeated one."""
    return int(producer._txn_manager.sequence_number(TopicPartition(topic, partition)))


def rewind(producer: Any, topic: str, partition: int, number: int) -> None:
    """Go back to this sequence number after a refusal: it is the next one that Kafka takes.

    The library counts on (seen in 0.14), and Kafka would take nothing more from this producer (aiokafka #1017).
    """
    producer._txn_manager._sequence_numbers[TopicPartition(topic, partition)] = number


def abort_what_was_added(producer: Any) -> None:
    """Have a transactional producer abort all that it has added to a transaction that fails.

    When one topic may not be written to, the library (0.14) forgets the other partitions: it would abort nothing, and
    what was sent to them would be committed by the next transaction. It would also send batches for partitions that
    are not added yet, outside the transaction.
    """
    manager = producer._txn_manager
    forget, end = manager.error_transaction, manager.fatal_error

    def error_transaction(error: Exception) -> None:
        added, group, missing = (
            {*manager._txn_partitions},
            manager._txn_consumer_group,
            {*manager.partitions_to_add()},
        )
        forget(error)
        _look_at(manager.wait_for_transaction_end())
        manager._txn_partitions |= added
        manager.consumer_group_added(group)
        refused = error.args[0] if isinstance(error, kafka.TopicAuthorizationFailedError) else ()
        for topic, partition in missing:
            fail_batches(producer, topic, partition, error if topic in refused else kafka.OperationNotAttempted())

    def fatal_error(error: Exception) -> None:
        end(error)
        _look_at(manager.wait_for_transaction_end())  # nobody may wait for it

    manager.error_transaction = error_transaction
    manager.fatal_error = fatal_error


def _look_at(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def is_transactional(producer: Any) -> bool:
    """What it sends belongs to a transaction."""
    return producer._txn_manager.transactional_id is not None


def is_in_transaction(producer: Any) -> bool:
    """A transaction was begun, has not failed, and is not being ended."""
    return bool(producer._txn_manager.is_in_transaction())


def take_identity(producer: Any, identity: tuple[int, int]) -> None:
    """Give a transactional producer its producer id and epoch, before it starts.

    It does not ask for them then. Another owner may have taken the transactional id over since these were given, and
    must not be fenced off.
    """
    producer._txn_manager.set_pid_and_epoch(*identity)


def use_topics(producer: Any, topics: Iterable[str]) -> None:
    """Tell a producer which topics it will send to: it looks for the leaders of these alone."""
    producer.client._topics.update(topics)


def leader_and_replicas(producer: Any, topic: str, partition: int) -> tuple[int, int, int] | None:
    """The node that leads a partition (-1 for none), its replicas, and how many are in sync; None if unknown."""
    seen = producer.client.cluster._partitions.get(topic, {}).get(partition)
    return None if seen is None else (seen.leader, len(seen.replicas), len(seen.isr))


def is_closed(client: Any) -> bool:
    """A client was closed: it gets no metadata any more."""
    return client._sync_task is None
