"""The options of the built-in protocols and their types: one list, for run time and for type checkers.

At run time `protocols` takes the names from here; signatures take the types. The classes in `options.py` of each
driver declare the same options, say what they mean, and check their values.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, TypedDict


class RabbitMQFactoryOptions(TypedDict, total=False):
    """Options of RabbitMQ's producers, consumers and factories; a new one stands here.

    `queue_type` does not: to a factory it is the protocol.
    """

    durable: bool
    exclusive: bool
    auto_delete: bool
    arguments: Mapping[str, Any] | None
    error_arguments: Mapping[str, Any] | None
    error_declare: bool | Literal["passive"] | None


class _QueueOptions(RabbitMQFactoryOptions, total=False):
    queue_type: Literal["quorum", "classic"] | None


class _TopicOptions(TypedDict, total=False):
    partitions: int | None
    replication: int | None


class _Method(TypedDict, total=False):
    method: str


class RabbitMQProducerOptions(_QueueOptions, total=False):
    """Options of RabbitMQ's producers."""

    error_queue: str


class RabbitMQConsumerOptions(_QueueOptions, total=False):
    """Options of RabbitMQ's consumers."""


class KafkaProducerOptions(_TopicOptions, _Method, total=False):
    """Options of Kafka's producers."""


class KafkaConsumerOptions(_TopicOptions, total=False):
    """Options of Kafka's consumers."""

    consumer_group: str | None
    auto_ack: bool
    static_id: str | None
    topics: tuple[str, ...] | list[str]
    pattern: str | None
    start_offset: int | None
    start_time: float | datetime | None
    revoke_timeout: float
    exactly_once: bool


class _SendMethod(TypedDict, total=False):
    method: str | None


class KafkaSendOptions(_SendMethod, total=False):
    """Options of one send to Kafka."""

    partition: int | None
    timestamp: float | None
    wait: bool | None


class HTTPProducerOptions(_Method, total=False):
    """Options of HTTP's producers."""


class HTTPConsumerOptions(_Method, total=False):
    """Options of HTTP's consumers."""

    max_body: int | None
    content_types: str | tuple[str, ...] | list[str] | None


class HTTPSendOptions(_SendMethod, total=False):
    """Options of one send over HTTP."""

    endpoint: str | None
    headers_tag: str | None
    header_tag: str | None


class AnyProducerOptions(RabbitMQProducerOptions, KafkaProducerOptions, HTTPProducerOptions, total=False):
    """Options of the producers of all built-in protocols."""


class AnyConsumerOptions(RabbitMQConsumerOptions, KafkaConsumerOptions, HTTPConsumerOptions, total=False):
    """Options of the consumers of all built-in protocols."""


class AnySendOptions(KafkaSendOptions, HTTPSendOptions, total=False):
    """Options of one send by all built-in protocols."""
