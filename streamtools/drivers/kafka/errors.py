"""What errors of the client library mean, and ours for them. Each keeps its cause."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Mapping
from enum import Enum
from typing import Final

from aiokafka import errors as kafka

from streamtools.errors import ConnectError, ConnectionLost, QueueError, SendError, StreamToolsError
from streamtools.settings import KafkaSettings


class _InvalidRecordError(kafka.BrokerResponseError):  # type: ignore[misc]  # the library has no types
    """The broker does not take a record: on a compacted topic, one without a key (KIP-467).

    The library (0.14) does not know this code, and takes it for an error that passes.
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
#: What the client library (0.14) raises, beside `CLIENT_ERRORS`, while it reads an answer that is no broker's: it
#: cannot decode it, or finds null instead of a list. To be caught only where no user's code runs: there, the same
#: errors are the user's own.
GARBAGE: Final[tuple[type[Exception], ...]] = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, EOFError, struct.error, MemoryError,
    RecursionError, NotImplementedError,
)  # fmt: skip
#: `CLIENT_ERRORS`, and our own.
TROUBLE: Final[tuple[type[Exception], ...]] = (*CLIENT_ERRORS, StreamToolsError)


#: What to look at if an answer cannot be read.
NO_KAFKA: Final = "If this lasts, look at what stands between: a proxy, or another program at that port."


class Fate(Enum):
    """What follows from a broker's error."""

    AGAIN = "passes: it is tried again, by a new client if necessary, until `send_timeout` or a stop"
    RECORD = "that one message is refused; the others of its batch are taken"
    TOPIC = "the messages to that topic are refused"
    UNDONE = "the transaction was aborted; a consumer reads its messages again"
    FOR_GOOD = "an error at once: trying again cannot help"


