"""How every client of Kafka is made: addresses, security, limits; and why one could not connect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any, Final, Protocol

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.conn import create_conn
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.structs import PartitionMetadata

from streamtools.drivers.kafka.client.guard import close_first
from streamtools.drivers.kafka.client.monitor import quieten
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, GARBAGE, client_error, connect_error
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.engine.tls import client_context, warn_unverified
from streamtools.errors import ConnectError
from streamtools.settings import KafkaSettings

#: Milliseconds between two attempts of the library at one request.
BACKOFF: Final = 100
#: Seconds between two looks for new topics, partitions and brokers.
METADATA_AGE: Final = 30.0
#: Seconds for a goodbye to the brokers.
CLOSE_TIMEOUT: Final = 5.0
#: Seconds for what is ended without a goodbye, and for a goodbye to brokers that may be away.
DROP_TIMEOUT: Final = 1.0


class Client(Protocol):
    """A producer or consumer of the client library."""

    async def start(self) -> Any: ...
    async def stop(self) -> Any: ...


async def connection(
    settings: KafkaSettings, client_id: str, *, request_timeout: float | None = None
) -> dict[str, Any]:
    """The arguments that every client of the library takes.

    Parameters:
        client_id: as the broker shows and logs it.
        request_timeout: seconds; that of the settings when None.

    Raises:
        ConfigurationError: a file of certificates cannot be used.
    """
    quieten()
    seconds = settings.request_timeout if request_timeout is None else request_timeout
    arguments: dict[str, Any] = {
        "bootstrap_servers": [f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in settings.addresses],
        "client_id": client_id,
        "request_timeout_ms": int(1000 * seconds),
        "retry_backoff_ms": BACKOFF,
        "metadata_max_age_ms": int(1000 * METADATA_AGE),
    }
    return arguments | await security(settings)


async def security(settings: KafkaSettings) -> dict[str, Any]:
    """The arguments for TLS and SASL."""
    protocol = "SSL" if settings.tls else "PLAINTEXT"
    arguments: dict[str, Any] = {"security_protocol": protocol}
    if settings.tls:
        warn_unverified(settings, *settings.addresses)
        arguments["ssl_context"] = await client_context(settings)
    if settings.username is not None:
        arguments |= {
            "security_protocol": "SASL_SSL" if settings.tls else "SASL_PLAINTEXT",
            "sasl_mechanism": settings.sasl,
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password.get_secret_value(),
        }
    return arguments


async def started(
    client: Client,
    settings: KafkaSettings,
    *,
    timeout: float | None = None,
    stop: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Start a client of the library; nothing is left open when it fails.

    Parameters:
        timeout: seconds; those for one connection attempt to each host when None.
        stop: ends the client when it could not start; `stopped` when None.

    Raises:
        ConnectError: with the reason, which the library itself only logs.
    """
    limit = timeout or settings.connect_timeout * (len(settings.addresses) + 1)
    stop = stop or partial(stopped, client)
    try:
        async with asyncio.timeout(limit):
            await client.start()
    except BaseException as error:
        close_first(error)
        await stop()
        if isinstance(error, kafka.KafkaConnectionError | TimeoutError):
            raise await diagnose(settings, error) from error
        if isinstance(error, (*CLIENT_ERRORS, *GARBAGE)):  # no function of a user's is at work here
            raise client_error(error, settings) from error
        raise


