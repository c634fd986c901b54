"""The examples that need a Kafka, with the output that their readers are to expect."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from streamtools.drivers.kafka.admin import KafkaAdmin
from tests.brokers.kafka import jars
from tests.brokers.kafka.address import KafkaAddress
from tests.conftest import IN_CI
from tests.drivers.kafka.conftest import records
from tests.examples.test_examples import EXAMPLES, ROOT, running, wait_for


@pytest.fixture
def environment(kafka: KafkaAddress) -> dict[str, str]:
    """The tests' Kafka, and a free port for HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return {**os.environ, "PYTHONPATH": str(ROOT), "KAFKA_HOST": kafka.bootstrap, "HTTP_PORT": port}


@pytest.mark.real_kafka("making topics")
async def test_a_pair_sends_by_http_and_consumes_from_kafka_through_the_bridge(
    environment: dict[str, str], kafka: KafkaAddress, tmp_path: Path
) -> None:
    here = EXAMPLES / "bridge"
    async with KafkaAdmin(url=kafka.url) as admin:
        for queue in await admin.list():  # what an earlier run has left
            if queue.name == "queue_1":
                await admin.delete(queue.name)

    with running(tmp_path / "log", environment, "bridge.py", cwd=here):
        ran = await asyncio.to_thread(
            subprocess.run, [sys.executable, "service.py"],
            cwd=here, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert await asyncio.to_thread(post, environment["HTTP_PORT"]) == 202

    assert ran.stdout.splitlines() == [f"handled {{'id': {n}}} of north, key k-1" for n in (1, 2, 3)]
    *sent, posted = await records(kafka, "queue_1")
    assert [(r.key, r.value) for r in sent] == [(b"k-1", b'{"id":%d}' % n) for n in (1, 2, 3)]
    assert posted.value == b'{"id": 4}'


def post(port: str) -> int:
    """As any HTTP client would."""
    request = Request(
        f"http://127.0.0.1:{port}/queue_1", data=b'{"id": 4}', headers={"content-type": "application/json"}
    )
    with build_opener(ProxyHandler({})).open(request, timeout=30) as answer:
        return int(answer.status)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.kafka
@pytest.mark.timeout(400)
def test_a_cluster_of_three_loses_a_broker_and_no_transfer_is_lost(tmp_path: Path) -> None:
    if not (jars.is_installed() or IN_CI):
        pytest.skip("Kafka is not installed. Type: scripts/brokers up kafka")
    here = EXAMPLES / "kafka_cluster"
    with running(tmp_path / "brokers", {**os.environ}, "brokers.py", cwd=here) as brokers:
        wait_for(brokers, {"# broker 3"}, seconds=200)
        [host] = re.findall(r"export KAFKA_HOST=(\S+)", brokers.read_text())
        victim = int(re.findall(r"kill -9 (\d+)", brokers.read_text())[0])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "KAFKA_HOST": host}
        with running(tmp_path / "transfers", environment, "transfers.py", cwd=here, ends=True) as transfers:
            wait_for(transfers, {"1,200 confirmed"}, seconds=120)
            os.kill(victim, signal.SIGKILL)
    assert "6,000 confirmed, none lost, each account in order: True\n" in transfers.read_text()