#: The brokers' errors by name (kafka.apache.org/protocol, "Error Codes"), what follows from them, and what to do.
#: An error that is not listed passes.
FATES: Final[Mapping[str, tuple[type[Exception], Fate, str]]] = {
    "MESSAGE_TOO_LARGE": (kafka.MessageSizeTooLargeError, Fate.RECORD, "put less into it; see max.message.bytes"),
    "RECORD_LIST_TOO_LARGE": (kafka.RecordListTooLargeError, Fate.RECORD, "the same, and segment.bytes"),
    "INVALID_TIMESTAMP": (kafka.InvalidTimestampError, Fate.RECORD, "see message.timestamp.*.max.ms, and the clock"),
    "INVALID_RECORD": (_InvalidRecordError, Fate.RECORD, "a compacted topic wants a key"),
    "CORRUPT_MESSAGE": (kafka.CorruptRecordException, Fate.RECORD, "a compacted topic wants a key (old brokers)"),
    "UNSUPPORTED_FOR_MESSAGE_FORMAT": (
        kafka.UnsupportedForMessageFormatError, Fate.RECORD, "raise the topic's message.format.version",
    ),
    "INVALID_TOPIC_EXCEPTION": (kafka.InvalidTopicError, Fate.TOPIC, "send to another topic"),
    "TOPIC_AUTHORIZATION_FAILED": (kafka.TopicAuthorizationFailedError, Fate.TOPIC, "allow the user to write to it"),
    "POLICY_VIOLATION": (kafka.PolicyViolationError, Fate.TOPIC, "ask who runs the brokers for their policy"),
    "INVALID_REQUIRED_ACKS": (kafka.InvalidRequiredAcksError, Fate.TOPIC, "the brokers must take acks=all"),
    "INVALID_PRODUCER_EPOCH": (kafka.InvalidProducerEpoch, Fate.UNDONE, "another has its id, or it took too long"),
    "INVALID_TXN_STATE": (kafka.InvalidTxnState, Fate.UNDONE, "it took too long"),
    "INVALID_PRODUCER_ID_MAPPING": (kafka.InvalidProducerIdMapping, Fate.UNDONE, "its id was not used for days"),
    "SASL_AUTHENTICATION_FAILED": (kafka.SaslAuthenticationFailed, Fate.FOR_GOOD, "check user and password"),
    "UNSUPPORTED_SASL_MECHANISM": (kafka.UnsupportedSaslMechanismError, Fate.FOR_GOOD, "name another with ?sasl="),
    "ILLEGAL_SASL_STATE": (kafka.IllegalSaslStateError, Fate.FOR_GOOD, "check ?sasl= and the port"),
    "CLUSTER_AUTHORIZATION_FAILED": (
        kafka.ClusterAuthorizationFailedError, Fate.FOR_GOOD, "allow the user IDEMPOTENT_WRITE on the cluster",
    ),
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED": (
        kafka.TransactionalIdAuthorizationFailed, Fate.FOR_GOOD, "allow the user to write to the transactional id",
    ),
    "GROUP_AUTHORIZATION_FAILED": (kafka.GroupAuthorizationFailedError, Fate.FOR_GOOD, "allow the user READ on it"),
    "INCONSISTENT_GROUP_PROTOCOL": (
        kafka.InconsistentGroupProtocolError, Fate.FOR_GOOD, "another program's group has this name: choose another",
    ),
    "INVALID_SESSION_TIMEOUT": (
        kafka.InvalidSessionTimeoutError, Fate.FOR_GOOD, "see the brokers' group.*.session.timeout.ms",
    ),
    "UNSUPPORTED_VERSION": (kafka.UnsupportedVersionError, Fate.FOR_GOOD, "Kafka 2.1 or later is needed"),
    "NOT_LEADER_OR_FOLLOWER": (kafka.NotLeaderForPartitionError, Fate.AGAIN, ""),
    "LEADER_NOT_AVAILABLE": (kafka.LeaderNotAvailableError, Fate.AGAIN, ""),
    "NOT_ENOUGH_REPLICAS": (kafka.NotEnoughReplicasError, Fate.AGAIN, "bring back the brokers that are away"),
    "NOT_ENOUGH_REPLICAS_AFTER_APPEND": (kafka.NotEnoughReplicasAfterAppendError, Fate.AGAIN, "the same"),
    "REQUEST_TIMED_OUT": (kafka.RequestTimedOutError, Fate.AGAIN, ""),
    "OUT_OF_ORDER_SEQUENCE_NUMBER": (kafka.OutOfOrderSequenceNumber, Fate.AGAIN, ""),
    "COORDINATOR_NOT_AVAILABLE": (kafka.CoordinatorNotAvailableError, Fate.AGAIN, ""),
    "NOT_COORDINATOR": (kafka.NotCoordinatorError, Fate.AGAIN, ""),
    "COORDINATOR_LOAD_IN_PROGRESS": (kafka.CoordinatorLoadInProgressError, Fate.AGAIN, ""),
    "CONCURRENT_TRANSACTIONS": (kafka.ConcurrentTransactions, Fate.AGAIN, ""),
    "KAFKA_STORAGE_ERROR": (kafka.KafkaStorageError, Fate.AGAIN, "see the broker's disks"),
}  # fmt: skip


def _with(*fates: Fate) -> tuple[type[Exception], ...]:
    return tuple(error for error, fate, _ in FATES.values() if fate in fates)


#: The broker refuses a whole batch for one of its records; the others are taken without that one.
RECORD_REFUSALS: Final = _with(Fate.RECORD)
#: The broker refuses a batch for one of its records, or for its topic.
BATCH_REFUSALS: Final = _with(Fate.RECORD, Fate.TOPIC)
#: The broker takes nothing of such a batch, whoever sends it again.
REFUSALS: Final[tuple[type[Exception], ...]] = (
    *BATCH_REFUSALS,
    kafka.ClusterAuthorizationFailedError,
    kafka.TransactionalIdAuthorizationFailed,
)
_UNDONE: Final = (*_with(Fate.UNDONE), kafka.ProducerFenced)  # the library's own error for a wrong epoch
_FOR_GOOD: Final = _with(Fate.FOR_GOOD)
_TOO_LARGE: Final[tuple[type[Exception], ...]] = (kafka.MessageSizeTooLargeError, kafka.RecordListTooLargeError)


