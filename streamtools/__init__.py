"""An asyncio-native toolkit of producers and consumers: one service, any message broker.

Importing it loads nothing: each public name is loaded with its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from streamtools.admin import ADMINS, QueueAdmin
    from streamtools.built_in import CONSUMER_LOOPS, PRODUCERS
    from streamtools.bus import Bus, Command, Event, MessageContext
    from streamtools.codec import register_codec
    from streamtools.compat.handlers import HandleMsgs, HandlerFactory
    from streamtools.consumer import BoundHandler, Consumer
    from streamtools.delivery import Delivery
    from streamtools.errors import (
        Closed,
        ConfigurationError,
        ConnectError,
        ConnectionLost,
        DecodeError,
        Drop,
        FeatureError,
        HandlerError,
        OptionError,
        QueueError,
        Reject,
        RemoteError,
        RequestTimeout,
        ResponseError,
        RetryLater,
        SendError,
        StreamToolsError,
        UnknownProtocol,
    )
    from streamtools.exchange import Binding, Exchange
    from streamtools.features import Features
    from streamtools.message import ErrorDetails, Message
    from streamtools.producer import Producer
    from streamtools.protocols import ASYNCIO, HTTP, KAFKA, RABBITMQ, SQLITE
    from streamtools.queues import GroupInfo, PartitionInfo, QueueInfo, QueueSettings
    from streamtools.receipt import Receipt
    from streamtools.retry import Retry
    from streamtools.routing import ConsumerFactory
    from streamtools.runner import ConsumerRunner
    from streamtools.settings import AsyncIOSettings, HTTPSettings, KafkaSettings, RabbitMQSettings, SQLiteSettings
    from streamtools.types import Handler, Middleware
    from streamtools.validation.bodies import set_body_limits
    from streamtools.verdicts import Verdict

__all__ = [
    "ADMINS",
    "ASYNCIO",
    "CONSUMER_LOOPS",
    "HTTP",
    "KAFKA",
    "PRODUCERS",
    "RABBITMQ",
    "SQLITE",
    "AsyncIOSettings",
    "Binding",
    "BoundHandler",
    "Bus",
    "Closed",
    "Command",
    "ConfigurationError",
    "ConnectError",
    "ConnectionLost",
    "Consumer",
    "ConsumerFactory",
    "ConsumerRunner",
    "DecodeError",
    "Delivery",
    "Drop",
    "ErrorDetails",
    "Event",
    "Exchange",
    "FeatureError",
    "Features",
    "GroupInfo",
    "HTTPSettings",
    "HandleMsgs",
    "Handler",
    "HandlerError",
    "HandlerFactory",
    "KafkaSettings",
    "Message",
    "MessageContext",
    "Middleware",
    "OptionError",
    "PartitionInfo",
    "Producer",
    "QueueAdmin",
    "QueueError",
    "QueueInfo",
    "QueueSettings",
    "RabbitMQSettings",
    "Receipt",
    "Reject",
    "RemoteError",
    "RequestTimeout",
    "ResponseError",
    "Retry",
    "RetryLater",
    "SQLiteSettings",
    "SendError",
    "StreamToolsError",
    "UnknownProtocol",
    "Verdict",
    "register_codec",
    "set_body_limits",
]

#: The module of each public name.
_HOMES: Final = {
    "ADMINS": "admin",
    "QueueAdmin": "admin",
    "Bus": "bus",
    "Command": "bus",
    "Event": "bus",
    "MessageContext": "bus",
    "QueueInfo": "queues",
    "QueueSettings": "queues",
    "GroupInfo": "queues",
    "PartitionInfo": "queues",
    "BoundHandler": "consumer",
    "CONSUMER_LOOPS": "consumer",
    "register_codec": "codec",
    "set_body_limits": "validation.bodies",
    "Consumer": "consumer",
    "Delivery": "delivery",
    "Closed": "errors",
    "ConfigurationError": "errors",
    "ConnectError": "errors",
    "ConnectionLost": "errors",
    "DecodeError": "errors",
    "RemoteError": "errors",
    "RequestTimeout": "errors",
    "Drop": "errors",
    "FeatureError": "errors",
    "HandlerError": "errors",
    "OptionError": "errors",
    "QueueError": "errors",
    "Reject": "errors",
    "ResponseError": "errors",
    "RetryLater": "errors",
    "SendError": "errors",
    "StreamToolsError": "errors",
    "UnknownProtocol": "errors",
    "Features": "features",
    "HandleMsgs": "compat.handlers",
    "HandlerFactory": "compat.handlers",
    "Binding": "exchange",
    "Exchange": "exchange",
    "ErrorDetails": "message",
    "Message": "message",
    "Retry": "retry",
    "PRODUCERS": "producer",
    "Producer": "producer",
    "Receipt": "receipt",
    "ASYNCIO": "protocols",
    "HTTP": "protocols",
    "KAFKA": "protocols",
    "RABBITMQ": "protocols",
    "SQLITE": "protocols",
    "ConsumerFactory": "routing",
    "ConsumerRunner": "runner",
    "AsyncIOSettings": "settings",
    "HTTPSettings": "settings",
    "KafkaSettings": "settings",
    "RabbitMQSettings": "settings",
    "SQLiteSettings": "settings",
    "Handler": "types",
    "Middleware": "types",
    "Verdict": "verdicts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
