"""An asyncio-native toolkit of producers and consumers: one service, any message broker."""

from typing import TYPE_CHECKING, Any

from streamtools.admin import ADMINS, QueueAdmin, QueueInfo
from streamtools.consumer import CONSUMER_LOOPS, BoundHandler, Consumer
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
    QueueError,
    Reject,
    ResponseError,
    RetryLater,
    SendError,
    StreamToolsError,
    UnknownProtocol,
)
from streamtools.features import Features
from streamtools.handlers import HandleMsgs, HandlerFactory
from streamtools.message import ErrorDetails, Message
from streamtools.policy import Retry
from streamtools.producer import PRODUCERS, Producer, Receipt
from streamtools.registry import ASYNCIO, HTTP, KAFKA, RABBITMQ, SQLITE
from streamtools.routing import ConsumerFactory
from streamtools.runner import ConsumerRunner
from streamtools.types import Handler, Middleware
from streamtools.verdicts import Verdict

if TYPE_CHECKING:
    from streamtools.settings import AsyncIOSettings, HTTPSettings, RabbitMQSettings, SQLiteSettings

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
    "BoundHandler",
    "Closed",
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
    "FeatureError",
    "Features",
    "HTTPSettings",
    "HandleMsgs",
    "Handler",
    "HandlerError",
    "HandlerFactory",
    "Message",
    "Middleware",
    "Producer",
    "QueueAdmin",
    "QueueError",
    "QueueInfo",
    "RabbitMQSettings",
    "Receipt",
    "Reject",
    "ResponseError",
    "Retry",
    "RetryLater",
    "SQLiteSettings",
    "SendError",
    "StreamToolsError",
    "UnknownProtocol",
    "Verdict",
]

#: Loaded when first used: pydantic-settings is a third of the import time.
_SETTINGS = frozenset({"AsyncIOSettings", "HTTPSettings", "RabbitMQSettings", "SQLiteSettings"})


def __getattr__(name: str) -> Any:
    if name in _SETTINGS:
        from streamtools import settings  # noqa: PLC0415

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
