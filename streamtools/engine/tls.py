"""TLS for clients: the authority to trust and the certificate to show, the same for every protocol."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Final, Protocol

from streamtools.errors import ConfigurationError

log: logging.Logger = logging.getLogger("streamtools")

#: Addresses about which a warning is logged, at most; one warning for each.
REMEMBERED: Final = 1000
_unverified: Final[set[tuple[str, int]]] = set()


class TLSSettings(Protocol):
    """What the settings of each protocol with TLS have; see `RabbitMQSettings`."""

    @property
    def cafile(self) -> str | None: ...
    @property
    def certfile(self) -> str | None: ...
    @property
    def keyfile(self) -> str | None: ...
    @property
    def verify(self) -> bool: ...


async def client_context(settings: TLSSettings) -> ssl.SSLContext:
    """The context for a client's connections; its files are read in a thread.

    Raises:
        ConfigurationError: a file is missing or is not what it should be.
    """
    return await asyncio.to_thread(_context, settings)


def warn_unverified(settings: TLSSettings, *addresses: tuple[str, int]) -> None:
    """With `verify=False`, say so in the log, once in this process for each address.

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
    """Let this side show its certificate; blocks.

    Raises:
        ConfigurationError: a file is missing or is not what it should be.
    """
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(
            f"certfile={certfile!r} with keyfile={keyfile!r} cannot be used: {error.strerror or error}. "
            "They name files in PEM."
        ) from error


def _context(settings: TLSSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.cafile)
    except OSError as error:
        raise ConfigurationError(
            f"cafile={settings.cafile!r} cannot be used: {error.strerror or error}. It names a file in PEM."
        ) from error
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.certfile:
        load_certificate(context, settings.certfile, settings.keyfile)
    return context
