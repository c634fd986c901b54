"""Translates the client library's errors into ours, and decides which of them are temporary.

A temporary error becomes a `ConnectError`: the base classes try again with growing delays until their time is over,
and log it once. Any other error becomes a `QueueError`, or a `ConnectError` with permanent=True. Each keeps its
cause.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass
from typing import Final, TypeVar

from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ProbableAuthenticationError,
)

from streamtools.errors import ConnectError, ConnectionLost, QueueError, StreamToolsError
from streamtools.settings import RabbitMQSettings

E = TypeVar("E", bound=BaseException)

#: Everything that the client library raises when a request or a connection fails.
CLIENT_ERRORS: Final[tuple[type[BaseException], ...]] = (
    AMQPError,
    ChannelInvalidStateError,
    OSError,
    RuntimeError,
    asyncio.InvalidStateError,
    StopAsyncIteration,  # aiormq raises it if a connection ends in the middle of a frame
)


@dataclass(frozen=True, slots=True)
class Trouble:
    """One kind of the broker's error answers.

    Attributes:
        code: the broker's reply code.
        words: the broker's text contains these words; empty for any other text with this code.
        passes: whether the error is temporary, so that trying again can help.
        meaning: what it means, as the documentation shows it.
    """

    code: int
    words: str
    passes: bool
    meaning: str


#: The broker's error answers while we connect, open a channel, declare, publish or consume. The first row that fits
#: decides. A code that is not in the table is temporary.
TROUBLES: Final = (
    Trouble(320, "", True, "the broker shuts down, or an operator closed the connection"),
    Trouble(403, "in exclusive use", True, "another client is the only one that may consume this queue"),
    Trouble(403, "", False, "a wrong password, or a permission that is missing"),
    Trouble(404, "down or inaccessible", True, "the node of a classic queue is down, or the queue is being made"),
    Trouble(404, "", False, "there is no such queue or exchange"),
    Trouble(405, "", True, "a queue is exclusive to a connection, which may have ended unnoticed"),
    Trouble(406, "delivery acknowledgement", True, "a handler took longer than the broker's `consumer_timeout`"),
    Trouble(406, "unknown delivery tag", True, "the channel and the broker disagree on what was delivered"),
    Trouble(406, "", False, "a queue that differs from its declaration, a body over `max_message_size`, a limit"),
    Trouble(504, "", True, "a channel that the broker does not know (any more)"),
    Trouble(506, "", True, "the broker lacks resources"),
    Trouble(530, "limit", True, "a virtual host, a user or a node has as many connections or channels as it may"),
    Trouble(530, "is down", True, "the virtual host is being started"),
    Trouble(530, "", False, "no such virtual host, or no permission for it"),
    Trouble(541, "", True, "an error inside the broker, or a virtual host that is being started"),
)
#: The codes of the library's exceptions for a channel, which do not have them as attributes.
_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (ChannelAccessRefused, 403),
    (ChannelNotFoundEntity, 404),
    (ChannelLockedResource, 405),
    (ChannelPreconditionFailed, 406),
)


def trouble(code: int, text: str) -> Trouble:
    """Return the row for an error answer of the broker."""
    found = (row for row in TROUBLES if row.code == code and row.words in text)
    return next(found, Trouble(code, "", True, "not known here"))


#: "inequivalent arg 'durable' for queue 'q' in vhost '/': received 'false' but current is 'true'"
_DIFFERENCE: Final = re.compile(
    r"inequivalent arg '(?P<name>[^']+)'(?:.*: received (?P<asked>.*) but current is (?P<current>.*)$)?", re.DOTALL
)
#: The broker cuts a text off with this, because AMQP has room for 255 bytes.
_CUT: Final = "..."
_VALUE: Final = re.compile(r"(?:the value )?'(?P<value>.*?)'(?: of type '(?P<type>\w+)')?", re.DOTALL)


def connect_error(error: BaseException, settings: RabbitMQSettings, where: str, said: str) -> ConnectError:
    """Return the error for a failed attempt to connect; it is permanent if trying again cannot help.

    Parameters:
        where: the host and port.
        said: the broker's text when it closed the connection; the library does not always pass it on.
    """
    if isinstance(error, TimeoutError):
        return ConnectError(f"RabbitMQ at {where} did not answer within {settings.connect_timeout:g} s.")
    if isinstance(error, ProbableAuthenticationError):
        return ConnectError(
            f"RabbitMQ at {where} refuses the user {settings.username!r} with the password given. Check RMQ_USER and "
            "RMQ_PASS, or the URL. (The user guest may connect from the broker's own machine only.)",
            permanent=True,
        )
    if isinstance(error, AuthenticationError):
        return ConnectError(
            f"RabbitMQ at {where} does not accept a user and a password: it offers {error.args[:1]}.", permanent=True
        )
    if said:
        return _refused(said, settings, where)
    tls = _cause(error, ssl.SSLCertVerificationError) or _cause(error, ssl.SSLError)
    if tls is not None:
        return _tls_failed(tls, where)
    if isinstance(error, AMQPError):
        return ConnectError(
            f"RabbitMQ at {where} ended the connection before it was open. Does a RabbitMQ listen there, and is it "
            f"up? Its port is {'5671 for amqps' if settings.tls else '5672 for amqp'}://."
        )
    why = (isinstance(error, OSError) and error.strerror) or plain(error)
    return ConnectError(
        f"RabbitMQ at {where} cannot be reached: {why}. Does it run there? Check the URL, or RMQ_HOST and RMQ_PORT."
    )


_TLS_REFUSALS: Final = ("WRONG_VERSION_NUMBER", "TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_UNKNOWN_CA")


def _tls_failed(error: ssl.SSLError, where: str) -> ConnectError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectError(
            f"RabbitMQ at {where} shows a certificate that cannot be verified: {error.verify_message}. "
            "Name the authority's file with cafile=, or write the host as it stands in the certificate.",
            permanent=True,
        )
    return ConnectError(
        f"RabbitMQ at {where} does not speak TLS as asked: {error.reason or error}. Check the port (5671 for "
        "amqps), and certfile= and keyfile= if it wants a client certificate.",
        permanent=error.reason in _TLS_REFUSALS,
    )


def _refused(said: str, settings: RabbitMQSettings, where: str) -> ConnectError:
    number, _, text = said.partition(" ")
    kind = trouble(int(number), text)
    if kind.words == "limit":
        return ConnectError(
            f"RabbitMQ at {where} allows no further connection of the user {settings.username!r} to the virtual host "
            f"{settings.vhost!r}: {text}. A process has two for each address. Raise the limit (rabbitmqctl "
            "set_vhost_limits, set_user_limits), or end other clients."
        )
    if "not found" in text and "vhost" in text:
        return ConnectError(
            f"RabbitMQ at {where} has no virtual host {settings.vhost!r}. Create it: rabbitmqctl add_vhost "
            f"{settings.vhost}. Or name another after the last / of the URL, or in RMQ_VHOST.",
            permanent=True,
        )
    if "refused for user" in text and not kind.passes:
        return ConnectError(
            f"RabbitMQ at {where} does not let the user {settings.username!r} into the virtual host "
            f"{settings.vhost!r}. Allow it: rabbitmqctl set_permissions -p {settings.vhost} {settings.username} "
            "'.*' '.*' '.*'",
            permanent=True,
        )
    return ConnectError(
        f"RabbitMQ at {where} closed the connection while it was opened: {said}", permanent=not kind.passes
    )


def lost(where: str, why: str) -> ConnectionLost:
    """Return the error for a connection that has ended."""
    return ConnectionLost(f"The connection to RabbitMQ at {where} has ended: {why.rstrip('.')}.")


def channel_lost(where: str, why: str) -> ConnectionLost:
    """Return the error for a channel that has ended while its connection goes on."""
    return ConnectionLost(f"A channel of RabbitMQ at {where} has ended: {why.rstrip('.')}.")


def channel_error(error: BaseException, where: str) -> StreamToolsError:
    """Return the error for a failed request on a channel, if nothing more specific is known."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), 0)
    text = plain(error)
    if not code and isinstance(error, ChannelClosed) and len(error.args) > 1 and isinstance(error.args[0], int):
        code = error.args[0]
    if not code:
        return lost(where, text)
    kind = trouble(code, text)
    if kind.passes:
        return ConnectError(f"RabbitMQ at {where} cannot do it now ({kind.meaning}): {text}.")
    if code == 403:
        return QueueError(f"RabbitMQ at {where} does not allow it: {text}")
    return QueueError(f"RabbitMQ at {where} refuses: {text}")


