"""TLS contexts from settings; their files are read in a thread."""

from __future__ import annotations

import asyncio
import ssl

from streamtools.errors import ConfigurationError
from streamtools.settings import HTTPSettings


async def server_context(settings: HTTPSettings) -> ssl.SSLContext | None:
    """For a consumer; None for plain HTTP.

    Raises:
        ConfigurationError: a file is missing or is not what it should be, or half of the settings are.
    """
    if not settings.tls:
        if settings.certfile:
            raise ConfigurationError(
                "certfile is set, but the URL begins with http://; write https:// (or tls=True)."
            )
        return None
    if not settings.certfile:
        raise ConfigurationError(
            "A consumer on https:// needs its certificate: add ?certfile=server.pem&keyfile=server.key to the URL, "
            "or set HTTP_CERTFILE and HTTP_KEYFILE."
        )
    return await asyncio.to_thread(_server, settings)


async def client_context(settings: HTTPSettings) -> ssl.SSLContext | bool:
    """For a producer; True for the system's certificates.

    Raises:
        ConfigurationError: a file is missing or is not what it should be.
    """
    if settings.verify and not settings.cafile and not settings.certfile:
        return True
    return await asyncio.to_thread(_client, settings)


def _server(settings: HTTPSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load(context, settings)
    return context


def _client(settings: HTTPSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.cafile)
    except OSError as error:
        raise ConfigurationError(f"cafile={settings.cafile!r} cannot be used: {error.strerror or error}.") from error
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.certfile:
        _load(context, settings)
    return context


def _load(context: ssl.SSLContext, settings: HTTPSettings) -> None:
    try:
        context.load_cert_chain(settings.certfile or "", settings.keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(
            f"certfile={settings.certfile!r} with keyfile={settings.keyfile!r} cannot be used: "
            f"{error.strerror or error}."
        ) from error
