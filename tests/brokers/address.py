"""Where a broker is: from the environment, or from what `scripts/brokers up` left behind."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import ProxyHandler, Request, build_opener

from tests.brokers.processes import BrokerError

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".brokers" / "state.json"
#: Chooses RabbitMQ 4 where it is "4".
VERSION = "STREAMTOOLS_TEST_RABBITMQ_VERSION"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A broker to test against; what it has not is None."""

    #: The broker's name in the state and, in capitals, in the variables.
    broker: ClassVar[str]

    url: str
    tls_url: str | None = None
    #: PEM files for `tls_url`: the authority, the client certificate and its key.
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def environment(self) -> dict[str, str]:
        """As variables that `from_environment` reads back."""
        return {self.variable(name): value for name, value in asdict(self).items() if value}

    @classmethod
    def variable(cls, field: str) -> str:
        """STREAMTOOLS_TEST_RABBITMQ_URL and its sisters (..._TLS_URL, ..._CA)."""
        return f"STREAMTOOLS_TEST_{cls.broker}_{field}".upper()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """The broker that the environment names, if it does."""
        found = {f.name: environ.get(cls.variable(f.name)) or None for f in fields(cls)}
        return cls(**found) if found["url"] else None  # type: ignore[arg-type]

    @classmethod
    def from_state(cls) -> Self | None:
        """The broker that `scripts/brokers up` started, if it did."""
        try:
            return cls(**read_state()[cls.broker]["address"])
        except (KeyError, TypeError):
            return None


def read_state() -> dict[str, Any]:
    """What `scripts/brokers up` left behind; empty when nothing, or nothing readable."""
    try:
        state: dict[str, Any] = json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}
    return state


@dataclass(frozen=True, slots=True, kw_only=True)
class RabbitMQAddress(Address):
    """A RabbitMQ to test against."""

    broker: ClassVar[str] = "rabbitmq"

    management_url: str | None = None
    #: Without a user in it.
    management_tls_url: str | None = None

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
            raise BrokerError(f"this broker's management API is unknown; set {self.variable('management_url')}")
        return call_management(self.management_url, method, path, body)


@dataclass(frozen=True, slots=True, kw_only=True)
class RabbitMQ4Address(RabbitMQAddress):
    """A RabbitMQ 4, beside the other one; its variables are the same, and one more chooses it."""

    broker: ClassVar[str] = "rabbitmq4"

    def environment(self) -> dict[str, str]:
        """As variables that `from_environment` reads back."""
        return {VERSION: "4", **{self.variable(name): value for name, value in asdict(self).items() if value}}

    @classmethod
    def variable(cls, field: str) -> str:
        """As for any RabbitMQ."""
        return RabbitMQAddress.variable(field)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """The broker that the environment names, if it is a RabbitMQ 4."""
        if environ.get(VERSION) != "4":
            return None
        found = {f.name: environ.get(cls.variable(f.name)) or None for f in fields(cls)}
        return cls(**found) if found["url"] else None  # type: ignore[arg-type]


def rabbitmq_address(environ: Mapping[str, str] = os.environ) -> RabbitMQAddress | None:
    """The RabbitMQ to test against, of the version that the environment asks for; None when none is up."""
    kind = RabbitMQ4Address if environ.get(VERSION) == "4" else RabbitMQAddress
    return kind.from_environment(environ) or kind.from_state()


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
