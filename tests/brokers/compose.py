"""RabbitMQ by Docker Compose, where a Docker engine answers: the client alone is not enough."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.brokers.address import ROOT, RabbitMQAddress
from tests.brokers.certificates import Certificates, make_certificates
from tests.brokers.handshake import shake_hands
from tests.brokers.processes import POLL, BrokerError, free_ports

#: Seconds for the engine to answer, and for the image to come and the broker to start.
ENGINE_TIMEOUT, UP_TIMEOUT, READY_TIMEOUT = 5.0, 600.0, 60.0
FILE = ROOT / "compose.yaml"
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


def up(directory: Path) -> RabbitMQAddress:
    """Start it on free ports with TLS; what it needs on disk goes into the directory."""
    certificates = make_certificates(directory / "certificates")
    port, tls_port, management_port = free_ports(3)
    _write_override(directory, certificates)
    _compose(
        directory,
        *("up", "--detach", "--wait"),
        environment={
            "STREAMTOOLS_TEST_RABBITMQ_PORT": str(port),
            "STREAMTOOLS_TEST_RABBITMQ_TLS_PORT": str(tls_port),
            "STREAMTOOLS_TEST_RABBITMQ_MANAGEMENT_PORT": str(management_port),
        },
    )
    address = RabbitMQAddress(
        url=f"amqp://guest:guest@127.0.0.1:{port}/%2F",
        tls_url=f"amqps://guest:guest@127.0.0.1:{tls_port}/%2F",
        management_url=f"http://guest:guest@127.0.0.1:{management_port}",
        ca=str(certificates.ca),
        cert=str(certificates.client_cert),
        key=str(certificates.client_key),
    )
    _wait_ready(address)
    return address


def down(directory: Path) -> None:
    """End it and remove its volumes; safe to repeat."""
    _compose(directory, "down", "--volumes", "--timeout", "5", environment={})


def _write_override(directory: Path, certificates: Certificates) -> None:
    config = directory / "tls.conf"
    config.write_text(TLS_CONFIG)
    volumes = [f"{certificates.ca.parent}:/certificates:ro", f"{config}:/etc/rabbitmq/conf.d/20-tls.conf:ro"]
    # JSON is YAML too.
    (directory / "compose.json").write_text(json.dumps({"services": {"rabbitmq": {"volumes": volumes}}}))


def _compose(directory: Path, *arguments: str, environment: dict[str, str]) -> None:
    override = directory / "compose.json"
    files = ["-f", str(FILE), *(["-f", str(override)] if override.exists() else [])]
    done = subprocess.run(
        ["docker", "compose", "--project-directory", str(ROOT), *files, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=UP_TIMEOUT,
    )
    if done.returncode:
        raise BrokerError(f"docker compose {arguments[0]} failed:\n{done.stderr.strip()[-2000:]}")


def _wait_ready(address: RabbitMQAddress) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while True:
        try:
            shake_hands(address.url)
            address.manage("GET", "overview")
            return
        except (OSError, BrokerError) as error:
            if time.monotonic() > deadline:
                raise BrokerError(f"RabbitMQ in Docker gave no answer in {READY_TIMEOUT:g} s: {error}") from None
        time.sleep(POLL)