def is_missing(error: ChannelNotFoundEntity) -> bool:
    """Whether the queue or exchange does not exist; if False, it exists, but its node is down."""
    return not trouble(404, plain(error)).passes


def difference(error: ChannelPreconditionFailed) -> tuple[str, str, str] | None:
    """Return the broker's words for (argument, wanted value, current value); None for another complaint.

    If names are long, the broker may cut its text off before the values; then both values are empty.
    """
    text = plain(error)
    found = _DIFFERENCE.search(text)
    if found is None:
        return None
    is_whole = found["current"] and not text.endswith(_CUT)
    return (found["name"], found["asked"], found["current"]) if is_whole else (found["name"], "", "")


def value(text: str, like: object = None) -> str | int | bool | float | None:
    """Return the value that the broker describes by words such as: none, 'true', the value 'error' of type 'longstr'.

    Parameters:
        like: the wanted value; if the current value has the same type, the broker names no type.
    """
    found = _VALUE.fullmatch(text.strip())
    if found is None:
        return None
    word, kind = found["value"], found["type"]
    if kind == "bool" or (kind is None and word in ("true", "false") and not isinstance(like, str)):
        return word == "true"
    if kind == "longstr" or (kind is None and not isinstance(like, int | float)):
        return word
    return float(word) if kind in ("double", "float") or isinstance(like, float) else int(word)


def plain(error: BaseException) -> str:
    """Return the text of an error; if it is empty, the name of its class."""
    text = " ".join(str(part) for part in error.args if part is not None).strip()
    return text or type(error).__name__


def _cause(error: BaseException, kind: type[E]) -> E | None:
    found: BaseException | None = error
    seen: set[int] = set()
    # The causes can form a circle, because some clients raise one exception object several times.
    while found is not None and id(found) not in seen:
        if isinstance(found, kind):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None
