"""The brokers themselves: what the chaos tests rely on, holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.brokers.address import ROOT, RabbitMQAddress
from tests.brokers.handshake import shake_hands
from tests.brokers.processes import BrokerError, is_alive
from tests.brokers.rabbitmq import RabbitMQNode
from tests.faults.waiting import wait_until

QUORUM = {"durable": True, "arguments": {"x-queue-type": "quorum"}}


def test_an_address_survives_the_environment() -> None:
    address = RabbitMQAddress(url="amqp://guest:guest@127.0.0.1:1/%2F", ca="/a b/ca.pem")
    assert RabbitMQAddress.from_environment(address.environment()) == address
    assert RabbitMQAddress.from_environment({}) is None


def test_a_virtual_host_of_ones_own_is_empty_and_open(rabbitmq_vhost: RabbitMQAddress) -> None:
    shake_hands(rabbitmq_vhost.url)
    assert rabbitmq_vhost.manage("GET", f"queues/{rabbitmq_vhost.url.rpartition('/')[2]}") == []


def test_tls_takes_our_authority_and_no_other(own_rabbitmq: RabbitMQNode) -> None:
    shake_hands(own_rabbitmq.tls_url, ca=own_rabbitmq.ca)
    shake_hands(own_rabbitmq.tls_url, ca=own_rabbitmq.ca, cert=(own_rabbitmq.cert, own_rabbitmq.key))
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(own_rabbitmq.tls_url)


def test_a_killed_node_comes_back_on_its_port_with_its_queues(own_rabbitmq: RabbitMQNode) -> None:
    quorum = {"durable": True, "arguments": {"x-queue-type": "quorum"}}
    own_rabbitmq.manage("PUT", f"queues/{own_rabbitmq.vhost}/orders", quorum)
    own_rabbitmq.wait_saved()
    before, url = own_rabbitmq.pid, own_rabbitmq.url
    own_rabbitmq.kill()
    assert own_rabbitmq.pid is None
    with pytest.raises(ConnectionRefusedError):
        shake_hands(url)
    own_rabbitmq.start()
    assert own_rabbitmq.pid != before
    assert own_rabbitmq.url == url
    deadline = time.monotonic() + 30
    while not (queues := own_rabbitmq.list_queues("name")) and time.monotonic() < deadline:
        pass  # each look takes seconds
    assert [queue["name"] for queue in queues] == ["orders"]


def test_a_frozen_node_answers_nothing_until_thawed(own_rabbitmq: RabbitMQNode) -> None:
    own_rabbitmq.freeze()
    with pytest.raises(TimeoutError):
        shake_hands(own_rabbitmq.url, timeout=0.3)
    own_rabbitmq.thaw()
    shake_hands(own_rabbitmq.url)


def test_an_alarm_comes_and_goes(own_rabbitmq: RabbitMQNode) -> None:
    own_rabbitmq.raise_alarm()
    assert own_rabbitmq.has_alarm()
    own_rabbitmq.clear_alarm()
    assert not own_rabbitmq.has_alarm()


def test_a_refused_command_says_why(own_rabbitmq: RabbitMQNode) -> None:
    with pytest.raises(BrokerError, match="no_such_queue"):
        own_rabbitmq.ctl("delete_queue", "no_such_queue", "--vhost", own_rabbitmq.vhost)
    with pytest.raises(BrokerError, match="404"):
        own_rabbitmq.delete_queue("no_such_queue")


OWNER = """
import os, sys
from tests.brokers.rabbitmq import RabbitMQNode
node = RabbitMQNode()
node.start(wait=False)
print(node.pid, node.home.directory, flush=True)
sys.stdin.read()
"""


async def test_nothing_survives_the_sudden_end_of_its_owner(rabbitmq: RabbitMQAddress) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    pid, directory = owner.stdout.readline().split()
    epmd = int(Path(directory, "epmd.pid").read_text())
    assert is_alive(int(pid))
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    await wait_until(lambda: not (is_alive(int(pid)) or is_alive(epmd) or Path(directory).exists()))
