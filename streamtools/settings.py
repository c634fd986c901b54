"""Settings: addresses from a URL, from the environment, or from defaults.

Which address holds: `url=`, then `STREAMTOOLS_URL` if its scheme belongs to the protocol, then the
protocol's own variables (`RMQ_HOST`, `KAFKA_HOST`, ...), then the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from streamtools.errors import ConfigurationError, suggest
from streamtools.protocols import URL_VARIABLE
from streamtools.validation.converted import Secret, SecretOrNone, Secrets, Texts
from streamtools.validation.tokens import read_tokens

#: The number of a process among those that `streamtools run --workers` started: 0, 1, and so on.
WORKER_VARIABLE: Final = "STREAMTOOLS_WORKER"

#: The ports that web addresses need not name.
PORTS: Final = {"http": 80, "https": 443}

#: What goes wrong most often in a URL.
ENCODED: Final = (
    "Percent-encode what is special: in a user name or password '/' is %2F, '?' is %3F, '#' is %23, '@' is %40, "
    "':' is %3A."
)


def worker_number() -> int | None:
    """The number of this process among its workers, from 0 on; None where it is no worker.

    `streamtools run --workers` sets it. Whoever starts processes by other means may do so too.

    Raises:
        ConfigurationError: the variable holds no such number.
    """
    text = os.environ.get(WORKER_VARIABLE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(f"{WORKER_VARIABLE}={text!r} is no worker's number: 0, 1, 2 and so on.")
    return int(text)


class ProtocolSettings(BaseSettings):
    """Where a protocol's broker is and how to reach it. A driver subclasses it, naming its URL schemes.

    Raises:
        ConfigurationError: a field or a URL does not fit; the text never holds a password.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True
    )

    #: The protocol's name in the registries.
    protocol: ClassVar[str] = ""
    #: URL schemes that belong to it; the first is written in `safe_url`.
    schemes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _explain(type(self), error) from None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read a URL; its query sets the further fields (`?certfile=...`)."""
        try:
            parts = urlsplit(url)
            if parts.scheme not in cls.schemes:
                raise ConfigurationError(
                    f"{cls.protocol!r} takes URLs that begin with {' or '.join(f'{s}://' for s in cls.schemes)}, "
                    f"not {parts.scheme + '://' if parts.scheme else 'one without a scheme'}."
                )
            if not url[len(parts.scheme) :].startswith("://"):
                raise ConfigurationError(f"A {cls.protocol} URL begins with {cls.schemes[0]}://, with both slashes.")
            if "#" in url:
                raise ConfigurationError(f"A {cls.protocol} URL has no '#'. {ENCODED}")
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            cls._check_query(query)
            return cls(**{**cls._from_parts(parts), **query})
        except ConfigurationError:
            raise
        except ValueError as error:  # urlsplit: a port that is no number, an unclosed bracket
            # Not its own text: that quotes the part which is no port, and that may be a password's beginning.
            raise ConfigurationError(
                f"The {cls.protocol} URL cannot be read: its host or port is not one ({type(error).__name__}). "
                f"{ENCODED}"
            ) from None

    @classmethod
    def from_environment(cls) -> Self:
        """`STREAMTOOLS_URL` if it is this protocol's, else its own variables, else the defaults."""
        url = os.environ.get(URL_VARIABLE, "")
        if url and url.partition(":")[0].lower() in cls.schemes:
            return cls.from_url(url)
        return cls()

    @classmethod
    def resolve(cls, url: str | ProtocolSettings | None) -> Self:
        """The settings that hold: those given, else from the environment, else the defaults.

        Raises:
            ConfigurationError: the URL or the settings object is another protocol's, or cannot be used.
        """
        if url is None:
            return cls.from_environment()
        if isinstance(url, str):
            return cls.from_url(url)
        if isinstance(url, cls):
            return url
        raise ConfigurationError(f"{cls.protocol!r} takes a URL or {cls.__name__}(...), not {type(url).__name__}.")

    @classmethod
    def _from_parts(cls, parts: Any) -> dict[str, Any]:
        """The fields that stand in the URL before its query; `parts` is a `urllib.parse.SplitResult`."""
        raise TypeError(f"{cls.__name__} does not say how to read a URL: write its _from_parts().")

    @classmethod
    def _check_query(cls, query: dict[str, str]) -> None:
        for name, value in query.items():
            if name not in cls.model_fields:
                if "@" in name + value:  # not shown: behind an unencoded "?" it is a password
                    raise ConfigurationError(f"The {cls.protocol} URL has an '@' behind its '?'. {ENCODED}")
                raise ConfigurationError(f"The {cls.protocol} URL has no {name!r}. {suggest(name, cls.model_fields)}")

    @property
    def safe_url(self) -> str:
        """The address for logs and errors, without a password."""
        return f"{self.schemes[0]}://"


