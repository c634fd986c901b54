"""What every test shares: a clean environment, a watch on the event loop, and real brokers.

The suite runs in several processes (`-n`), which share the brokers of `scripts/brokers`.

`rabbitmq`          the shared broker, an address: never kill or reconfigure it
`rabbitmq_vhost`    the shared broker, in an empty virtual host of the test's own
`strict_rabbitmq`   a node that wants a client certificate
`own_rabbitmq`      a node that the test may kill -9, freeze and restart
`rabbitmq_cluster`  three nodes, likewise
`kafka`             the shared broker, an address; a test names its topics and groups uniquely
`own_kafka`         a node that the test may kill -9, freeze and restart
`kafka_cluster`     three nodes, likewise; `.leader(topic)` is the one to hurt

Without a broker they skip, saying what to type; with CI=true they fail.
"""

from __future__ import annotations

import gc
import os
import secrets
import sys
from collections.abc import Callable, Generator, Iterator
from typing import NoReturn, Protocol, TypeVar

import pytest
from _pytest.nodeid import coerce_node_id
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

from tests.brokers import release
from tests.brokers.address import RabbitMQAddress, rabbitmq_address
from tests.brokers.handshake import shake_hands
from tests.brokers.kafka import jars
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.handshake import look_at
from tests.brokers.kafka.jars import NoRegistryError
from tests.brokers.kafka.mock import KafkaMock, real_or_mock
from tests.brokers.kafka.node import KafkaCluster, KafkaNode
from tests.brokers.processes import BrokerError
from tests.brokers.rabbitmq import RabbitMQCluster, RabbitMQNode, add_vhost
from tests.faults.left_open import left_open, watch_loops

# Cases are imported one by one too, by other ways than `ConformanceSuite`.
pytest.register_assert_rewrite("streamtools.testing.conformance", "tests.core.machine", "tests.core.machine_verdicts")

Broker = TypeVar("Broker", bound=RabbitMQNode | RabbitMQCluster | KafkaNode | KafkaMock | KafkaCluster)
IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
#: Variables that would lead a test to somebody's real broker.
OURS = ("STREAMTOOLS_URL", "RMQ_", "HTTP_HOST", "KAFKA_HOST")

# A busy machine is no bug in a property, so there is no deadline; CI repeats the same examples.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if IN_CI else "dev")

watch_loops()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by fixture, so that `-m "not rabbitmq"` needs no second list."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if names & {"rabbitmq", "own_rabbitmq", "strict_rabbitmq", "rabbitmq_cluster"}:
            item.add_marker(pytest.mark.rabbitmq)
        if names & {"kafka", "own_kafka", "kafka_cluster"}:
            item.add_marker(pytest.mark.kafka)
        if names & {"own_rabbitmq", "rabbitmq_cluster", "own_kafka", "kafka_cluster"}:
            item.add_marker(pytest.mark.chaos)
        if item.config.getoption("loadgroup", default=False):
            # pytest-xdist 3.8 writes the group where pytest 9.2 does not read it, and spreads the tests one by one
            # (its issue 1386).
            item._id = coerce_node_id(f"{item.nodeid}@{_together(item, names)}")


def _together(item: pytest.Item, fixtures: set[str]) -> str:
    """The name of those that one process runs one after the other: a class, a file, or all that share a node."""
    if (mark := item.get_closest_marker("xdist_group")) is not None:
        return str(mark.args[0])
    for node in ("own_rabbitmq", "own_kafka", "strict"):
        if node in fixtures:
            return node
    if "tests/test_docs.py" in item.nodeid and "kafka" not in fixtures:
        return item.nodeid  # each page by itself; on Kafka they share their topics
    return item.nodeid.rpartition("::")[0]


def pytest_collection_finish() -> None:
    """The collected tests stay until the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was logged must be able to travel between processes; a lone surrogate cannot."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fail the test that leaves a connection open; a later one would, when the garbage collector finds it."""
    left_open.clear()
    yield
    if left_open:
        pytest.fail(f"{item.name} has left open: {', '.join(left_open)}", pytrace=False)


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
            # For an error that ends the start.
            function.can_block_in("streamtools/text/installation.py", {"install_line"})
        yield watch


