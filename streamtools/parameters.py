"""What producers, consumers and sends take by keyword, as types for type checkers and editors.

The parameters themselves stand in `Producer`, `Consumer` and `Producer.send`. These types hold them again for whoever
passes parameters on: drivers, factories and the bus. A test compares both.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypedDict

from streamtools.engine.loop import Ack
from streamtools.exchange import Binding
from streamtools.options import AnyConsumerOptions, HTTPConsumerOptions, KafkaConsumerOptions, RabbitMQFactoryOptions
from streamtools.retry import Retry
from streamtools.types import Middleware
from streamtools.validation.checks import Declare, Seconds

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

OrderedBy = Literal["queue", "partition", "key"]


class SendManyParameters(TypedDict, total=False):
    """Of `Producer.send_many`, without the protocol's own options."""

    headers: Mapping[str, str] | None
    key: str | bytes | None
    type: str | None
    delay: Seconds | None
    ttl: Seconds | None
    correlation_id: str | None
    reply_to: str | None


class SendParameters(SendManyParameters, total=False):
    """Of `Producer.send`, without the protocol's own options."""

    id: str | None
    tombstone: bool


class _Address(TypedDict, total=False):
    host: str | None
    port: int | None


class ProducerParameters(_Address, total=False):
    """Of `Producer`, without the protocol's own options."""

    url: "str | ProtocolSettings | None"
    declare: Declare
    send_timeout: Seconds
    client_id: str | None
    outbox: bool


class _Receiving(TypedDict, total=False):
    concurrency: int
    prefetch: int | None
    error_queue: str
    max_deliveries: int
    ack: Ack
    ordered_by: OrderedBy | None
    group: str | None
    offset: Literal["earliest", "latest"]
    bindings: Iterable[Binding]
    declare: Declare
    connect_timeout: Seconds
    middleware: Iterable[Middleware]


class _Handling(_Receiving, total=False):
    retry: Retry | None
    client_id: str | None


class ConsumerParameters(_Handling, _Address, total=False):
    """Of `Consumer`, without the protocol's own options."""

    url: "str | ProtocolSettings | None"


class FactoryParameters(_Handling, RabbitMQFactoryOptions, KafkaConsumerOptions, HTTPConsumerOptions, total=False):
    """Further parameters of `ConsumerFactory`: of its consumers."""


class RouteParameters(_Handling, _Address, AnyConsumerOptions, total=False):
    """Parameters of one route: of its consumer."""


class BusParameters(_Receiving, _Address, AnyConsumerOptions, total=False):
    """Further parameters of `Bus`: of the consumer of its queue."""