def _explain(cls: type[ProtocolSettings], error: ValidationError) -> ConfigurationError:
    # Only the field and pydantic's sentence: the value may be a password.
    rows = "; ".join(_row(cls, problem) for problem in error.errors(include_input=False))
    return ConfigurationError(f"{cls.__name__} cannot be used: {rows}.")


def _row(cls: type[ProtocolSettings], problem: Mapping[str, Any]) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"it has no {name!r}: {suggest(name, cls.model_fields)}".removesuffix(".")
    return f"{name}: {problem['msg']}"


def _hosts_and_login(parts: Any, secure: str) -> dict[str, Any]:
    """The settings in what stands before a URL's path; with the scheme `secure` it means TLS."""
    user, at, hosts = parts.netloc.rpartition("@")
    name, colon, password = user.partition(":")
    fields: dict[str, Any] = {"tls": parts.scheme == secure}
    if hosts:
        fields["host"] = hosts
    if at:
        fields["username"] = unquote(name)
        if colon:
            fields["password"] = unquote(password)
    return fields


class RabbitMQSettings(ProtocolSettings):
    """`amqp(s)://user:password@host:5672,other:5672/vhost?cafile=...`, or `RMQ_HOST`, `RMQ_PORT`, `RMQ_USER`,
    `RMQ_PASS`, `RMQ_VHOST` and so on.

    Parameters:
        host: one host, or several with commas between them, each with `:port` if it differs; tried in turn.
        port: of hosts that name none; 5672, or 5671 with TLS, when unset.
        username: the user, without percent-encoding.
        password: the user's password, without percent-encoding.
        vhost: the virtual host.
        tls: use TLS (`amqps`).
        cafile: a file with the certificates of authorities to trust, in PEM.
        certfile: this client's certificate, in PEM.
        keyfile: the private key of that certificate, in PEM.
        verify: check the server's certificate and host name.
        heartbeat: seconds between heartbeats.
        connect_timeout: seconds to wait for one connection attempt.
        management_url: the address of the management plugin, which lists queues; when unset http://host:15672, or
            with TLS https://host:15671, with the same certificates.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix="RMQ_")
    protocol: ClassVar[str] = "rabbitmq"
    schemes: ClassVar[tuple[str, ...]] = ("amqp", "amqps")

    host: str = "localhost"
    port: Annotated[int | None, Field(ge=1, le=65535)] = None
    username: Annotated[str, Field(validation_alias=AliasChoices("username", "RMQ_USER", "RMQ_USERNAME"))] = "guest"
    password: Annotated[Secret, Field(validation_alias=AliasChoices("password", "RMQ_PASS", "RMQ_PASSWORD"))] = (
        SecretStr("guest")  # type: ignore[assignment]
    )
    vhost: str = "/"
    tls: bool = False
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    heartbeat: Annotated[int, Field(ge=0, le=65535)] = 30
    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    management_url: SecretOrNone = None  # type: ignore[assignment]

    @field_validator("management_url")
    @classmethod
    def _check_management_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None or not url.get_secret_value():
            return None
        if not _is_web_address(url.get_secret_value()):
            # Not shown: it may hold a password.
            raise ValueError(f"it is no web address: write https://host:15671 or http://host:15672. {ENCODED[:-1]}")
        return url

    @classmethod
    def _from_parts(cls, parts: Any) -> dict[str, Any]:
        fields = _hosts_and_login(parts, "amqps")
        # AMQP URI specification of RabbitMQ: "/" after the host and nothing behind it is the vhost ""
        # there; every client but the strictest reads it as the default vhost, and so do we.
        if "@" in parts.path:  # not shown: behind an unencoded "/" it is a password
            raise ConfigurationError(f"The rabbitmq URL has an '@' behind its host. {ENCODED}")
        if parts.path not in ("", "/"):
            fields["vhost"] = unquote(parts.path[1:])
        return fields

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The hosts with their ports, in the order to try them."""
        default = self.port or (5671 if self.tls else 5672)
        return [_address(item, default) for item in self.host.split(",") if item.strip()]

    @property
    def safe_url(self) -> str:
        hosts = ",".join(f"{h}:{p}" for h, p in self.addresses)
        return f"{'amqps' if self.tls else 'amqp'}://{quote(self.username)}@{hosts}/{quote(self.vhost, safe='')}"


