"""What every test shares: a clean environment, a watch on the event loop, and real brokers.

`rabbitmq`          the shared broker, an address: never kill or reconfigure it
`rabbitmq_vhost`    the shared broker, in an empty virtual host of the test's own
`own_rabbitmq`      a node that the test may kill -9, freeze and restart
`rabbitmq_cluster`  three nodes, likewise

Without a broker they skip, saying what to type; with CI=true they fail.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

from tests.brokers import packages
from tests.brokers.address import RabbitMQAddress, from_environment, from_state
from tests.brokers.handshake import shake_hands
from tests.brokers.processes import BrokerError
from tests.brokers.rabbitmq import RabbitMQCluster, RabbitMQNode, add_vhost

Broker = TypeVar("Broker", RabbitMQNode, RabbitMQCluster)
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
#: Variables that would lead a test to somebody's real broker.
OURS = ("STREAMTOOLS_URL", "RMQ_", "HTTP_HOST", "KAFKA_HOST")

# A busy machine is no bug in a property, so there is no deadline; CI repeats the same examples.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if IN_CI else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by fixture, so that `-m "not rabbitmq"` needs no second list."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if names & {"rabbitmq", "own_rabbitmq", "rabbitmq_cluster"}:
            item.add_marker(pytest.mark.rabbitmq)
        if names & {"own_rabbitmq", "rabbitmq_cluster"}:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the developer's own addresses."""
    for name in list(os.environ):
        if name.startswith(OURS):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> Iterator[BlockBuster]:
    """A blocking call of ours inside the event loop is an error; `.deactivate()` ends the watch."""
    with blockbuster_ctx("streamtools") as watch:
        for function in watch.functions.values():  # a driver is imported once, when it is first asked for
            function.can_block_in("streamtools/registry.py", {"_load"})
        yield watch


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQAddress]:
    """From the environment, from `scripts/brokers up`, or else a node for this session."""
    given = from_environment() or from_state()
    if given is not None and (from_environment() or _answers(given)):
        yield given
        return
    node = _started(RabbitMQNode)
    yield node.address
    node.close()


@pytest.fixture
def rabbitmq_vhost(rabbitmq: RabbitMQAddress) -> Iterator[RabbitMQAddress]:
    """An empty virtual host, deleted at the end with everything in it."""
    vhost = f"test-{secrets.token_hex(4)}"
    add_vhost(rabbitmq, vhost)
    yield rabbitmq.in_vhost(vhost)
    rabbitmq.manage("DELETE", f"vhosts/{vhost}")


@pytest.fixture(scope="session")
def _own_rabbitmq() -> Iterator[RabbitMQNode]:
    node = _started(RabbitMQNode)
    yield node
    node.close()


@pytest.fixture
def own_rabbitmq(_own_rabbitmq: RabbitMQNode) -> RabbitMQNode:
    """Running, thawed, without an alarm, in an empty virtual host, whatever the test before has done."""
    node = _own_rabbitmq
    if node.pid is not None:
        node.thaw()
    node.start()
    if node.has_alarm():
        node.clear_alarm()
    node.fresh_vhost()
    return node


@pytest.fixture(scope="module")
def rabbitmq_cluster() -> Iterator[RabbitMQCluster]:
    """Three nodes, one quorum; about 20 seconds to start, so one for each module."""
    cluster = _started(RabbitMQCluster)
    yield cluster
    cluster.close()


def _answers(address: RabbitMQAddress) -> bool:
    try:
        shake_hands(address.url)
    except OSError:
        return False
    return True


def _started(make: Callable[[], Broker]) -> Broker:
    """Make and start a broker of the tests' own, or skip. Locally nothing is installed behind anyone's back."""
    if not (IN_CI or packages.is_installed()):
        _missing("RabbitMQ is not installed")
    try:
        broker = make()
    except BrokerError as error:
        _missing(str(error))
    try:
        broker.start()
    except BaseException:
        broker.close()
        raise
    return broker


def _missing(why: str) -> NoReturn:
    text = f"{why}. Type: scripts/brokers up"
    if IN_CI:
        pytest.fail(text)
    pytest.skip(text)
