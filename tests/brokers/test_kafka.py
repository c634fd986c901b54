"""The Kafka nodes themselves: what the chaos tests rely on, holds."""

from __future__ import annotations

import secrets

import pytest

from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.handshake import live_brokers, look_at
from tests.brokers.kafka.mock import KafkaMock
from tests.brokers.kafka.node import KafkaCluster, KafkaNode
from tests.brokers.kafka.tools import kafka_tool
from tests.brokers.processes import BrokerError


def unique(name: str) -> str:
    return f"{name}-{secrets.token_hex(4)}"


def create(broker: KafkaNode | KafkaCluster, topic: str) -> None:
    broker.tool("kafka-topics", "--create", "--topic", topic)


def test_an_address_survives_the_environment() -> None:
    address = KafkaAddress(url="kafka://127.0.0.1:1/", sasl_url="kafka://127.0.0.1:2/", password="p@ss/w:%")
    assert KafkaAddress.from_environment(address.environment()) == address
    assert KafkaAddress.from_environment({}) is None


@pytest.mark.real_kafka("Kafka's own tools")
def test_kafkas_own_tools_work_on_the_shared_broker(kafka: KafkaAddress) -> None:
    topic = unique("orders")
    kafka_tool(kafka.bootstrap, "kafka-topics", "--create", "--topic", topic, "--partitions", "2")
    assert kafka_tool(kafka.bootstrap, "kafka-get-offsets", "--topic", topic).split() == [
        f"{topic}:0:0",
        f"{topic}:1:0",
    ]


@pytest.mark.real_kafka("Kafka's own tools")
def test_a_tool_that_fails_says_why(kafka: KafkaAddress) -> None:
    with pytest.raises(BrokerError, match="does not exist"):
        kafka_tool(kafka.bootstrap, "kafka-topics", "--delete", "--topic", unique("nothing"))


def test_the_mock_answers_and_says_that_it_is_one() -> None:
    pytest.importorskip("confluent_kafka")
    with KafkaMock() as mock:
        assert mock.address.mock
        look_at(mock.address)


def test_tls_takes_our_authority_and_no_other(own_kafka: KafkaNode) -> None:
    port = own_kafka.member.ports["TLS"]
    assert live_brokers("127.0.0.1", port, ca=own_kafka.address.ca) == [port]
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        live_brokers("127.0.0.1", port, ca="/etc/ssl/certs/ca-certificates.crt")


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_a_login_works_with_its_password_and_with_no_other(own_kafka: KafkaNode, mechanism: str) -> None:
    topic = unique("orders")
    create(own_kafka, topic)
    assert topic in log_in(own_kafka, mechanism, str(own_kafka.address.password))
    with pytest.raises(BrokerError, match="[Aa]uthentication failed"):
        log_in(own_kafka, mechanism, "wrong")


def log_in(node: KafkaNode, mechanism: str, password: str) -> list[str]:
    """The topics that this login sees."""
    scram = "plain.PlainLoginModule" if mechanism == "PLAIN" else "scram.ScramLoginModule"
    file = node.home.directory / "login.properties"
    file.write_text(
        f"security.protocol=SASL_PLAINTEXT\nsasl.mechanism={mechanism}\n"
        f"sasl.jaas.config=org.apache.kafka.common.security.{scram} required "
        f'username="{node.address.username}" password="{password}";\n'
    )
    return kafka_tool(node.member.at("SASL"), "kafka-topics", "--list", "--command-config", str(file)).split()


def test_a_killed_node_comes_back_on_its_port_with_its_topics(own_kafka: KafkaNode) -> None:
    topic = unique("orders")
    create(own_kafka, topic)
    before, url = own_kafka.pid, own_kafka.url
    own_kafka.kill()
    assert own_kafka.pid is None
    with pytest.raises(ConnectionRefusedError):
        own_kafka.serves()
    own_kafka.start()
    assert own_kafka.pid != before
    assert own_kafka.url == url
    assert topic in own_kafka.tool("kafka-topics", "--list").split()


def test_a_frozen_node_answers_nothing_until_thawed(own_kafka: KafkaNode) -> None:
    own_kafka.freeze()
    with pytest.raises(TimeoutError):
        live_brokers("127.0.0.1", own_kafka.port, timeout=0.3)
    own_kafka.thaw()
    assert own_kafka.serves() == [own_kafka.port]
