"""Connecting: TLS, names, several hosts, refusals, and silence."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

import pytest

from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.errors import connect_error
from streamtools.errors import ConfigurationError, ConnectError
from streamtools.settings import RabbitMQSettings
from tests.brokers.address import RabbitMQAddress
from tests.brokers.processes import free_ports
from tests.drivers.rabbitmq.conftest import take
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until


def _parts(address: RabbitMQAddress) -> RabbitMQSettings:
    return RabbitMQSettings.from_url(address.url)


async def _fails(url: str | RabbitMQSettings) -> ConnectError:
    producer = RabbitMQProducer("orders", url=url, send_timeout=1)
    with pytest.raises(ConnectError) as caught:
        await producer.open()
    await producer.close()
    return caught.value


async def test_tls_with_an_authority_and_a_client_certificate(rabbitmq_vhost: RabbitMQAddress) -> None:
    address = rabbitmq_vhost
    url = f"{address.tls_url}?cafile={address.ca}&certfile={address.cert}&keyfile={address.key}"
    async with RabbitMQProducer("orders", url=url) as producer, RabbitMQConsumer("orders", url=url) as consumer:
        await producer.send(b"x" * 300_000)
        assert len((await take(consumer, 1))[0].message.body) == 300_000


async def test_a_certificate_that_cannot_be_verified_is_refused_for_good(rabbitmq_vhost: RabbitMQAddress) -> None:
    error = await _fails(str(rabbitmq_vhost.tls_url))

    assert error.permanent
    assert "certificate" in str(error)
    assert "cafile" in str(error)


async def test_a_broker_that_wants_a_client_certificate_gets_it_or_says_so(strict_rabbitmq: RabbitMQAddress) -> None:
    address = strict_rabbitmq
    error = await _fails(f"{address.tls_url}?cafile={address.ca}")
    async with RabbitMQProducer(
        "orders", url=f"{address.tls_url}?cafile={address.ca}&certfile={address.cert}&keyfile={address.key}"
    ) as producer:
        await producer.send(b"x")

    assert error.permanent
    assert "certfile= and keyfile=" in str(error)


async def test_tls_to_a_plain_port_says_so(rabbitmq_vhost: RabbitMQAddress) -> None:
    error = await _fails(rabbitmq_vhost.url.replace("amqp://", "amqps://"))

    assert "TLS" in str(error)


async def test_a_missing_certificate_file_is_named(rabbitmq_vhost: RabbitMQAddress, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing.pem"):
        await RabbitMQProducer("orders", url=f"{rabbitmq_vhost.tls_url}?cafile={tmp_path}/nothing.pem").open()


async def test_a_wrong_password_is_refused_for_good_and_never_shown(
    rabbitmq_vhost: RabbitMQAddress, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _parts(rabbitmq_vhost)
    url = f"amqp://guest:s3cr%2Ft@{settings.host}/{settings.vhost}"

    error = await _fails(url)

    assert error.permanent
    assert "'guest'" in str(error)
    assert error.__cause__ is not None
    for text in (str(error), repr(error), caplog.text, repr(error.__cause__)):
        assert "s3cr" not in text


async def test_a_lost_connection_is_no_line_of_the_library(
    rabbitmq_vhost: RabbitMQAddress, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _parts(rabbitmq_vhost)
    async with Proxy(*settings.addresses[0]) as proxy:
        url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/{settings.vhost}"
        async with RabbitMQConsumer("orders", url=url) as consumer:
            assert consumer._subscription is not None
            library = consumer._subscription.channel.connection.client._library
            assert library is not None
            with pytest.raises(ConnectError):
                await asyncio.gather(consumer._receive(1), proxy.reset())
            await wait_until(lambda: library.is_closed)
    assert not [record for record in caplog.records if record.name.startswith("aiormq") or record.exc_info]


async def test_a_missing_virtual_host_is_refused_for_good(rabbitmq: RabbitMQAddress) -> None:
    error = await _fails(f"{rabbitmq.in_vhost('nowhere').url}")

    assert error.permanent
    assert "no virtual host 'nowhere'" in str(error)


async def test_a_user_without_permission_is_told_the_command(rabbitmq: RabbitMQAddress) -> None:
    rabbitmq.manage("PUT", "vhosts/forbidden", {})
    rabbitmq.manage("DELETE", "permissions/forbidden/guest")
    try:
        error = await _fails(rabbitmq.in_vhost("forbidden").url)
    finally:
        rabbitmq.manage("DELETE", "vhosts/forbidden")

    assert error.permanent
    assert "set_permissions" in str(error)


@pytest.mark.parametrize("vhost", ["a/b", "ünï c%de", "x.y"])
async def test_odd_virtual_hosts_and_passwords_work(rabbitmq: RabbitMQAddress, vhost: str) -> None:
    from tests.brokers.rabbitmq import add_vhost  # noqa: PLC0415

    add_vhost(rabbitmq, vhost)
    password = "p@ss/w:%#?ü"
    user = f"odd-{secrets.token_hex(4)}"
    rabbitmq.manage("PUT", f"users/{user}", {"password": password, "tags": ""})
    from urllib.parse import quote  # noqa: PLC0415

    name = quote(vhost, safe="")
    rabbitmq.manage("PUT", f"permissions/{name}/{user}", {"configure": ".*", "write": ".*", "read": ".*"})
    settings = RabbitMQSettings(host=_parts(rabbitmq).host, username=user, password=password, vhost=vhost)
    try:
        async with RabbitMQProducer("orders", url=settings) as producer:
            await producer.send(b"x")
    finally:
        rabbitmq.manage("DELETE", f"vhosts/{name}")
        rabbitmq.manage("DELETE", f"users/{user}")


async def test_hosts_are_tried_in_turn(rabbitmq_vhost: RabbitMQAddress) -> None:
    settings = _parts(rabbitmq_vhost)
    dead = free_ports(1)[0]
    url = f"amqp://guest:guest@127.0.0.1:{dead},{settings.host}/{settings.vhost}"

    async with RabbitMQProducer("orders", url=url) as producer:
        await producer.send(b"x")


async def test_when_none_answers_each_is_named(rabbitmq_vhost: RabbitMQAddress) -> None:
    one, two = free_ports(2)

    error = await _fails(f"amqp://127.0.0.1:{one},127.0.0.1:{two}")

    assert not error.permanent
    assert f":{one}" in str(error)
    assert f":{two}" in str(error)


async def test_a_port_that_speaks_something_else_fails_in_time() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.org ESMTP\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    error = await _fails(RabbitMQSettings(host=f"127.0.0.1:{port}", connect_timeout=2))

    assert f":{port}" in str(error)
    server.close()


async def test_a_connection_that_hangs_is_given_up_after_two_heartbeats(rabbitmq_vhost: RabbitMQAddress) -> None:
    settings = _parts(rabbitmq_vhost)
    host, port = settings.addresses[0]
    async with Proxy(host, port) as proxy:
        url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/{settings.vhost}?heartbeat=1"
        async with RabbitMQConsumer("orders", url=url) as consumer:
            proxy.hang()
            begin = time.monotonic()
            with pytest.raises(ConnectError, match="nothing was received"):
                await consumer._receive(1)
            assert 1.5 < time.monotonic() - begin < 20

            begin = time.monotonic()
            await consumer.close()
            assert time.monotonic() - begin < 20


def test_a_circle_of_causes_is_walked_once() -> None:
    first, second = OSError("first"), RuntimeError("second")
    first.__context__, second.__context__ = second, first

    error = connect_error(first, RabbitMQSettings(), "localhost:5672", "")

    assert "localhost:5672" in str(error)
