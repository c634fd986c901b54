"""Options that only Kafka's producers and consumers take."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

from pydantic import Field, field_validator

from streamtools.driver import Options
from streamtools.drivers.kafka.names import check_kafka_name
from streamtools.options import KafkaConsumerOptions, KafkaProducerOptions, KafkaSendOptions
from streamtools.parameters import ConsumerParameters, ProducerParameters, SendManyParameters, SendParameters


def is_async(method: str | None) -> bool | None:
    """Whether `method` says not to wait; None for a method of another protocol (`method="POST"`)."""
    return {"sync": False, "async": True}.get(method or "")


class ProducerOptions(Options):
    """Further options of a Kafka producer.

    Attributes:
        partitions: of the topic if it is made; `KAFKA_PARTITIONS`, else the broker's default, when None.
        replication: copies of each partition; `KAFKA_REPLICATION`, else the broker's default, when None.
        method: "sync" confirms each send; "async" is `wait=False` on every send.
    """

    partitions: Annotated[int | None, Field(ge=1)] = None
    replication: Annotated[int | None, Field(ge=1)] = None
    method: str = "sync"


class SendOptions(Options):
    """Further options of one send to Kafka.

    Attributes:
        partition: the partition it goes to; when None, that of its key, or any.
        timestamp: the record's, in seconds since the epoch; now when None.
        wait: False returns at once with a receipt that can be awaited.
        method: "sync" is `wait=True`, "async" is `wait=False`.
    """

    partition: Annotated[int | None, Field(ge=0)] = None
    timestamp: Annotated[float | None, Field(ge=0)] = None
    wait: bool | None = None
    method: str | None = None

    @field_validator("timestamp")
    @classmethod
    def _is_seconds(cls, value: float | None) -> float | None:
        if value is not None and value > 1e11:
            raise ValueError("in seconds since the epoch, not in milliseconds")
        return value


class ConsumerOptions(Options):
    """Further options of a Kafka consumer.

    Attributes:
        partitions: of the topic if it is made; `KAFKA_PARTITIONS`, else the broker's default, when None.
        replication: copies of each partition; `KAFKA_REPLICATION`, else the broker's default, when None.
        consumer_group: the same as `group`.
        auto_ack: True is `ack="on_receive"`.
        static_id: this consumer's own name in its group. With it, the consumer keeps its partitions over a restart
            within `KafkaSettings.session_timeout`, and the group does not rebalance.
        topics: further topics, which the same handler consumes.
        pattern: a regular expression; topics whose whole name matches are consumed too. A topic that is made later
            is found within half a minute. Retry topics and the error queue are left out.
        start_offset: a new group begins at this offset of each partition.
        start_time: a new group begins with messages written then or later, in seconds since the epoch.
        revoke_timeout: seconds for handlers at work when the group assigns its partitions anew.
        exactly_once: what a handler sends with a KafkaProducer is sent together with the acknowledgement, in one
            transaction: a message has its effects on Kafka exactly once, whatever process dies.
    """

    partitions: Annotated[int | None, Field(ge=1)] = None
    replication: Annotated[int | None, Field(ge=1)] = None
    consumer_group: str | None = None
    auto_ack: bool = False
    static_id: str | None = None
    topics: tuple[str, ...] = ()
    pattern: str | None = None
    start_offset: Annotated[int | None, Field(ge=0)] = None
    start_time: float | datetime | None = None
    revoke_timeout: Annotated[float, Field(ge=0)] = 30.0
    exactly_once: bool = False

    @field_validator("topics")
    @classmethod
    def _are_topics(cls, topics: tuple[str, ...]) -> tuple[str, ...]:
        for topic in topics:
            check_kafka_name(topic)
        return topics

    @field_validator("pattern")
    @classmethod
    def _is_expression(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return pattern

    @field_validator("static_id")
    @classmethod
    def _is_name(cls, static_id: str | None) -> str | None:
        if static_id is not None:
            check_kafka_name(static_id, "static_id")  # a group.instance.id follows the rules of topic names
        return static_id

    @property
    def start(self) -> float | None:
        """`start_time` in seconds since the epoch."""
        return self.start_time.timestamp() if isinstance(self.start_time, datetime) else self.start_time


class KafkaProducerParameters(ProducerParameters, KafkaProducerOptions, total=False):
    """What the constructor of a producer takes by keyword."""


class KafkaConsumerParameters(ConsumerParameters, KafkaConsumerOptions, total=False):
    """What the constructor of a consumer takes by keyword."""


class KafkaSendParameters(SendParameters, KafkaSendOptions, total=False):
    """What `send` takes by keyword."""


class KafkaSendManyParameters(SendManyParameters, KafkaSendOptions, total=False):
    """What `send_many` takes by keyword."""
