"""The server.properties of a test node: broker and controller in one process (KRaft), quick and small."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.brokers.certificates import Certificates
from tests.brokers.kafka.address import PASSWORD, USERNAME, KafkaAddress
from tests.brokers.processes import free_ports

#: Name of each listener to its security protocol.
PROTOCOLS = {
    "PLAINTEXT": "PLAINTEXT",
    "TLS": "SSL",
    "SASL": "SASL_PLAINTEXT",
    "SASLTLS": "SASL_SSL",
    "CONTROLLER": "PLAINTEXT",
}
LOGIN = "org.apache.kafka.common.security"
#: Small buffers and thread pools; no waiting at start; what is done in the background is done soon.
SETTINGS = {
    "auto.create.topics.enable": "false",
    "background.threads": "2",
    "broker.heartbeat.interval.ms": "500",
    "controller.quorum.fetch.timeout.ms": "1500",
    "file.delete.delay.ms": "1000",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # The default of 128 MB would not fit into the heap.
    "log.cleaner.dedupe.buffer.size": "8388608",
    "log.initial.task.delay.ms": "1000",
    "log.retention.check.interval.ms": "2000",
    "num.io.threads": "4",
    "num.network.threads": "2",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
}
SECURITY = {
    "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
    "listener.name.tls.ssl.client.auth": "requested",
    "ssl.keystore.type": "PEM",
    "ssl.truststore.type": "PEM",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a cluster: its number and its ports on loopback."""

    number: int
    ports: Mapping[str, int]

    def at(self, listener: str) -> str:
        """`127.0.0.1:<port>` of one listener."""
        return f"127.0.0.1:{self.ports[listener]}"


def properties(
    member: Member,
    members: Sequence[Member],
    *,
    data: str,
    keystore: str,
    truststore: str,
    more: Mapping[str, str] | None = None,
    listen_on: str = "127.0.0.1",
) -> str:
    """The file's text.

    Parameters:
        data: where its log goes.
        keystore: PEM file with the server's key and certificate.
        truststore: PEM file of the authority.
        more: wins over everything else.
        listen_on: the interface; clients reach it at 127.0.0.1 in any case.
    """
    advertised = [f"{name}://{member.at(name)}" for name in PROTOCOLS if name != "CONTROLLER"]
    settings = {
        "process.roles": "broker,controller",
        "node.id": str(member.number),
        "controller.quorum.voters": ",".join(f"{m.number}@{m.at('CONTROLLER')}" for m in members),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listeners": ",".join(f"{name}://{listen_on}:{port}" for name, port in member.ports.items()),
        "advertised.listeners": ",".join(advertised),
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in PROTOCOLS.items()),
        "log.dirs": data,
        "ssl.keystore.location": keystore,
        "ssl.truststore.location": truststore,
        **SETTINGS,
        **SECURITY,
        **_logins("sasl"),
        **_logins("sasltls"),
        **_replication(len(members)),
        # After a kill -9 a node is let in again when its old self has timed out; alone it has nobody to wait for.
        "broker.session.timeout.ms": "5000" if len(members) > 1 else "2000",
        **(more or {}),
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def new_member(number: int) -> Member:
    """A node's number with ports of its own."""
    return Member(number=number, ports=dict(zip(PROTOCOLS, free_ports(len(PROTOCOLS)), strict=True)))


def format_arguments(cluster_id: str, file: str) -> list[str]:
    """For Kafka's StorageTool: an empty log that knows the cluster's id and the users."""
    scram = [f"SCRAM-SHA-{bits}=[name={USERNAME},password={PASSWORD}]" for bits in (256, 512)]
    return ["format", "-t", cluster_id, "-c", file, *(word for user in scram for word in ("--add-scram", user))]


def new_cluster_id() -> str:
    """16 bytes in URL-safe base64, as Kafka writes them; a first "-" would look like an option."""
    return base64.urlsafe_b64encode(bytes(1) + secrets.token_bytes(15)).decode().rstrip("=")


def address_of(members: Sequence[Member], certificates: Certificates) -> KafkaAddress:
    """One address for all of them."""

    def url(listener: str) -> str:
        return f"kafka://{','.join(member.at(listener) for member in members)}/"

    return KafkaAddress(
        url=url("PLAINTEXT"),
        tls_url=url("TLS"),
        sasl_url=url("SASL"),
        sasl_tls_url=url("SASLTLS"),
        username=USERNAME,
        password=PASSWORD,
        ca=str(certificates.ca),
        cert=str(certificates.client_cert),
        key=str(certificates.client_key),
    )


def keystore(certificates: Certificates) -> str:
    """Key and certificate in one PEM text, as Kafka wants them."""
    return certificates.server_key.read_text() + certificates.server_cert.read_text()


def _logins(listener: str) -> dict[str, str]:
    user = f'username="{USERNAME}" password="{PASSWORD}" user_{USERNAME}="{PASSWORD}"'
    scram = f"{LOGIN}.scram.ScramLoginModule required;"
    return {
        f"listener.name.{listener}.plain.sasl.jaas.config": f"{LOGIN}.plain.PlainLoginModule required {user};",
        f"listener.name.{listener}.scram-sha-256.sasl.jaas.config": scram,
        f"listener.name.{listener}.scram-sha-512.sasl.jaas.config": scram,
    }


def _replication(nodes: int) -> dict[str, str]:
    """Every copy on every node; writing goes on without one of three."""
    replicas, in_sync = str(nodes), str(max(1, nodes - 1))
    made = {"default.replication.factor": replicas, "min.insync.replicas": in_sync}
    for topic, partitions in {"offsets.topic": "1", "transaction.state.log": "3"}.items():
        made |= {f"{topic}.num.partitions": partitions, f"{topic}.replication.factor": replicas}
    share = "share.coordinator.state.topic"
    return made | {
        "transaction.state.log.min.isr": in_sync,
        f"{share}.num.partitions": "1",
        f"{share}.replication.factor": replicas,
        f"{share}.min.isr": in_sync,
    }