@pytest.fixture(autouse=True)
def in_process_queues_are_new() -> Iterator[None]:
    """In-process queues belong to the process: what a test leaves there would meet the next one."""
    yield
    if (driver := sys.modules.get("streamtools.drivers.asyncio.broker")) is not None:
        driver.Broker._all.clear()


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQAddress]:
    """From the environment, from `scripts/brokers up`, or else a node for this session."""
    given = rabbitmq_address()
    if given is not None and (RabbitMQAddress.from_environment() or _answers(lambda: shake_hands(given.url))):
        yield given
        return
    node = _started(RabbitMQNode, release.chosen())
    yield node.address
    node.close()


@pytest.fixture
def rabbitmq_vhost(rabbitmq: RabbitMQAddress) -> Iterator[RabbitMQAddress]:
    """An empty virtual host, deleted at the end with everything in it."""
    vhost = f"test-{secrets.token_hex(4)}"
    add_vhost(rabbitmq, vhost)
    yield rabbitmq.in_vhost(vhost)
    rabbitmq.manage("DELETE", f"vhosts/{vhost}")


@pytest.fixture
def strict_rabbitmq() -> Iterator[RabbitMQAddress]:
    """A node whose TLS listener refuses clients without a certificate."""

    def strict_node() -> RabbitMQNode:
        return RabbitMQNode(require_client_cert=True)

    node = _started(strict_node, release.chosen())
    yield node.address
    node.close()


@pytest.fixture(scope="session")
def _own_rabbitmq() -> Iterator[RabbitMQNode]:
    node = _started(RabbitMQNode, release.chosen())
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
    cluster = _started(RabbitMQCluster, release.chosen())
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaAddress]:
    """From the environment, from `scripts/brokers up`, or else a node for this session."""
    given = KafkaAddress.from_environment() or KafkaAddress.from_state()
    if given is not None and (KafkaAddress.from_environment() or _answers(lambda: look_at(given))):
        yield given
        return
    node = _started(real_or_mock, jars)
    yield node.address
    node.close()


@pytest.fixture(autouse=True)
def no_mock_passes_for_a_kafka(request: pytest.FixtureRequest) -> None:
    """Skip what the mock cluster does not do faithfully: `@pytest.mark.real_kafka("transactions")`."""
    mark = request.node.get_closest_marker("real_kafka")
    if mark is not None and request.getfixturevalue("kafka").mock:
        pytest.skip(f"the mock cluster does not do this faithfully: {mark.args[0]}")


@pytest.fixture(scope="session")
def _own_kafka() -> Iterator[KafkaNode]:
    node = _started(KafkaNode, jars)
    yield node
    node.close()


@pytest.fixture
def own_kafka(_own_kafka: KafkaNode) -> KafkaNode:
    """Running and thawed, whatever the test before has done; with that one's topics."""
    if _own_kafka.pid is not None:
        _own_kafka.thaw()
    _own_kafka.start()
    return _own_kafka


@pytest.fixture(scope="module")
def _kafka_cluster() -> Iterator[KafkaCluster]:
    cluster = _started(KafkaCluster, jars)
    yield cluster
    cluster.close()


@pytest.fixture
def kafka_cluster(_kafka_cluster: KafkaCluster) -> KafkaCluster:
    """Three nodes, all running and in one cluster, whatever the test before has done."""
    for node in _kafka_cluster.nodes:
        if node.pid is not None:
            node.thaw()
    _kafka_cluster.start()
    return _kafka_cluster


def _answers(look: Callable[[], object]) -> bool:
    try:
        look()
    except OSError:
        return False
    return True


class _Source(Protocol):
    """Where a product comes from: a release of RabbitMQ, or Kafka's `jars`."""

    def is_installed(self) -> bool: ...


def _started(make: Callable[[], Broker], source: _Source) -> Broker:
    """Make and start a broker of the tests' own, or skip. Locally nothing is installed behind anyone's back."""
    if not (IN_CI or source.is_installed()):
        _missing(f"what {make.__name__} needs is not installed")
    try:
        broker = make()
    except NoRegistryError as error:
        pytest.skip(str(error))  # in CI, too: there it is the registry that is missing
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
