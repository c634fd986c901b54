"""Management: asks RabbitMQ's management API; over TLS if the broker's address is amqps."""

from __future__ import annotations

import base64
import ipaddress
import logging
from typing import Any, Final

import aiohttp
from yarl import URL

from streamtools.engine.tls import client_context, warn_unverified
from streamtools.errors import ConnectError
from streamtools.settings import RabbitMQSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds for one answer.
TIMEOUT: Final = 10.0
#: The management plugin's default ports.
PORTS: Final = {"http": 15672, "https": 15671}

#: Addresses for which this process has warned that they get a password in clear text.
_clear: Final[set[str]] = set()


class Management:
    """Asks the management plugin, as the user in `management_url`, or else as the user of the broker's URL.

    Parameters:
        settings: the settings of the broker; with `amqps` this uses TLS too, with the same authority and certificate.
    """

    def __init__(self, settings: RabbitMQSettings) -> None:
        self._settings = settings
        self._base, self._user, self._login = _target(settings)
        self._where = f"{self._base.scheme} API of RabbitMQ at {self._base.host}:{self._base.port}"

    async def get(self, path: str) -> Any:
        """Return the answer to a GET request, as Python objects.

        Parameters:
            path: the path after `/api/`.

        Raises:
            ConnectError: the plugin does not answer, refuses the request, or shows a certificate that is not trusted.
            ConfigurationError: a certificate file cannot be read.
        """
        tls = await self._tls()
        url = URL(f"{str(self._base).rstrip('/')}/api/{path}", encoded=True)
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as session,
                # A redirect could lead out of TLS, and to another host.
                session.get(url, headers={"Authorization": self._login}, ssl=tls, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise self._refusal(answer.status)
                return await answer.json()
        except ConnectError:  # it is a subclass of OSError
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._failure(error) from error

    async def _tls(self) -> Any:
        if self._base.scheme == "https":
            warn_unverified(self._settings, (str(self._base.host), int(self._base.port or 443)))
            return await client_context(self._settings)
        if self._settings.management_url is not None:
            _warn_clear(self._base)
        return True

    def _refusal(self, status: int) -> ConnectError:
        if status == 401:
            return ConnectError(
                f"The {self._where} refuses the user {self._user!r}: it needs the tag management (rabbitmqctl "
                "set_user_tags).",
                permanent=True,
            )
        return ConnectError(f"The {self._where} answered {status}.", permanent=True)

    def _failure(self, error: Exception) -> ConnectError:
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return ConnectError(
                f"The {self._where} shows a certificate that cannot be verified: "
                f"{getattr(error.certificate_error, 'verify_message', None) or error.certificate_error}. Name the "
                "authority's file with cafile=, or the host in management_url= as the certificate has it.",
                permanent=True,
            )
        hint = (
            "Because the broker's URL is amqps://, the API is asked over TLS, at port 15671 (management.ssl.* in "
            "rabbitmq.conf). "
            if self._base.scheme == "https" and self._settings.management_url is None
            else ""
        )
        return ConnectError(
            f"The {self._where} does not answer: {_words(error)}. Listing queues needs the management plugin "
            f"(rabbitmq-plugins enable rabbitmq_management). {hint}Name its address with management_url= or "
            "RMQ_MANAGEMENT_URL."
        )


def _target(settings: RabbitMQSettings) -> tuple[URL, str, str]:
    """Return the address without a user, the user, and the Authorization header."""
    given = settings.management_url
    if given is None:
        scheme = "https" if settings.tls else "http"
        base = URL.build(scheme=scheme, host=settings.addresses[0][0], port=PORTS[scheme])
    else:
        base = URL(given.get_secret_value())
    user = settings.username if base.user is None else base.user
    password = settings.password.get_secret_value() if base.password is None else base.password
    login = base64.b64encode(f"{user}:{password}".encode()).decode()
    return base.with_user(None).with_query(None).with_fragment(None), user, f"Basic {login}"


def _warn_clear(base: URL) -> None:
    where = f"{base.host}:{base.port}"
    if where in _clear or _is_loopback(str(base.host)):
        return
    _clear.add(where)
    log.warning(
        "management_url=http://%s: THE USER'S PASSWORD GOES THERE IN CLEAR TEXT. Whoever stands between can read it. "
        "Let the management plugin speak TLS (management.ssl.* in rabbitmq.conf), and write https://.",
        where,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _words(error: Exception) -> str:
    # aiohttp's own text for a failed connection is long and technical.
    if isinstance(error, TimeoutError):
        return f"within {TIMEOUT:g} s"
    return getattr(error, "strerror", None) or type(error).__name__
