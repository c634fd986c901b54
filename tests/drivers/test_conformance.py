"""Every built-in driver keeps every promise."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from streamtools import Consumer
from streamtools.settings import KafkaSettings, RabbitMQSettings
from streamtools.testing import ConformanceSuite
from streamtools.testing.conformance import ConnectionCases
from streamtools.testing.conformance.failing import FailingCases
from streamtools.testing.conformance.foreign import ForeignCases, Letter
from streamtools.testing.conformance.handling import HandlingCases
from streamtools.testing.conformance.ordering import GroupCases, OrderingCases
from streamtools.testing.conformance.stage import Stage
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka import jars
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.configuration import PROTOCOLS, new_member
from tests.brokers.kafka.node import KafkaNode
from tests.brokers.processes import free_ports
from tests.conftest import IN_CI
from tests.drivers import foreign
from tests.faults.proxy import Proxy


class TestAsyncIO(ConformanceSuite):
    protocol = "asyncio"

    @pytest.fixture
    def url(self) -> str:
        return "asyncio://"

    foreign = foreign.ASYNCIO

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        producer = await stage.producer()
        await producer.send_messages([foreign.message_of(stage.queue, letter) for letter in letters])
        return ()


class TestSQLite(ConformanceSuite):
    protocol = "sqlite"

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/queues.db"

    @pytest.fixture
    def kill_url(self, url: str) -> str:
        return f"{url}?lease=1"

    foreign = foreign.SQLITE

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        path = str(stage.url).removeprefix("sqlite://")
        return await asyncio.to_thread(foreign.insert_into_sqlite, path, stage.queue, letters)

    async def look_at_foreign(self, stage: Stage, queue: str) -> None:
        await foreign.type_commands(str(stage.url), queue)


class TestHTTP(ConformanceSuite):
    protocol = "http"

    @pytest.fixture
    def url(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            return f"http://127.0.0.1:{free.getsockname()[1]}"

    foreign = foreign.HTTP

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        return await foreign.post_to_http(str(stage.url), stage.queue, letters)


class TestRabbitMQ(ConformanceSuite):
    protocol = "rabbitmq"

    @pytest.fixture
    def url(self, rabbitmq_vhost: RabbitMQAddress) -> RabbitMQSettings:
        return RabbitMQSettings.from_url(f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}")

    @pytest.fixture
    def kill_url(self, rabbitmq_vhost: RabbitMQAddress) -> str:
        return rabbitmq_vhost.url

    foreign = foreign.RABBITMQ

    @pytest.fixture(autouse=True)
    def _addresses(self, rabbitmq_vhost: RabbitMQAddress) -> None:
        self._amqp = rabbitmq_vhost.url
        self._whole = f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}"

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        return await foreign.publish_to_rabbitmq(self._amqp, stage.queue, letters)

    async def look_at_foreign(self, stage: Stage, queue: str) -> None:
        await foreign.type_commands(self._whole, queue)


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


class ForeignRecords(ForeignCases):
    """Records that another program produces."""

    foreign = foreign.KAFKA

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        return await foreign.publish_to_kafka(urlsplit(str(stage.url)).netloc, stage.queue, letters)

    async def look_at_foreign(self, stage: Stage, queue: str) -> None:
        await foreign.type_commands(str(stage.url), queue)


@pytest.mark.real_kafka("making topics, groups that are shared out")
class TestKafka(ForeignRecords, ConformanceSuite):
    protocol = "kafka"

    @pytest.fixture
    def url(self, kafka: KafkaAddress) -> str:
        return kafka.url

    @pytest.fixture
    def kill_url(self, url: str) -> str:
        return f"{url}?session_timeout=3"


class ExactlyOnce(Stage):
    """Its consumers settle in transactions, where they settle after the handler."""

    def new_consumer(self, queue: str | None = None, **options: Any) -> Consumer:
        return super().new_consumer(queue, **{"exactly_once": options.get("ack") != "on_receive", **options})


@pytest.mark.slow
@pytest.mark.real_kafka("transactions")
class TestKafkaExactlyOnce(ForeignRecords, HandlingCases, FailingCases, OrderingCases, GroupCases):
    protocol = "kafka"

    @pytest.fixture
    async def stage(self, kafka: KafkaAddress, queue: str) -> AsyncIterator[Stage]:
        stage = ExactlyOnce(self.protocol, kafka.url, queue)
        yield stage
        await stage.close()


class ProxiedKafka(KafkaNode):
    """A node that tells its clients to come through a proxy."""

    def __init__(self) -> None:
        member = new_member(1)
        #: Where the proxy is to listen.
        self.proxy_port = free_ports(1)[0]
        places = {name: member.at(name) for name in PROTOCOLS if name != "CONTROLLER"}
        places["PLAINTEXT"] = f"127.0.0.1:{self.proxy_port}"
        told = ",".join(f"{name}://{place}" for name, place in places.items())
        super().__init__(member=member, config={"advertised.listeners": told})

    def serves(self) -> list[int]:
        return [self.port if port == self.proxy_port else port for port in super().serves()]


@pytest.fixture(scope="module")
def proxied_kafka() -> Iterator[ProxiedKafka]:
    if not (IN_CI or jars.is_installed()):
        pytest.skip("what Kafka needs is not installed. Type: scripts/brokers up")
    with ProxiedKafka() as node:
        yield node


class TestKafkaCut(ConnectionCases):
    protocol = "kafka"

    @pytest.fixture
    async def proxy(self, proxied_kafka: ProxiedKafka) -> AsyncIterator[Proxy]:
        proxy = Proxy("127.0.0.1", proxied_kafka.port)
        proxy.port = proxied_kafka.proxy_port
        async with proxy:
            yield proxy

    @pytest.fixture
    def url(self, proxy: Proxy) -> KafkaSettings:
        return KafkaSettings(host="127.0.0.1", port=proxy.port, session_timeout=3)

    @pytest.fixture(params=["cut", "reset"])
    def cut(self, proxy: Proxy, request: pytest.FixtureRequest) -> Callable[[], Awaitable[None]]:
        fault: Callable[[], Awaitable[None]] = getattr(proxy, request.param)
        return fault
