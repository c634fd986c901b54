"""The one table of the built-in protocols, and the address that holds when none is given.

The registries and the errors read this table. It holds texts alone: a driver is imported when its
protocol is first used. `settings` and this file are the only readers of the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from streamtools.options import (
    HTTPConsumerOptions,
    HTTPProducerOptions,
    HTTPSendOptions,
    KafkaConsumerOptions,
    KafkaProducerOptions,
    KafkaSendOptions,
    RabbitMQConsumerOptions,
    RabbitMQProducerOptions,
)

RABBITMQ: Final = "rabbitmq"
KAFKA: Final = "kafka"
HTTP: Final = "http"
SQLITE: Final = "sqlite"
ASYNCIO: Final = "asyncio"

Face = Literal["producer", "consumer", "admin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A protocol that comes with the package.

    Attributes:
        name: its name in the registries.
        schemes: what its URLs begin with.
        module: the driver.
        producer: the name of the class in `module`; likewise `consumer` and `admin`.
        admin: None where there is none.
        no_admin: why there is none.
        extra: what brings its client library; None where Python itself has all.
        libraries: what the extra brings.
        alias: its name in older systems.
        options: options of its constructors and of the decorator.
        send_options: options of its `send`.
        suggested_for: features (see `Features`) for which errors name this protocol.
    """

    name: str
    schemes: tuple[str, ...]
    module: str
    producer: str
    consumer: str
    admin: str | None = None
    no_admin: str = ""
    extra: str | None = None
    libraries: tuple[str, ...] = ()
    alias: str | None = None
    options: frozenset[str] = frozenset()
    send_options: frozenset[str] = frozenset()
    suggested_for: frozenset[str] = frozenset()


def _names(*options: Any) -> frozenset[str]:
    return frozenset().union(*(each.__optional_keys__ for each in options))


BUILT_IN: Final = (
    BuiltIn(
        name=ASYNCIO,
        schemes=("asyncio",),
        module="streamtools.drivers.asyncio",
        producer="AsyncIOProducer",
        consumer="AsyncIOConsumer",
        admin="AsyncIOAdmin",
        alias="AsyncIOHandler",
    ),
    BuiltIn(
        name=SQLITE,
        schemes=("sqlite",),
        module="streamtools.drivers.sqlite",
        producer="SQLiteProducer",
        consumer="SQLiteConsumer",
        admin="SQLiteAdmin",
    ),
    BuiltIn(
        name=RABBITMQ,
        schemes=("amqp", "amqps"),
        module="streamtools.drivers.rabbitmq",
        producer="RabbitMQProducer",
        consumer="RabbitMQConsumer",
        admin="RabbitMQAdmin",
        extra="rabbitmq",
        libraries=("aio-pika", "aiormq"),
        alias="RMQIOHandler",
        options=_names(RabbitMQProducerOptions, RabbitMQConsumerOptions),
    ),
    BuiltIn(
        name=KAFKA,
        schemes=("kafka", "kafkas"),
        module="streamtools.drivers.kafka",
        producer="KafkaProducer",
        consumer="KafkaConsumer",
        admin="KafkaAdmin",
        extra="kafka",
        libraries=("aiokafka",),
        alias="KafkaHandler",
        options=_names(KafkaProducerOptions, KafkaConsumerOptions),
        send_options=_names(KafkaSendOptions),
        suggested_for=frozenset({"replay", "tombstones"}),
    ),
    BuiltIn(
        name=HTTP,
        schemes=("http", "https"),
        module="streamtools.drivers.http",
        producer="HTTPProducer",
        consumer="HTTPConsumer",
        no_admin="is a call, with no queues to look at: its senders keep their messages. For queues and an error "
        "queue choose sqlite://, asyncio:// or amqp://.",
        extra="http",
        libraries=("aiohttp",),
        alias="HTTPHandler",
        options=_names(HTTPProducerOptions, HTTPConsumerOptions),
        send_options=_names(HTTPSendOptions),
    ),
)

#: Protocols that are planned: they answer so, instead of as unknown.
PLANNED: Final = frozenset({"sqs", "redis", "nats"})
#: Names of older systems.
ALIASES: Final[Mapping[str, str]] = {p.alias: p.name for p in BUILT_IN if p.alias is not None} | {"SQSHandler": "sqs"}
#: URL scheme -> protocol name.
SCHEMES: Final[Mapping[str, str]] = {scheme: p.name for p in BUILT_IN for scheme in p.schemes}
#: The extra that brings a protocol's client library.
EXTRAS: Final[Mapping[str, str]] = {p.name: p.extra for p in BUILT_IN if p.extra is not None}
#: Client libraries by protocol.
LIBRARIES: Final[Mapping[str, tuple[str, ...]]] = {p.name: p.libraries for p in BUILT_IN}
#: Options of the built-in protocols' producers and consumers (constructor and decorator).
QUEUE_OPTIONS: Final[frozenset[str]] = frozenset().union(*(p.options for p in BUILT_IN))
#: Options of the built-in protocols' `send`.
SEND_OPTIONS: Final[frozenset[str]] = frozenset().union(*(p.send_options for p in BUILT_IN))
#: Protocols without an admin -> why.
NO_ADMIN: Final[Mapping[str, str]] = {p.name: p.no_admin for p in BUILT_IN if p.admin is None}

URL_VARIABLE: Final = "STREAMTOOLS_URL"
#: The embedded default: a file in the working directory.
DEFAULT_URL: Final = "sqlite:///streamtools.db"


def targets(face: Face) -> dict[str, str]:
    """Protocol name -> "module:Class" of its producer, consumer or admin."""
    classes = {p: getattr(p, face) for p in BUILT_IN}
    return {p.name: f"{p.module}:{name}" for p, name in classes.items() if name is not None}


def that_can(feature: str) -> str:
    """The URLs of the protocols that errors name for a feature, as in "kafka://"."""
    return ", ".join(f"{p.schemes[0]}://" for p in BUILT_IN if feature in p.suggested_for)


def default_url() -> str:
    """`STREAMTOOLS_URL`, or the embedded default."""
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL
