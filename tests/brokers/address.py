"""Where a broker is: from the environment, or from what `scripts/brokers up` left behind."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import ProxyHandler, Request, build_opener

from tests.brokers.processes import BrokerError

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".brokers" / "state.json"
VARIABLE = "STREAMTOOLS_TEST_RABBITMQ_"


@dataclass(frozen=True, slots=True, kw_only=True)
class RabbitMQAddress:
    """A RabbitMQ to test against; what it has not is None."""

    url: str
    tls_url: str | None = None
    management_url: str | None = None
    #: PEM files for `tls_url`: the authority, the client certificate and its key.
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def in_vhost(self, vhost: str) -> RabbitMQAddress:
        """The same broker, another virtual host."""
        return replace(
            self, url=with_vhost(self.url, vhost), tls_url=self.tls_url and with_vhost(self.tls_url, vhost)
        )

    def manage(self, method: str, path: str, body: Any = None) -> Any:
        """Call the management API: `manage("GET", "queues")`; returns the decoded answer.

        Raises:
            BrokerError: when there is none, or it refuses; its text holds status and body.
        """
        if self.management_url is None:
            raise BrokerError(f"this broker's management API is unknown; set {VARIABLE}MANAGEMENT_URL")
        return call_management(self.management_url, method, path, body)

    def environment(self) -> dict[str, str]:
        """As variables that `from_environment` reads back."""
        return {VARIABLE + name.upper(): value for name, value in asdict(self).items() if value}


def from_environment(environ: Mapping[str, str] = os.environ) -> RabbitMQAddress | None:
    """The broker named by STREAMTOOLS_TEST_RABBITMQ_URL and its sisters (..._TLS_URL, ..._CA), if any."""
    found = {f.name: environ.get(VARIABLE + f.name.upper()) or None for f in fields(RabbitMQAddress)}
    return RabbitMQAddress(**found) if found["url"] else None  # type: ignore[arg-type]


def from_state() -> RabbitMQAddress | None:
    """The broker that `scripts/brokers up` started, if it did."""
    try:
        return RabbitMQAddress(**json.loads(STATE.read_text())["rabbitmq"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_vhost(url: str, vhost: str) -> str:
    """The URL with another virtual host: its path, percent-encoded."""
    return urlunsplit(urlsplit(url)._replace(path="/" + quote(vhost, safe="")))


def call_management(base: str, method: str, path: str, body: Any = None, *, timeout: float = 10) -> Any:
    """One call of RabbitMQ's management API below `/api/`."""
    parts = urlsplit(base)
    login = f"{unquote(parts.username or 'guest')}:{unquote(parts.password or 'guest')}".encode()
    request = Request(
        f"{parts.scheme}://{parts.hostname}:{parts.port}/api/{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"authorization": "Basic " + base64.b64encode(login).decode(), "content-type": "application/json"},
    )
    opener = build_opener(ProxyHandler({}))  # a proxy of the environment is not for loopback
    try:
        with opener.open(request, timeout=timeout) as answer:
            text = answer.read()
    except HTTPError as error:
        with error:
            raise BrokerError(f"{method} {path}: {error.code} {error.read()[:500]!r}") from None
    return json.loads(text) if text else None