class KafkaSettings(ProtocolSettings):
    """`kafka(s)://user:password@host:9092,other:9092/?sasl=SCRAM-SHA-512`, or `KAFKA_HOST`, `KAFKA_USER`,
    `KAFKA_PASS` and so on.

    Parameters:
        host: one broker, or several with commas between them, each with `:port` if it differs; one that answers is
            enough.
        port: of hosts that name none.
        username: the user for SASL, without percent-encoding; no SASL when unset.
        password: the user's password, without percent-encoding.
        sasl: the SASL mechanism.
        tls: use TLS (`kafkas`).
        cafile: a file with the certificates of authorities to trust, in PEM.
        certfile: this client's certificate, in PEM.
        keyfile: the private key of that certificate, in PEM.
        verify: check the server's certificate and host name.
        connect_timeout: seconds to wait for one connection attempt.
        request_timeout: seconds to wait for the answer to one request, before it is sent again.
        session_timeout: seconds without a heartbeat after which a consumer counts as dead and others take over.
        partitions: how many partitions a topic gets that is created here; the broker's `num.partitions` when unset.
        replication: how many copies its partitions get; the broker's default when unset.
        max_message: the largest message that a producer sends, in bytes; the broker has its own limit, too.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix="KAFKA_")
    protocol: ClassVar[str] = "kafka"
    schemes: ClassVar[tuple[str, ...]] = ("kafka", "kafkas")

    host: str = "localhost"
    port: Annotated[int, Field(ge=1, le=65535)] = 9092
    username: Annotated[
        str | None, Field(validation_alias=AliasChoices("username", "KAFKA_USER", "KAFKA_USERNAME"))
    ] = None
    password: Annotated[Secret, Field(validation_alias=AliasChoices("password", "KAFKA_PASS", "KAFKA_PASSWORD"))] = (
        SecretStr("")  # type: ignore[assignment]
    )
    sasl: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    tls: bool = False
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    request_timeout: Annotated[float, Field(gt=0)] = 15.0
    session_timeout: Annotated[float, Field(ge=1)] = 10.0
    partitions: Annotated[int | None, Field(ge=1)] = None
    replication: Annotated[int | None, Field(ge=1)] = None
    max_message: Annotated[int, Field(gt=0)] = 1024 * 1024

    @classmethod
    def _from_parts(cls, parts: Any) -> dict[str, Any]:
        if parts.path not in ("", "/"):
            raise ConfigurationError(
                "A kafka URL names brokers alone and ends behind them; the topic is the queue's name. In a user name "
                "or password '/' is %2F, '@' is %40, ':' is %3A."
            )
        return _hosts_and_login(parts, "kafkas")

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The hosts with their ports, in the order to try them."""
        return [_address(item, self.port) for item in self.host.split(",") if item.strip()]

    @property
    def safe_url(self) -> str:
        hosts = ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.addresses)
        user = f"{quote(self.username, safe='')}@" if self.username is not None else ""
        return f"{'kafkas' if self.tls else 'kafka'}://{user}{hosts}"


class SQLiteSettings(ProtocolSettings):
    """`sqlite:///orders.db` (relative), `sqlite:////var/lib/orders.db` (absolute), `sqlite://` (streamtools.db).

    Parameters:
        path: the database file; it is created if it does not exist.
        lease: seconds after which the messages of a consumer that died come back.
        busy_timeout: seconds to wait until another process has finished writing.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix="SQLITE_")
    protocol: ClassVar[str] = "sqlite"
    schemes: ClassVar[tuple[str, ...]] = ("sqlite",)

    path: str = "streamtools.db"
    lease: Annotated[float, Field(gt=0)] = 30.0
    busy_timeout: Annotated[float, Field(gt=0)] = 30.0

    @classmethod
    def _from_parts(cls, parts: Any) -> dict[str, Any]:
        if parts.netloc:
            raise ConfigurationError(
                "A sqlite URL has no host, but this one names something there: write three slashes for a relative "
                "path (sqlite:///orders.db) and four for an absolute one (sqlite:////var/lib/orders.db)."
            )
        path = unquote(parts.path.removeprefix("/"))
        return {"path": path} if path else {}

    @property
    def safe_url(self) -> str:
        return f"sqlite:///{quote(self.path)}"


def _names(value: object) -> object:
    """Several names, also as one text with commas between them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _origins(value: object) -> object:
    return tuple(map(_origin, names)) if isinstance(names := _names(value), list | tuple) else names


def _origin(text: object) -> object:
    """A web page's origin as browsers write it: in lower case, without a path and without the scheme's own port."""
    if not isinstance(text, str) or text in ("*", "null"):
        return text
    try:
        parts = urlsplit(text.lower())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not parts.hostname or "@" in parts.netloc or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("an origin is a scheme and a host, such as https://shop.example, or * for any")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, PORTS.get(parts.scheme)) else f":{port}")


def _filled(value: object) -> object:
    if isinstance(value, str) and not value.strip():  # what was not filled in must not let everyone in
        raise ValueError("it is set, but empty: leave it out if every client may come")
    return value


Names = Annotated[Texts, NoDecode, BeforeValidator(_names)]


