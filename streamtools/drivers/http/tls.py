"""Makes TLS contexts from settings; reads their files in a thread."""

from __future__ import annotations

import asyncio
import ssl

from streamtools.engine import tls
from streamtools.engine.tls import load_certificate
from streamtools.errors import ConfigurationError
from streamtools.settings import HTTPSettings


async def server_context(settings: HTTPSettings) -> ssl.SSLContext | None:
    """Return the TLS context of a consumer; None for plain HTTP.

    Raises:
        ConfigurationError: a file cannot be used, or a setting that belongs to another one is missing.
    """
    if not settings.tls:
        if settings.client_ca:
            raise ConfigurationError(
                "client_ca is set, but the URL begins with http://, where clients show no certificates; write https://."
            )
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
    """Return the TLS context of a producer; True for the system's certificates.

    Raises:
        ConfigurationError: a file is missing or cannot be used.
    """
    if settings.verify and not settings.cafile and not settings.certfile:
        return True
    return await tls.client_context(settings)


def _server(settings: HTTPSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_certificate(context, settings.certfile or "", settings.keyfile)
    if settings.client_ca:
        try:
            context.load_verify_locations(settings.client_ca)
        except OSError as error:
            raise ConfigurationError(
                f"client_ca={settings.client_ca!r} cannot be used: {error.strerror or error}."
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
