"""The one place where errors of the client library become ours. Each keeps its cause."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from aiokafka import errors as kafka

from streamtools.errors import ConnectError, ConnectionLost, QueueError, SendError, StreamToolsError
from streamtools.settings import KafkaSettings


class _InvalidRecordError(kafka.BrokerResponseError):  # type: ignore[misc]  # the library has no types
    """What the broker takes no record of: on a compacted topic, of one without a key (KIP-467).

    The library (0.14) does not know this code, and takes it for a failure that passes.
    """

    errno = 87
    message = "INVALID_RECORD"


kafka.kafka_errors.setdefault(_InvalidRecordError.errno, _InvalidRecordError)

#: What the client library raises: its own errors, the socket's, and assertions about its own state.
CLIENT_ERRORS: Final[tuple[type[Exception], ...]] = (
    kafka.KafkaError,
    kafka.ConsumerStoppedError,
    OSError,
    AssertionError,
    asyncio.InvalidStateError,
)
#: Those, and what we have made of them.
TROUBLE: Final[tuple[type[Exception], ...]] = (*CLIENT_ERRORS, StreamToolsError)
#: The broker takes no part of such a batch for the sake of some record in it: the others are taken without that one.
RECORD_REFUSALS: Final[tuple[type[Exception], ...]] = (
    kafka.MessageSizeTooLargeError,
    kafka.RecordListTooLargeError,
    kafka.InvalidTimestampError,
    kafka.UnsupportedForMessageFormatError,
    kafka.CorruptRecordException,
    _InvalidRecordError,
)
#: The broker takes no part of such a batch, whoever sends it again.
REFUSALS: Final[tuple[type[Exception], ...]] = (
    *RECORD_REFUSALS,
    kafka.InvalidTopicError,
    kafka.TopicAuthorizationFailedError,
    kafka.ClusterAuthorizationFailedError,
    kafka.TransactionalIdAuthorizationFailed,
    kafka.PolicyViolationError,
    kafka.InvalidRequiredAcksError,
)
#: A transaction was ended before its commit: its time was over, or another has taken its id over.
_UNDONE: Final[tuple[type[Exception], ...]] = (
    kafka.ProducerFenced,
    kafka.InvalidProducerEpoch,
    kafka.InvalidTxnState,
    kafka.InvalidProducerIdMapping,
)
_TOO_LARGE: Final[tuple[type[Exception], ...]] = (kafka.MessageSizeTooLargeError, kafka.RecordListTooLargeError)


class Missing(QueueError):
    """There is no such topic, or not any more."""


class Unfit(SendError):
    """A record that is not even handed to Kafka: too large, or nothing that can be written."""


def wants_key(error: BaseException) -> bool:
    """The topic does not take a record, most likely one without a key."""
    return isinstance(error, _InvalidRecordError)


def connect_error(error: BaseException, settings: KafkaSettings, where: str) -> ConnectError:
    """Why one attempt to connect failed; permanent where trying again cannot help.

    Parameters:
        where: the host and port.
    """
    if isinstance(error, TimeoutError):
        return ConnectError(f"Kafka at {where} did not answer within {settings.connect_timeout:g} s.")
    if isinstance(error, kafka.SaslAuthenticationFailed | kafka.AuthenticationFailedError):
        return ConnectError(
            f"Kafka at {where} refuses the user {settings.username!r} with the password given ({settings.sasl}). "
            "Check KAFKA_USER and KAFKA_PASS, or the URL, and sasl=.",
            permanent=True,
        )
    if isinstance(error, kafka.UnsupportedSaslMechanismError | kafka.IllegalSaslStateError):
        return ConnectError(
            f"Kafka at {where} does not take {settings.sasl}: {plain(error)} Name another with ?sasl=.",
            permanent=True,
        )
    if isinstance(error, ssl.SSLError):
        return _tls_error(error, where)
    if isinstance(error, socket.gaierror):
        return ConnectError(
            f"The host of Kafka at {where} has no address: {error.strerror}. Check KAFKA_HOST or the URL."
        )
    if isinstance(error, OSError) and not isinstance(error, ConnectionResetError):
        return ConnectError(f"Kafka at {where} cannot be reached: {plain(error)}. Check KAFKA_HOST or the URL.")
    hint = "it may not speak TLS there: write kafka://" if settings.tls else "if it wants TLS write kafkas://"
    return ConnectError(
        f"Kafka at {where} closed the connection: {plain(error).rstrip('.')}; {hint}, and if it wants a user "
        "kafka://user:password@host."
    )


def _tls_error(error: ssl.SSLError, where: str) -> ConnectError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectError(
            f"Kafka at {where} shows a certificate that cannot be verified: {error.verify_message}. "
            "Name the authority's file with cafile=, or the host as the certificate has it.",
            permanent=True,
        )
    return ConnectError(
        f"Kafka at {where} does not speak TLS as asked: {error.reason or error}. Check the port, and certfile= "
        "and keyfile= if it wants a client certificate.",
        permanent=error.reason == "WRONG_VERSION_NUMBER",
    )


def client_error(error: BaseException, settings: KafkaSettings) -> StreamToolsError:
    """What a failed request means where nothing better is known."""
    where = settings.safe_url
    if isinstance(error, StreamToolsError):
        return error
    if isinstance(error, kafka.TopicAuthorizationFailedError):
        return QueueError(f"{where} does not allow it: topic {plain(error)} (TOPIC_AUTHORIZATION_FAILED).")
    if isinstance(error, kafka.GroupAuthorizationFailedError):
        return QueueError(f"{where} does not allow it: group {plain(error)} (GROUP_AUTHORIZATION_FAILED).")
    if isinstance(error, kafka.UnknownTopicOrPartitionError):
        return QueueError(f"{where} has no such topic or partition: {plain(error)}.")
    if isinstance(error, kafka.InconsistentGroupProtocolError | kafka.InvalidSessionTimeoutError):
        return ConnectError(f"{where} does not let us into the group: {plain(error)}.", permanent=True)
    return ConnectionLost(f"The connection to {where} has ended: {plain(error).rstrip('.')}.")


def refusal(error: BaseException, settings: KafkaSettings) -> StreamToolsError:
    """What a failed request of an operator means: a broker's no is about what was asked, not about the connection."""
    if isinstance(error, kafka.BrokerResponseError) and not error.retriable:
        return QueueError(f"{settings.safe_url} refuses it: {plain(error).rstrip('.')}.")
    return client_error(error, settings)


def was_undone(error: BaseException) -> bool:
    """A transaction is known not to have taken place: Kafka has ended it, or another owner has."""
    return isinstance(error.__cause__, _UNDONE)


def is_too_large(error: BaseException) -> bool:
    """The broker has refused a batch for its size."""
    return isinstance(error, _TOO_LARGE)


def is_unfit(error: BaseException) -> bool:
    """The broker never takes such a record, whoever sends it and when."""
    return isinstance(error, (*RECORD_REFUSALS, Unfit))


def plain(error: BaseException) -> str:
    """The error's own words, or its name where it has none."""
    return str(error).strip() or type(error).__name__