class HTTPSettings(ProtocolSettings):
    """`http(s)://host:9000/prefix`, or `HTTP_HOST` and `HTTP_PORT`.

    Parameters:
        host: where the producer sends and the consumer listens; may be `host:port`.
        port: 9000 when unset.
        prefix: a path before the names of queues, as in a URL.
        tls: use TLS (`https`); a consumer then needs certfile and keyfile.
        cafile: a file with the certificates of authorities that a producer trusts, in PEM.
        certfile: the certificate of this consumer or producer, in PEM.
        keyfile: the private key of that certificate, in PEM.
        verify: check the server's certificate and host name.
        timeout: a producer waits so many seconds for the answer to a request; a consumer for a body to arrive.
        max_body: the largest request body that a consumer takes, in bytes.
        tokens: a consumer accepts only requests with one of them (`Authorization: Bearer ...`), and a producer sends
            the first; with several you can replace one. Each has at least 16 characters.
        client_ca: a file with the certificates of authorities, in PEM; a consumer with TLS then accepts only clients
            that have a certificate of one of them.
        hosts: the host names by which a consumer may be asked; any when empty.
        origins: web pages that may ask a consumer, such as `https://shop.example`; "*" for all, none by default.
        max_connections: how many connections a consumer's port has at most; beyond that the slowest are closed.
        max_answer: the largest body of an answer that a producer reads, in bytes, compressed or not.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix="HTTP_")
    protocol: ClassVar[str] = "http"
    schemes: ClassVar[tuple[str, ...]] = ("http", "https")

    host: str = "127.0.0.1"
    port: Annotated[int | None, Field(ge=0, le=65535)] = None
    prefix: str = ""
    tls: bool = False
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    timeout: Annotated[float, Field(gt=0)] = 30.0
    max_body: Annotated[int, Field(gt=0)] = 1024 * 1024
    tokens: Annotated[Secrets, NoDecode, BeforeValidator(read_tokens)] = ()  # type: ignore[assignment]
    client_ca: Annotated[str | None, BeforeValidator(_filled)] = None
    hosts: Annotated[Names, BeforeValidator(_filled)] = ()  # type: ignore[assignment]
    origins: Annotated[Texts, NoDecode, BeforeValidator(_origins)] = ()  # type: ignore[assignment]
    max_connections: Annotated[int, Field(gt=0)] = 2000
    max_answer: Annotated[int, Field(gt=0)] = 16 * 1024 * 1024

    @classmethod
    def _from_parts(cls, parts: Any) -> dict[str, Any]:
        if "@" in parts.netloc:
            raise ConfigurationError("An http URL here has no user and password; send them as headers.")
        fields: dict[str, Any] = {"tls": parts.scheme == "https", "prefix": parts.path}
        if parts.hostname:
            default = 443 if parts.scheme == "https" else 80
            fields |= {"host": parts.hostname, "port": default if parts.port is None else parts.port}
        return fields

    @field_validator("prefix")
    @classmethod
    def _one_form(cls, prefix: str) -> str:
        # "v1", "/v1/" and "/v1" are one prefix; what is not fit for a URL is percent-encoded.
        path = quote(unquote(prefix), safe="/").strip("/")
        return f"/{path}" if path else ""

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port."""
        return _address(self.host, 9000 if self.port is None else self.port)

    @property
    def safe_url(self) -> str:
        host, port = self.address
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls else 'http'}://{host}:{port}{self.prefix}"


class AsyncIOSettings(ProtocolSettings):
    """`asyncio://name?maxsize=10000`: queues in this process, shared by name by all event loops of it.

    Parameters:
        name: the queues of different names are separate.
        maxsize: how many messages a queue holds before `send` waits.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix="ASYNCIO_")
    protocol: ClassVar[str] = "asyncio"
    schemes: ClassVar[tuple[str, ...]] = ("asyncio",)

    name: str = ""
    maxsize: Annotated[int, Field(gt=0)] = 10_000

    @classmethod
    def _from_parts(cls, parts: Any) -> dict[str, Any]:
        return {"name": unquote(parts.netloc + parts.path)}

    @property
    def safe_url(self) -> str:
        return f"asyncio://{quote(self.name)}"


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        ends_at_host = "@" not in parts.path + parts.query + parts.fragment  # else a password is taken for the path
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and ends_at_host
    except ValueError:  # a port that is no number, an unclosed bracket
        return False


def _address(text: str, default: int) -> tuple[str, int]:
    text = text.strip()
    if text.count(":") > 1 and not text.startswith("["):
        return text, default  # an IPv6 address without a port
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        return text.strip("[]"), default
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        # What stands there is not shown: behind an unencoded "/" it is a password's beginning.
        raise ConfigurationError(f"The port is not a number from 1 to 65535. Write host:port. {ENCODED}")
    return host.strip("[]"), int(port)
