"""The one place where errors of the client library become ours. Each keeps its cause."""

from __future__ import annotations

import asyncio
import re
import ssl
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

#: What the client library raises besides its own errors.
CLIENT_ERRORS: Final[tuple[type[BaseException], ...]] = (
    AMQPError,
    ChannelInvalidStateError,
    OSError,
    RuntimeError,
    asyncio.InvalidStateError,
)
#: "inequivalent arg 'durable' for queue 'q' in vhost '/': received 'false' but current is 'true'"
_DIFFERENCE: Final = re.compile(
    r"inequivalent arg '(?P<name>[^']+)'.*: received (?P<asked>.*) but current is (?P<current>.*)$"
)
_VALUE: Final = re.compile(r"(?:the value )?'(?P<value>.*?)'(?: of type '(?P<type>\w+)')?", re.DOTALL)


def connect_error(error: BaseException, settings: RabbitMQSettings, where: str, said: str) -> ConnectError:
    """Why one attempt to connect failed; permanent where trying again cannot help.

    Parameters:
        where: the host and port.
        said: the broker's own words when it closed the connection, which the library does not always tell.
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
            f"RabbitMQ at {where} takes no user and password: it offers {error.args[:1]}.", permanent=True
        )
    if said:
        return _refused(said, settings, where)
    if (verification := _cause(error, ssl.SSLCertVerificationError)) is not None:
        return ConnectError(
            f"RabbitMQ at {where} shows a certificate that cannot be verified: {verification.verify_message}. "
            "Name the authority's file with cafile=, or the host as the certificate has it.",
            permanent=True,
        )
    if (trouble := _cause(error, ssl.SSLError)) is not None:
        return ConnectError(
            f"RabbitMQ at {where} does not speak TLS as asked: {trouble.reason or trouble}. Check the port (5671 for "
            "amqps), and certfile= and keyfile= if it wants a client certificate.",
            permanent=trouble.reason in _TLS_REFUSALS,
        )
    if isinstance(error, AMQPError):
        return ConnectError(
            f"RabbitMQ at {where} ended the connection before it was open. Does a RabbitMQ listen there, and is it "
            "up? Its port is 5672 for amqp://, 5671 for amqps://."
        )
    why = (isinstance(error, OSError) and error.strerror) or plain(error)
    return ConnectError(
        f"RabbitMQ at {where} cannot be reached: {why}. Does it run there? Check the URL, or RMQ_HOST and RMQ_PORT."
    )


_TLS_REFUSALS: Final = ("WRONG_VERSION_NUMBER", "TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_UNKNOWN_CA")


def _refused(text: str, settings: RabbitMQSettings, where: str) -> ConnectError:
    if "not found" in text and "vhost" in text:
        return ConnectError(
            f"RabbitMQ at {where} has no virtual host {settings.vhost!r}. Make it: rabbitmqctl add_vhost "
            f"{settings.vhost}. Or name another behind the last / of the URL, or in RMQ_VHOST.",
            permanent=True,
        )
    if "refused for user" in text and "is down" not in text:
        return ConnectError(
            f"RabbitMQ at {where} does not let the user {settings.username!r} into the virtual host "
            f"{settings.vhost!r}. Allow it: rabbitmqctl set_permissions -p {settings.vhost} {settings.username} "
            "'.*' '.*' '.*'",
            permanent=True,
        )
    return ConnectError(f"RabbitMQ at {where} closed the connection while it was opened: {text}")


def lost(where: str, why: str) -> ConnectionLost:
    """The connection, or a channel of it, has ended."""
    return ConnectionLost(f"The connection to RabbitMQ at {where} has ended: {why.rstrip('.')}.")


def channel_error(error: BaseException, where: str) -> StreamToolsError:
    """What a failed request on a channel means where nothing better is known."""
    if isinstance(error, ChannelAccessRefused):
        return QueueError(f"RabbitMQ at {where} does not allow it: {plain(error)}")
    if isinstance(error, ChannelNotFoundEntity | ChannelPreconditionFailed | ChannelLockedResource):
        return QueueError(f"RabbitMQ at {where} refuses: {plain(error)}")
    if isinstance(error, ChannelClosed) and error.args and error.args[0]:
        return lost(where, f"it closed a channel: {plain(error)}")
    return lost(where, plain(error))


def difference(error: ChannelPreconditionFailed) -> tuple[str, str, str] | None:
    """(argument, asked for, current) as the broker words them; None when it complains of something else."""
    found = _DIFFERENCE.search(plain(error))
    return (found["name"], found["asked"], found["current"]) if found else None


def value(text: str, like: object = None) -> str | int | bool | float | None:
    """A value as the broker words it: none, 'true', the value 'error' of type 'longstr'.

    Parameters:
        like: what was asked for; the broker names no type where both have the same.
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
    """The error's own words, or its name where it has none."""
    text = " ".join(str(part) for part in error.args if part is not None).strip()
    return text or type(error).__name__


def _cause(error: BaseException, kind: type[E]) -> E | None:
    found: BaseException | None = error
    seen: set[int] = set()
    # A client that raises one exception object again and again makes circles of causes (seen).
    while found is not None and id(found) not in seen:
        if isinstance(found, kind):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None
