"""How every client of the library is made, started and stopped, and why one could not connect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol

from aiokafka import errors as kafka
from aiokafka.conn import create_conn
from aiokafka.protocol.metadata import MetadataRequest

from streamtools.drivers.kafka.client.guard import close_first
from streamtools.drivers.kafka.client.monitor import quieten
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, GARBAGE, client_error, connect_error
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.engine.tls import client_context, warn_unverified
from streamtools.errors import Closed, ConnectError
from streamtools.settings import KafkaSettings

#: Milliseconds between two attempts of the library at one request.
BACKOFF: Final = 100
#: Seconds between two requests for new topics, partitions and brokers.
METADATA_AGE: Final = 30.0
#: Seconds for a goodbye to the brokers.
CLOSE_TIMEOUT: Final = 5.0
#: Seconds to end a client without a goodbye, and for a goodbye to brokers that may be away.
DROP_TIMEOUT: Final = 1.0

#: What an error says to those who use what was closed.
CLOSED: Final = "The producer was closed; call open() to use it again."


class Client(Protocol):
    """A client of the library: it can be started and stopped."""

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
    closed: Callable[[], bool] | None = None,
) -> None:
    """Start a client of the library; nothing is left open when it fails.

    Parameters:
        timeout: seconds; those for one connection attempt to each host when None.
        stop: ends the client if it cannot start; `stopped` when None.
        closed: tells whether its owner was closed meanwhile.

    Raises:
        Closed: its owner was closed meanwhile.
        ConnectError: with the reason, which the library itself only logs.
    """
    limit = timeout or settings.connect_timeout * (len(settings.addresses) + 1)
    stop = stop or partial(stopped, client)
    try:
        async with asyncio.timeout(limit):
            await client.start()
        if closed is not None and closed():  # its end saw no client yet
            raise Closed(CLOSED)
    except BaseException as error:
        close_first(error)
        await stop()
        if isinstance(error, kafka.KafkaConnectionError | TimeoutError):
            raise await diagnose(settings, error) from error
        if isinstance(error, (*CLIENT_ERRORS, *GARBAGE)):  # no user's code runs here, so they are the library's
            raise client_error(error, settings) from error
        raise


async def stopped(client: Client, *, timeout: float = CLOSE_TIMEOUT) -> None:
    """Stop a client of the library, whatever its state, within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            await client.stop()
    except CLIENT_ERRORS:  # a TimeoutError is an OSError
        pass
    except asyncio.CancelledError:
        # The library cancels a fetch that waits after an error, and lets the cancellation out (seen in 0.14).
        if asked_to_stop():
            raise


async def diagnose(settings: KafkaSettings, error: BaseException) -> ConnectError:
    """Why no host let us in, found out by one more connection to each."""
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
                await found.send(MetadataRequest([]))  # a broker that wants a user closes the connection only now
            finally:
                found.close()
    except (*CLIENT_ERRORS, *GARBAGE) as error:  # a TimeoutError is an OSError
        return connect_error(error, settings, f"{host}:{port}")
    return None
