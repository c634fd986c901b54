"""Brokers by Docker Compose, where a Docker engine answers: the client alone is not enough."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.brokers.address import ROOT, RabbitMQAddress
from tests.brokers.certificates import make_certificates
from tests.brokers.handshake import shake_hands
from tests.brokers.kafka import configuration
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.handshake import live_brokers
from tests.brokers.processes import POLL, BrokerError, free_ports

#: Seconds for the engine to answer, and for the image to come and the broker to start.
ENGINE_TIMEOUT, UP_TIMEOUT, READY_TIMEOUT = 5.0, 600.0, 60.0
FILE = ROOT / "compose.yaml"
#: Inside the container.
KAFKA_BIN, KAFKA_CONFIG = "/opt/kafka/bin", "/streamtools/server.properties"
TLS_CONFIG = """\
listeners.ssl.1 = 5671
ssl_options.cacertfile = /certificates/ca.pem
ssl_options.certfile = /certificates/server.pem
ssl_options.keyfile = /certificates/server-key.pem
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = false
"""


def has_engine() -> bool:
    """Whether `docker info` reaches an engine and the compose plugin is there."""
    return bool(shutil.which("docker")) and _succeeds("docker", "info") and _succeeds("docker", "compose", "version")


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=ENGINE_TIMEOUT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def up_rabbitmq(directory: Path) -> RabbitMQAddress:
    """Start it on free ports with TLS; what it needs on disk goes into the directory."""
    certificates = make_certificates(directory / "certificates")
    port, tls_port, management_port = free_ports(3)
    config = directory / "tls.conf"
    config.write_text(TLS_CONFIG)
    volumes = [f"{certificates.ca.parent}:/certificates:ro", f"{config}:/etc/rabbitmq/conf.d/20-tls.conf:ro"]
    ports = {"PORT": port, "TLS_PORT": tls_port, "MANAGEMENT_PORT": management_port}
    _up(directory, "rabbitmq", {"volumes": volumes}, ports)
    address = RabbitMQAddress(
        url=f"amqp://guest:guest@127.0.0.1:{port}/%2F",
        tls_url=f"amqps://guest:guest@127.0.0.1:{tls_port}/%2F",
        management_url=f"http://guest:guest@127.0.0.1:{management_port}",
        ca=str(certificates.ca),
        cert=str(certificates.client_cert),
        key=str(certificates.client_key),
    )

    def look() -> None:
        shake_hands(address.url)
        address.manage("GET", "overview")

    _wait_ready("RabbitMQ", look)
    return address


def up_kafka(directory: Path) -> KafkaAddress:
    """Start it on free ports with TLS and SASL, configured as the nodes from Maven are."""
    certificates = make_certificates(directory / "certificates")
    member = configuration.new_member(1)
    files = directory / "kafka"
    files.mkdir(exist_ok=True)
    (files / "keystore.pem").write_text(configuration.keystore(certificates))
    (files / "ca.pem").write_text(certificates.ca.read_text())
    text = configuration.properties(
        member,
        [member],
        data="/tmp/kafka-logs",
        keystore="/streamtools/keystore.pem",
        truststore="/streamtools/ca.pem",
        listen_on="0.0.0.0",
    )
    (files / "server.properties").write_text(text)
    arguments = configuration.format_arguments(configuration.new_cluster_id(), KAFKA_CONFIG)
    prepare = f"{KAFKA_BIN}/kafka-storage.sh {shlex.join(arguments)}"
    script = f"{prepare} && exec {KAFKA_BIN}/kafka-server-start.sh {KAFKA_CONFIG}"
    published = [f"{member.at(name)}:{member.ports[name]}" for name in ("TLS", "SASL", "SASLTLS")]
    # Compose reads $ as the beginning of a variable; there is none in the script.
    service = {"command": ["bash", "-c", script], "volumes": [f"{files}:/streamtools:ro"], "ports": published}
    _up(directory, "kafka", service, {"PORT": member.ports["PLAINTEXT"]})
    _wait_ready("Kafka", lambda: live_brokers("127.0.0.1", member.ports["PLAINTEXT"]))
    return configuration.address_of([member], certificates)


def down(directory: Path, service: str) -> None:
    """End it and remove its volumes; safe to repeat."""
    _compose(directory, service, "rm", "--stop", "--force", "--volumes", service)


def _up(directory: Path, service: str, override: dict[str, Any], ports: dict[str, int]) -> None:
    # JSON is YAML too.
    _override(directory, service).write_text(json.dumps({"services": {service: override}}))
    prefix = f"STREAMTOOLS_TEST_{service.upper()}_"
    variables = {prefix + name: str(port) for name, port in ports.items()}
    _compose(directory, service, "up", "--detach", "--wait", service, environment=variables)


def _override(directory: Path, service: str) -> Path:
    return directory / f"compose-{service}.json"


def _compose(directory: Path, service: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    override = _override(directory, service)
    files = ["-f", str(FILE), *(["-f", str(override)] if override.exists() else [])]
    done = subprocess.run(
        ["docker", "compose", "--project-directory", str(ROOT), *files, *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=UP_TIMEOUT,
    )
    if done.returncode:
        raise BrokerError(f"docker compose {arguments[0]} failed:\n{done.stderr.strip()[-2000:]}")


def _wait_ready(product: str, look: Callable[[], object]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while True:
        try:
            look()
            return
        except (OSError, BrokerError) as error:
            if time.monotonic() > deadline:
                raise BrokerError(f"{product} in Docker gave no answer in {READY_TIMEOUT:g} s: {error}") from None
        time.sleep(POLL)
