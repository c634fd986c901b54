"""Every built-in driver keeps every promise."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from streamtools.settings import RabbitMQSettings
from streamtools.testing import ConformanceSuite
from streamtools.testing.conformance import ConnectionCases
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.faults.proxy import Proxy


class TestAsyncIO(ConformanceSuite):
    protocol = "asyncio"

    @pytest.fixture
    def url(self) -> str:
        return "asyncio://"


class TestSQLite(ConformanceSuite):
    protocol = "sqlite"

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/queues.db"


class TestHTTP(ConformanceSuite):
    protocol = "http"

    @pytest.fixture
    def url(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            return f"http://127.0.0.1:{free.getsockname()[1]}"


class TestRabbitMQ(ConformanceSuite):
    protocol = "rabbitmq"

    @pytest.fixture
    def url(self, rabbitmq_vhost: RabbitMQAddress) -> RabbitMQSettings:
        return RabbitMQSettings.from_url(f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}")


class TestRabbitMQCut(ConnectionCases):
    protocol = "rabbitmq"

    @pytest.fixture
    async def proxy(self, rabbitmq_vhost: RabbitMQAddress) -> AsyncIterator[Proxy]:
        address = urlsplit(rabbitmq_vhost.url)
        async with Proxy(address.hostname or "", address.port or 5672) as proxy:
            yield proxy

    @pytest.fixture
    def url(self, rabbitmq_vhost: RabbitMQAddress, proxy: Proxy) -> str:
        return rabbitmq_vhost.url.replace(f":{proxy.target[1]}/", f":{proxy.port}/")

    @pytest.fixture(params=["cut", "reset"])
    def cut(self, proxy: Proxy, request: pytest.FixtureRequest) -> Callable[[], Awaitable[None]]:
        fault: Callable[[], Awaitable[None]] = getattr(proxy, request.param)
        return fault


@pytest.mark.real_kafka("making topics, groups that are shared out")
class TestKafka(ConformanceSuite):
    protocol = "kafka"

    @pytest.fixture
    def url(self, kafka: KafkaAddress) -> str:
        return kafka.url
