"""A request that the library lacks; its format is that of kafka.apache.org/protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int8, Int16, Int32, Schema, String

#: The kind of what is configured: a topic.
TOPIC: Final = 2
#: The operation on a setting.
SET: Final = 0

_KEY: Final = 44
_TEXT: Final = String("utf-8")


def alter_configs(topic: str, settings: Mapping[str, str]) -> Any:
    """Change some of a topic's settings and, unlike AlterConfigs, no others (KIP-339, Kafka 2.3)."""
    return _Request([(TOPIC, topic, [(name, SET, value) for name, value in settings.items()])])


class _Response_v0(Response):  # type: ignore[misc]
    API_KEY = _KEY
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "responses",
            Array(("error_code", Int16), ("error_message", _TEXT), ("resource_type", Int8), ("resource_name", _TEXT)),
        ),
    )


class _Request_v0(RequestStruct):  # type: ignore[misc]
    API_KEY = _KEY
    API_VERSION = 0
    RESPONSE_TYPE = _Response_v0
    SCHEMA = Schema(
        (
            "resources",
            Array(
                ("resource_type", Int8),
                ("resource_name", _TEXT),
                ("configs", Array(("name", _TEXT), ("config_operation", Int8), ("value", _TEXT))),
            ),
        ),
        ("validate_only", Boolean),
    )


class _Request(Request[_Request_v0]):  # type: ignore[misc]
    API_KEY = _KEY

    def __init__(self, resources: Any) -> None:
        self._resources = resources

    def build(self, request_struct_class: Any) -> Any:
        return request_struct_class(self._resources, False)
