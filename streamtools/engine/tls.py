"""TLS for clients, the same for every protocol: the authority to trust and the certificate to show."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Final, Protocol

from streamtools.errors import ConfigurationError

log: logging.Logger = logging.getLogger("streamtools")

#: The most addresses that are warned of; each address gets one warning.
REMEMBERED: Final = 1000
_unverified: Final[set[tuple[str, int]]] = set()


class TLSSettings(Protocol):
    """The settings that every protocol with TLS has; see `RabbitMQSettings`."""

    @property
    def cafile(self) -> str | None: ...
    @property
    def certfile(self) -> str | None: ...
    @property
    def keyfile(self) -> str | None: ...
    @property
    def verify(self) -> bool: ...


async def client_context(settings: TLSSettings) -> ssl.SSLContext:
    """Return the TLS context for a client's connections; read its files in a thread.

    Raises:
        ConfigurationError: a file is missing or cannot be used.
    """
    return await asyncio.to_thread(_context, settings)


def warn_unverified(settings: TLSSettings, *addresses: tuple[str, int]) -> None:
    """Warn of `verify=False` in the log, once in this process for each address.

    Parameters:
        addresses: host and port of each server that is connected over TLS.
    """
    if settings.verify:
        return
    for host, port in addresses:
        if (host, port) not in _unverified and len(_unverified) < REMEMBERED:
            _unverified.add((host, port))
            log.warning(
                "verify=false: THE CERTIFICATE OF %s:%d IS NOT CHECKED. Whoever stands between can read and change "
                "everything, passwords too. To check it, name the authority's file with cafile=, and leave verify= "
                "out.",
                host,
                port,
            )


def load_certificate(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    """Load the certificate that this side shows; blocks.

    Raises:
        ConfigurationError: a file is missing or cannot be used.
    """
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # the base class of ssl.SSLError
        raise ConfigurationError(
            f"certfile={certfile!r} with keyfile={keyfile!r} cannot be used: {error.strerror or error}. "
            "Both must name files in PEM format."
        ) from error


def _context(settings: TLSSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.cafile)
    except OSError as error:
        raise ConfigurationError(
            f"cafile={settings.cafile!r} cannot be used: {error.strerror or error}. It must name a PEM file."
        ) from error
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.certfile:
        load_certificate(context, settings.certfile, settings.keyfile)
    return context
