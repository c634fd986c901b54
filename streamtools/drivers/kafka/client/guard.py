"""The connections of the library's clients: each answer is read whole, or ends its connection.

What stands between us and a broker, a proxy or another program, may answer with the right length and number and
nonsense behind them. The library (0.14) trusts whatever it could read. A null where a list belongs then ends one of
its tasks, and often nobody is told: the client stands still. So each answer is looked at in the one place where
answers are read, for all who ask. One that is no broker's ends its connection, and that passes as every loss does.
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

#: Of its own, so that a line which is repeated is told once.
log: logging.Logger = logging.getLogger("streamtools.kafka")

#: What the library raises where it could not read what a broker has sent, or cannot use it.
UNREADABLE: Final[tuple[type[Exception], ...]] = (*GARBAGE, AssertionError)
#: Names of the addresses that a client was given; brokers have numbers.
FIRST: Final = "first-{}"


def harden(client: Any) -> None:
    """Have a client of the library look at each answer that it reads, and make no topic by asking for one.

    It asks so that a broker makes what is missing, if that is configured (`auto.create.topics.enable`): a topic that
    an operator deletes would be back at once, with the broker's number of partitions.
    """
    client.bootstrap = partial(_bootstrap, client, client.bootstrap)
    client._get_conn = partial(_get_conn, client, client._get_conn)
    client._metadata_update = partial(_metadata_update, client, client._metadata_update)
    client.coordinator_lookup = partial(_coordinator_lookup, client.coordinator_lookup)


async def _bootstrap(client: Any, begin: Callable[[], Awaitable[None]]) -> None:
    try:
        await begin()
        if not client.cluster.brokers():
            await client.force_metadata_update()  # it has kept the connection for this
    except UNREADABLE as error:  # over a connection that only the library has
        _tell("A broker", error)
        close_first(error)
        await begin()


async def _get_conn(client: Any, connect: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    try:
        found = await connect(*args, **kwargs)
    except UNREADABLE as error:  # the first answers, or an address that is none
        _tell("A broker", error)
        client.force_metadata_update()
        return None
    if found is not None and client._sync_task is None:  # closed meanwhile: nobody would close this connection
        found.close()
        return None
    if found is not None and "send" not in vars(found):
        if MetadataRequest.API_KEY not in found._versions:  # as every broker has; over this one nothing can be asked
            _tell(f"{found.host}:{found.port}", ValueError("it has told of no versions"))
            found.close()
            client.force_metadata_update()
            return None
        found.send = partial(_ask_for_what_is, found.send)
        found._handle_frame = partial(_read, found, found._handle_frame)
    return found


async def _metadata_update(client: Any, look: Callable[..., Awaitable[bool]], cluster: Any, topics: Any) -> bool:
    for way in (look, partial(_look_from_the_first, client)):
        try:
            if await way(cluster, topics):
                return True
        except UNREADABLE as error:  # it would end the task that does this for all others
            _tell("A broker", error)
    return False


async def _look_from_the_first(client: Any, cluster: Any, topics: Any) -> bool:
    """Ask at the addresses that the client was given, where none of the brokers that it knows answers.

    They may all have moved, or an answer that was spoiled on its way has named others. The library (0.14) asks at
    these addresses once, when it begins.
    """
    known = client.cluster
    first = [BrokerMetadata(FIRST.format(n), host, port, None) for n, (host, port, _) in enumerate(client.hosts)]
    known._bootstrap_brokers = {each.nodeId: each for each in first}  # where it looks up what it connects to
    try:
        for each in first:
            if await _look_at(client, each.nodeId, cluster, topics):
                return True
        return False
    finally:
        known._bootstrap_brokers = {}


async def _look_at(client: Any, node: str, cluster: Any, topics: Any) -> bool:
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
        # Of losses in this place the library's sender (0.14) takes this one alone for what passes.
        raise kafka.NodeNotReadyError(str(error)) from error


def close_first(error: BaseException | None) -> None:
    """Close the connection over which the library was asking for the brokers when this error ended that.

    It is in a local variable there, and nowhere else: the library (0.14) closes it only after an answer, or an error
    of its own.
    """
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            first = frame.f_locals.get("bootstrap_conn")
            if isinstance(first, AIOKafkaConnection):
                first.close()
        error = error.__cause__ or error.__context__


def _ask_for_what_is(send: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if type(request) is MetadataRequest and request._allow_auto_topic_creation is None:
        request._allow_auto_topic_creation = False
    try:
        return send(request, *args, **kwargs)
    except NotImplementedError as error:  # the broker has told of other versions of this question
        raise kafka.IncompatibleBrokerVersion(str(error)) from error


def _read(connection: Any, handle: Callable[[bytes], None], frame: bytes) -> None:
    """Read what a connection has brought.

    Raises:
        ConnectionResetError: it is no broker's answer. The library then closes the connection.
    """
    waiting = connection._requests
    request = waiting[0][1] if waiting else None
    if request is not None:
        request.RESPONSE_TYPE = AnswerChecker(request)
    try:
        handle(frame)
    except UNREADABLE as error:
        _tell(f"{connection.host}:{connection.port}", error)
        raise ConnectionResetError(f"an answer cannot be read: {plain(error)}") from error


def _tell(who: str, error: BaseException) -> None:
    log.warning("%s has sent what cannot be read (%s). It is asked again. %s", who, plain(error), NO_KAFKA)
