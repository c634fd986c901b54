"""`verify=false`: said once for each address of a process, loudly; and never advised."""

from __future__ import annotations

import ast
import logging
import re
import socket
import ssl
from pathlib import Path
from typing import Any

import aiokafka.errors
import aiormq.exceptions
import pytest

from streamtools import ConfigurationError, Consumer, Producer
from streamtools.drivers.http import HTTPProducer
from streamtools.drivers.kafka import errors as kafka_errors
from streamtools.drivers.rabbitmq import errors as rabbitmq_errors
from streamtools.engine import tls
from streamtools.engine.tls import client_context, warn_unverified
from streamtools.settings import HTTPSettings, KafkaSettings, RabbitMQSettings
from tests.brokers.processes import free_ports

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_unverified", set())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "NOT CHECKED" in r.getMessage()
    ]


def test_each_address_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        warn_unverified(RabbitMQSettings(verify=False), ("a", 1), ("b", 2))
    warn_unverified(KafkaSettings(verify=False), ("a", 1), ("a", 2))
    assert [re.findall(r"OF (\S+) IS", line)[0] for line in warnings(caplog)] == ["a:1", "b:2", "a:2"]
    warn_unverified(RabbitMQSettings(), ("c", 1))
    assert len(warnings(caplog)) == 3


@pytest.mark.parametrize("scheme", ["amqps", "kafkas"])
async def test_what_connects_unverified_says_so_once(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    port = free_ports(1)[0]
    url = f"{scheme}://shop:hunter2@127.0.0.1:{port}?verify=false&connect_timeout=0.3"
    for made in (Producer("orders", url=url, send_timeout=0.5), Consumer("orders", url=url, connect_timeout=0.5)):
        with pytest.raises(Exception, match=str(port)):  # noqa: PT011
            async with made:
                pass
    (line,) = warnings(caplog)
    assert f"127.0.0.1:{port}" in line and "hunter2" not in caplog.text


async def test_an_http_producer_says_it_for_its_address_and_for_other_endpoints(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port, other = free_ports(2)
    async with HTTPProducer("orders", url=f"https://127.0.0.1:{port}?verify=off", send_timeout=0.5) as producer:
        for endpoint in (None, f"https://127.0.0.1:{other}/x", f"https://127.0.0.1:{other}/y", "http://127.0.0.1:9/"):
            with pytest.raises(Exception, match="127"):  # noqa: PT011
                await producer.send("x", **({} if endpoint is None else {"endpoint": endpoint}))
    assert [re.findall(r"OF (\S+) IS", line)[0] for line in warnings(caplog)] == [
        f"127.0.0.1:{port}",
        f"127.0.0.1:{other}",
    ]


@pytest.mark.parametrize("url", ["amqp://127.0.0.1:9?verify=false", "kafka://127.0.0.1:9?verify=false"])
async def test_without_tls_there_is_nothing_to_warn_of(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Exception, match="9"):  # noqa: PT011
        async with Producer("orders", url=f"{url}&connect_timeout=0.2", send_timeout=0.5):
            pass
    assert not warnings(caplog)


async def test_a_context_checks_unless_told_otherwise() -> None:
    context = await client_context(HTTPSettings())
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert (await client_context(HTTPSettings(verify=False))).verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize("field", ["cafile", "certfile"])
@pytest.mark.parametrize("kind", [RabbitMQSettings, KafkaSettings, HTTPSettings])
@pytest.mark.parametrize("path", ["/no/such.pem", __file__])
async def test_a_file_that_is_none_is_named(kind: Any, field: str, path: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{field}='{re.escape(path)}'.*PEM"):
        await client_context(kind(**{field: path}))


def tls_error(kind: type[ssl.SSLError], reason: str) -> ssl.SSLError:
    error = kind(1, reason)
    error.reason = reason
    if isinstance(error, ssl.SSLCertVerificationError):
        error.verify_message = "self-signed certificate"
    return error


#: What may happen while a TLS connection is made.
FAILURES = [
    tls_error(ssl.SSLCertVerificationError, "CERTIFICATE_VERIFY_FAILED"),
    tls_error(ssl.SSLError, "WRONG_VERSION_NUMBER"),
    tls_error(ssl.SSLError, "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
    ConnectionResetError("reset"),
    ConnectionRefusedError(111, "refused"),
    TimeoutError(),
    OSError("gone"),
    socket.gaierror(-2, "unknown"),
    aiokafka.errors.KafkaConnectionError("closed"),
    aiokafka.errors.AuthenticationFailedError("no"),
    aiormq.exceptions.AMQPConnectionError("ended"),
    aiormq.exceptions.ProbableAuthenticationError("no"),
    EOFError(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_no_hint_for_a_broker_over_tls_names_a_url_without_it(failure: Exception) -> None:
    texts = [
        str(kafka_errors.connect_error(failure, KafkaSettings(tls=True), "h:1")),
        str(rabbitmq_errors.connect_error(failure, RabbitMQSettings(tls=True), "h:1", "")),
    ]
    for text in texts:
        assert not re.search(r"\b(amqp|kafka|http)://", text)
        assert not re.search(ADVICE, text, re.I)


#: Words that would talk somebody out of TLS or its checks.
ADVICE = r"verify ?= ?\W?(false|no|off|0)|CERT_NONE|without TLS|turn\w* (it |TLS |\w+ )?off|write (amqp|kafka|http)://(?!host:15672)"


def test_no_text_of_ours_advises_to_leave_tls_or_its_checks() -> None:
    code = sorted((ROOT / "streamtools").rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in code
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(ADVICE, node.value, re.I)
    ]
    # The first says what the option means, and how to do without it.
    allowed = {"streamtools/engine/tls.py"}
    assert [line for line in found if line.partition(":")[0] not in allowed] == []
