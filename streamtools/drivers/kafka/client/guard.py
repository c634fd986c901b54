"""Hardens the library's clients: each answer is checked, and one that is no broker's ends its connection.

A proxy or another program between us and a broker may answer with the right length and number, and nonsense behind
them. The library (0.14) trusts whatever it can decode. A null where a list belongs then ends one of its tasks, often
without a word, and the client stands still. So each answer is checked in the one place where answers are read. If it
is not a broker's, its connection is closed, and the client recovers as from any lost connection.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from traceback import walk_tb
from typing import Any, Final

from aiokafka import errors as kafka
from aiokafka.conn import AIOKafkaConnection
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.structs import BrokerMetadata

from streamtools.drivers.kafka.client.answers import AnswerChecker
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, GARBAGE, NO_KAFKA, plain

#: A logger of its own, whose repeated lines are logged once.
log: logging.Logger = logging.getLogger("streamtools.kafka")

#: What the library raises when it cannot read an answer, or cannot use it.
UNREADABLE: Final[tuple[type[Exception], ...]] = (*GARBAGE, AssertionError)
#: Names for the addresses that a client was given; brokers have numbers.
FIRST: Final = "first-{}"


def harden(client: Any) -> None:
    """Have a client of the library check each answer, and make no topic by asking for it.

    By itself it asks in a way that has a broker make what is missing (`auto.create.topics.enable`): a topic that an
    operator deletes would be back at once, with the broker's number of partitions.
    """
    client.bootstrap = partial(_bootstrap, client, client.bootstrap)
    client._get_conn = partial(_get_conn, client, client._get_conn)
    client._metadata_update = partial(_metadata_update, client, client._metadata_update)
    client.coordinator_lookup = partial(_coordinator_lookup, client.coordinator_lookup)


async def _bootstrap(client: Any, begin: Callable[[], Awaitable[None]]) -> None:
    try:
        await begin()
        if not client.cluster.brokers():
            await client.force_metadata_update()  # over the connection that `begin` has kept
    except UNREADABLE as error:
        _warn("A broker", error)
        close_first(error)
        await begin()


async def _get_conn(client: Any, connect: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    try:
        found = await connect(*args, **kwargs)
    except UNREADABLE as error:  # the first answers of a connection, or an address that is none
        _warn("A broker", error)
        client.force_metadata_update()
        return None
    if found is not None and client._sync_task is None:  # the client was closed: nobody else closes this connection
        found.close()
        return None
    if found is not None and "send" not in vars(found):
        if MetadataRequest.API_KEY not in found._versions:  # every broker knows it; this one can be asked nothing
            _warn(f"{found.host}:{found.port}", ValueError("it has told of no versions"))
            found.close()
            client.force_metadata_update()
            return None
        found.send = partial(_ask_for_existing, found.send)
        found._handle_frame = partial(_read, found, found._handle_frame)
    return found


async def _metadata_update(client: Any, look: Callable[..., Awaitable[bool]], cluster: Any, topics: Any) -> bool:
    for update in (look, partial(_ask_first_addresses, client)):
        try:
            if await update(cluster, topics):
                return True
        except UNREADABLE as error:  # it would end the task that updates what all others use
            _warn("A broker", error)
    return False


async def _ask_first_addresses(client: Any, cluster: Any, topics: Any) -> bool:
    """Ask at the addresses that the client was given, when none of the brokers that it knows answers.

    The brokers may all have moved, or a spoiled answer has named others. The library (0.14) asks at these addresses
    only when it starts.
    """
    known = client.cluster
    first = [BrokerMetadata(FIRST.format(n), host, port, None) for n, (host, port, _) in enumerate(client.hosts)]
    known._bootstrap_brokers = {each.nodeId: each for each in first}  # where the library looks addresses up
    try:
        for each in first:
            if await _ask_at(client, each.nodeId, cluster, topics):
                return True
        return False
    finally:
        known._bootstrap_brokers = {}


async def _ask_at(client: Any, node: str, cluster: Any, topics: Any) -> bool:
    connection = await client._get_conn(node)
    if connection is None:
        return False
    try:
        answer = await connection.send(MetadataRequest(list(topics) if topics else None))
    except CLIENT_ERRORS as error:
        log.debug("%s:%s does not tell of its brokers: %s", connection.host, connection.port, plain(error))
        return False
    finally:
        connection.close()
    cluster.update_metadata(answer)
    return bool(answer.brokers)


async def _coordinator_lookup(find: Callable[..., Awaitable[int]], *args: Any, **kwargs: Any) -> int:
    try:
        return await find(*args, **kwargs)
    except (kafka.KafkaConnectionError, kafka.CorrelationIdError) as error:
        # Of lost connections in this place, the library's sender (0.14) survives this error alone.
        raise kafka.NodeNotReadyError(str(error)) from error


def close_first(error: BaseException | None) -> None:
    """Close the library's first connection, over which it was asking for the brokers when this error ended that.

    The connection is in a local variable there, and nowhere else: the library (0.14) closes it only after an answer,
    or after an error of its own.
    """
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            first = frame.f_locals.get("bootstrap_conn")
            if isinstance(first, AIOKafkaConnection):
                first.close()
        error = error.__cause__ or error.__context__


def _ask_for_existing(send: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if type(request) is MetadataRequest and request._allow_auto_topic_creation is None:
        request._allow_auto_topic_creation = False
    try:
        return send(request, *args, **kwargs)
    except NotImplementedError as error:  # the broker knows only other versions of this request
        raise kafka.IncompatibleBrokerVersion(str(error)) from error


def _read(connection: Any, handle: Callable[[bytes], None], frame: bytes) -> None:
    """Read and check an answer.

    Raises:
        ConnectionResetError: it is not a broker's. The library then closes the connection.
    """
    waiting = connection._requests
    request = waiting[0][1] if waiting else None
    if request is not None:
        request.RESPONSE_TYPE = AnswerChecker(request)
    try:
        handle(frame)
    except UNREADABLE as error:
        _warn(f"{connection.host}:{connection.port}", error)
        raise ConnectionResetError(f"an answer cannot be read: {plain(error)}") from error


def _warn(who: str, error: BaseException) -> None:
    log.warning("%s has sent what cannot be read (%s). It is asked again. %s", who, plain(error), NO_KAFKA)
