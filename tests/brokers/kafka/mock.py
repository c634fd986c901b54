"""Where no Maven registry answers: the mock cluster inside librdkafka, which the package confluent-kafka brings.

It does produce, fetch, headers, commit and resume, static membership. It does not do these faithfully: two members
that join a group at once, transactions, read_committed, fencing, creating and deleting topics and other admin calls,
offsets by time. A test of such a case says so by `@pytest.mark.real_kafka("what it needs")` and skips on the mock.

Run as a program it starts the cluster, prints its hosts and stays until it is ended.
"""

from __future__ import annotations

import signal
import sys

from tests.brokers.address import ROOT
from tests.brokers.home import Home
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.handshake import look_at
from tests.brokers.kafka.jars import NoRegistryError
from tests.brokers.kafka.node import KafkaNode, archive_classes
from tests.brokers.node import Node
from tests.brokers.processes import BrokerError

BROKERS = 3
#: What its output looks like once it serves.
MARK = "kafka://"


class KafkaMock(Node):
    """The mock cluster in a process of its own."""

    product = "Kafka mock"
    source = "mock cluster of confluent-kafka"

    def __init__(self, *, guarded: bool = True) -> None:
        super().__init__(Home("kafka-mock", guarded=guarded), "mock", owns_home=True)

    @property
    def address(self) -> KafkaAddress:
        """Where it listens; unlike a node's, new at each start."""
        text = self._file("out").read_text() if self._file("out").exists() else ""
        found = [line for line in text.splitlines() if line.startswith(MARK)]
        if not found:
            raise BrokerError("the Kafka mock has not said yet where it listens")
        return KafkaAddress(url=found[-1], mock="yes")

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "tests.brokers.kafka.mock"]

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(self.home.directory)}

    def _trouble(self) -> Exception | None:
        try:
            look_at(self.address)
        except (OSError, BrokerError) as error:
            return error
        return None


def real_or_mock(*, guarded: bool = True) -> KafkaNode | KafkaMock:
    """A real node, or the mock where no Maven registry gives the jars; says so."""
    try:
        archive_classes()
        return KafkaNode(guarded=guarded)
    except NoRegistryError as error:
        print(f"kafka: {error}\nkafka: taking the mock cluster of confluent-kafka; what it cannot do is skipped")
        return KafkaMock(guarded=guarded)


def main() -> None:
    from confluent_kafka import Producer

    producer = Producer({"test.mock.num.brokers": BROKERS, "log_level": 0})
    brokers = producer.list_topics(timeout=10).brokers.values()
    print(f"{MARK}{','.join(f'{broker.host}:{broker.port}' for broker in brokers)}/", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