class Missing(QueueError):
    """A topic does not exist, or not any more."""


class Unfit(SendError):
    """A record that is not sent at all: it is too large, or cannot be written."""


def wants_key(error: BaseException) -> bool:
    """The topic does not take a record, most likely because it has no key."""
    return isinstance(error, _InvalidRecordError)


def connect_error(error: BaseException, settings: KafkaSettings, where: str) -> ConnectError:
    """The error for an attempt to connect; permanent if trying again cannot help.

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
    if isinstance(error, GARBAGE):
        return ConnectError(f"Kafka at {where} has sent what cannot be read: {plain(error).rstrip('.')}. {NO_KAFKA}")
    hint = "check that the port is that of its TLS listener" if settings.tls else "if it wants TLS write kafkas://"
    return ConnectError(
        f"Kafka at {where} closed the connection: {plain(error).rstrip('.')}; {hint}, and if it wants a user "
        f"{'kafkas' if settings.tls else 'kafka'}://user:password@host."
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
    """The error for a failed request of any kind."""
    where = settings.safe_url
    if isinstance(error, StreamToolsError):
        return error
    if isinstance(error, kafka.TopicAuthorizationFailedError):
        return QueueError(f"{where} does not allow it: topic {plain(error)} (TOPIC_AUTHORIZATION_FAILED).")
    if isinstance(error, kafka.GroupAuthorizationFailedError):
        return QueueError(f"{where} does not allow it: group {plain(error)} (GROUP_AUTHORIZATION_FAILED).")
    if isinstance(error, kafka.UnknownTopicOrPartitionError):
        return QueueError(f"{where} has no such topic or partition: {plain(error)}.")
    if isinstance(error, kafka.IncompatibleBrokerVersion):
        return ConnectError(f"{where} is too old: {plain(error).rstrip('.')}.", permanent=True)
    if isinstance(error, _FOR_GOOD):
        return ConnectError(f"{where} refuses it: {explained(error)}.", permanent=True)
    if isinstance(error, GARBAGE):
        return ConnectionLost(f"{where} has sent what cannot be read: {plain(error).rstrip('.')}. {NO_KAFKA}")
    return ConnectionLost(f"The connection to {where} has ended: {plain(error).rstrip('.')}.")


def refusal(error: BaseException, settings: KafkaSettings) -> StreamToolsError:
    """The error for a failed request of an operator: if a broker refuses it, the connection is not lost."""
    if isinstance(error, kafka.BrokerResponseError) and not error.retriable:
        return QueueError(f"{settings.safe_url} refuses it: {plain(error).rstrip('.')}.")
    return client_error(error, settings)


def was_undone(error: BaseException) -> bool:
    """A transaction was surely aborted: by Kafka, or by another owner of its id."""
    return isinstance(error.__cause__, _UNDONE)


def is_too_large(error: BaseException) -> bool:
    """The broker has refused a batch for its size."""
    return isinstance(error, _TOO_LARGE)


def is_unfit(error: BaseException) -> bool:
    """The broker never takes this record, whoever sends it and when."""
    return isinstance(error, (*RECORD_REFUSALS, Unfit))


def explained(error: BaseException) -> str:
    """A broker's error by its name, with what to do; other errors in their own words."""
    for name, (kind, _, help_) in FATES.items():
        if isinstance(error, kind) and help_:
            return f"{name}: {help_} ({plain(error).rstrip('.')})"
    return plain(error)


def plain(error: BaseException) -> str:
    """The error's own words, or its name if it has none."""
    return str(error).strip() or type(error).__name__
