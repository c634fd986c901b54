"""Every built-in driver keeps every promise."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from streamtools.testing import ConformanceSuite
from tests.brokers.address import RabbitMQAddress


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
    def url(self, rabbitmq_vhost: RabbitMQAddress) -> str:
        return rabbitmq_vhost.url