async def stopped(client: Client, *, timeout: float = CLOSE_TIMEOUT) -> None:
    """Stop a client of the library, whatever state it is in, within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            await client.stop()
    except CLIENT_ERRORS:  # a TimeoutError is an OSError
        pass
    except asyncio.CancelledError:
        # The library cancels a fetch that waits after an error, and lets that through (seen in 0.14).
        if asked_to_stop():
            raise


async def abandoned(producer: Any) -> None:
    """End a producer of the library at once, with whatever it has not sent; its `stop()` waits for the brokers."""
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    with suppress(*CLIENT_ERRORS):  # a TimeoutError is an OSError
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await producer.client.close()
    # Whoever waits for a batch, the library's own flush among them, is told; and where nobody does, nobody warns.
    accumulator = producer._message_accumulator
    for batch in (*accumulator._pending_batches, *chain.from_iterable(accumulator._batches.values())):
        for future in (batch.future, batch._drain_waiter):
            future.add_done_callback(_look_at)
    producer._message_accumulator.fail_all(kafka.ProducerClosed())
    producer._closed = True
    if sender is not None:
        await asyncio.wait({sender}, timeout=CLOSE_TIMEOUT)


async def get_many(consumer: Any, *partitions: TopicPartition, **limits: Any) -> dict[TopicPartition, Any]:
    """What a consumer of the library has fetched, as its `getmany`.

    Raises:
        KafkaError: a task of the library has ended without which nothing comes; `getmany` would wait for ever.
    """
    found: dict[TopicPartition, Any] = await consumer.getmany(*partitions, **limits)
    for task in () if found else (consumer._fetcher._fetch_task, consumer._client._sync_task):
        if task.done() and not consumer._closed:
            error = None if task.cancelled() else task.exception()
            raise kafka.KafkaConnectionError(f"the client library has stopped reading: {error!r}") from error
    return found


def learn(cluster: Any, topic: str, partitions: Iterable[Any]) -> None:
    """Tell a client of the library who leads the partitions of a topic, as a broker has answered.

    By itself it asks for all of its topics, for each that is new, and those who wait for theirs stand in a line.
    """
    known = cluster._partitions[topic] = {}
    for error, number, leader, replicas, in_sync, *_ in partitions:
        known[number] = PartitionMetadata(topic, number, leader, replicas, in_sync, error)
        if leader >= 0:
            cluster._broker_partitions[leader].add(TopicPartition(topic, number))


def fail_batches(producer: Any, topic: str, partition: int, error: Exception) -> None:
    """End what a producer of the library has not sent to a partition; what is on its way is not there."""
    accumulator = producer._message_accumulator
    for batch in accumulator._batches.pop(TopicPartition(topic, partition), ()):
        if batch.retry_count:  # then its end takes it out of these, though it waits to be sent again
            accumulator._pending_batches.add(batch)
        batch._drain_waiter.add_done_callback(_look_at)
        batch.failure(error)


def abort_what_was_added(producer: Any) -> None:
    """Have a transactional producer of the library abort what it has added to a transaction that fails.

    Where one topic may not be written to, the library (0.14) forgets the other partitions: it would abort nothing,
    and what was sent to them would be committed with the next transaction. Batches for partitions that are not added
    yet it would send all the same, outside the transaction.
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


def next_number(producer: Any, topic: str, partition: int) -> int:
    """The number of the next message of a partition, by which Kafka knows one that comes twice."""
    return int(producer._txn_manager.sequence_number(TopicPartition(topic, partition)))


def rewind(producer: Any, topic: str, partition: int, number: int) -> None:
    """Go back to this number: what was sent since was refused, and Kafka still waits for it.

    The library counts on (seen in 0.14), and Kafka would take nothing more of this producer (aiokafka #1017).
    """
    producer._txn_manager._sequence_numbers[TopicPartition(topic, partition)] = number


def drop_unread(client: Any) -> None:
    """Close the connections of a client whose answers nobody reads any more, so that it makes others.

    When an event loop ends, asyncio cancels every task, those of the library among them. It would wait for answers
    over these connections for as long as for a broker that is away.
    """
    for conn in [*client._client._conns.values()]:
        if conn._read_task is not None and conn._read_task.done():
            conn.close()


async def dropped(consumer: Any) -> None:
    """End what is left of a consumer of the library whose `stop()` did not come to its end, or was not called."""
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


async def diagnose(settings: KafkaSettings, error: BaseException) -> ConnectError:
    """Why no host let us in, found out by a connection of our own to each."""
    arguments = await connection(settings, "streamtools", request_timeout=settings.connect_timeout)
    del arguments["bootstrap_servers"], arguments["retry_backoff_ms"], arguments["metadata_max_age_ms"]
    found = await asyncio.gather(*(_try(settings, host, port, arguments) for host, port in settings.addresses))
    reasons = [reason for reason in found if reason is not None]
    if not reasons:
        return ConnectError(
            f"{settings.safe_url} could not be used within the time limit: {error!s}".rstrip(": ") + "."
        )
    permanent = all(reason.permanent for reason in reasons)
    return ConnectError(" ".join(dict.fromkeys(str(reason) for reason in reasons)), permanent=permanent)


async def _try(settings: KafkaSettings, host: str, port: int, arguments: dict[str, Any]) -> ConnectError | None:
    try:
        async with asyncio.timeout(settings.connect_timeout):
            found = await create_conn(host, port, **arguments)
            try:
                await found.send(MetadataRequest([]))  # who wants a user closes the connection only now
            finally:
                found.close()
    except (*CLIENT_ERRORS, *GARBAGE) as error:  # a TimeoutError is an OSError
        return connect_error(error, settings, f"{host}:{port}")
    return None
