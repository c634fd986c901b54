"""A Kafka node (or a cluster) of our own, which a test may kill -9 and restart.

    with KafkaNode() as node:
        node.kill(); node.start()

Calls block; inside a running event loop use `await asyncio.to_thread(node.restart)`.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence

from tests.brokers.home import Home
from tests.brokers.kafka import archives, jars
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.configuration import (
    Member,
    address_of,
    format_arguments,
    keystore,
    new_cluster_id,
    new_member,
    properties,
)
from tests.brokers.kafka.handshake import live_brokers
from tests.brokers.kafka.tools import TOOL_JAVA, kafka_tool, leaders
from tests.brokers.node import START_TIMEOUT, Cluster, Node
from tests.brokers.processes import BrokerError

SERVER_JAVA = ("java", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true")
#: A node that lives for seconds has the quick compiler only: it starts in half the processor time.
QUICK = ("-Xmx512m", "-XX:TieredStopAtLevel=1")
#: One that stays keeps the topics of many runs.
LASTING = ("-Xmx1g",)
LOG = ("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true")
#: Seconds for formatting an empty directory; 1 on a quiet machine.
FORMAT_TIMEOUT = 60.0


class KafkaHome(Home):
    """What the nodes of one Kafka share: the cluster's id, and the server's key in the form that Kafka reads."""

    def __init__(self, *, guarded: bool = True) -> None:
        jars.ensure_installed()
        super().__init__("kafka", guarded=guarded)
        self.java = (*SERVER_JAVA, *(QUICK if guarded else LASTING), *archives.reading(archives.SERVER))
        self.cluster_id = new_cluster_id()
        self.keystore = self.directory / "keystore.pem"
        self.keystore.write_text(keystore(self.certificates))


class KafkaNode(Node):
    """One node, broker and controller, with listeners: plain, TLS, SASL, SASL over TLS.

    Parameters:
        home: shared by the nodes of a cluster; None makes one, which `close()` removes.
        member: which of `members` it is; None for a single node.
        config: server properties that win over ours, e.g. {"message.max.bytes": "2000"}.
        guarded: see `Home`.
    """

    product = "Kafka"
    source = "Maven"
    home: KafkaHome

    def __init__(
        self,
        home: KafkaHome | None = None,
        *,
        member: Member | None = None,
        members: tuple[Member, ...] = (),
        config: Mapping[str, str] | None = None,
        guarded: bool = True,
    ) -> None:
        self.member = member or new_member(1)
        self._members = members or (self.member,)
        self._config = config or {}
        super().__init__(home or KafkaHome(guarded=guarded), f"k{self.member.number}", owns_home=home is None)

    @property
    def address(self) -> KafkaAddress:
        """Everything that a client needs, as data."""
        return address_of([self.member], self.home.certificates)

    @property
    def url(self) -> str:
        """`kafka://127.0.0.1:<port>/`."""
        return self.address.url

    @property
    def port(self) -> int:
        """Of the plain listener."""
        return self.member.ports["PLAINTEXT"]

    def tool(self, name: str, *arguments: str) -> str:
        """Run one of Kafka's own command-line tools against this node; see `kafka_tool`."""
        return kafka_tool(self.address.bootstrap, name, *arguments)

    def serves(self) -> list[int]:
        """The ports of the brokers that this node sees alive; raises OSError when it does not answer."""
        return live_brokers("127.0.0.1", self.port)

    # --- how ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._file("properties").exists():
            return
        text = properties(
            self.member,
            self._members,
            data=str(self.home.directory / self.name),
            keystore=str(self.home.keystore),
            truststore=str(self.home.certificates.ca),
            more=self._config,
        )
        self._file("properties").write_text(text)
        self._format()

    def _format(self) -> None:
        done = subprocess.run(
            [
                *(*TOOL_JAVA, *archives.reading(archives.TOOL), "kafka.tools.StorageTool"),
                *format_arguments(self.home.cluster_id, str(self._file("properties"))),
            ],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FORMAT_TIMEOUT,
        )
        if done.returncode:
            self._file("properties").unlink()
            raise BrokerError(f"formatting Kafka's log failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")

    def _command(self) -> list[str]:
        return [*self.home.java, *LOG, "kafka.Kafka", str(self._file("properties"))]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(self.home.directory),
            "CLASSPATH": jars.classpath(),
        }

    def _trouble(self) -> Exception | None:
        try:
            if self.port in (seen := self.serves()):
                return None
        except OSError as error:
            return error
        return BrokerError(f"it sees the brokers {seen} and not itself")


class KafkaCluster(Cluster):
    """Several nodes; `nodes` one by one, `url` with all of them. Topics have a copy on each node."""

    def __init__(self, size: int = 3, *, config: Mapping[str, str] | None = None, guarded: bool = True) -> None:
        self.home: KafkaHome = KafkaHome(guarded=guarded)
        members = tuple(new_member(number) for number in range(1, size + 1))
        self.nodes: Sequence[KafkaNode] = [
            KafkaNode(self.home, member=m, members=members, config=config) for m in members
        ]

    @property
    def address(self) -> KafkaAddress:
        """Everything that a client needs; its URLs have all nodes."""
        return address_of([node.member for node in self.nodes], self.home.certificates)

    @property
    def url(self) -> str:
        """`kafka://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3/`."""
        return self.address.url

    def leader(self, topic: str, partition: int = 0) -> KafkaNode:
        """The node that leads a partition now, by Kafka's own tool; about 1 second."""
        number = self._leader(topic, partition)
        return next(node for node in self.nodes if node.member.number == number)

    def wait_leader(
        self, topic: str, partition: int = 0, *, other_than: KafkaNode, timeout: float = START_TIMEOUT
    ) -> KafkaNode:
        """The node that leads a partition, once it is another one."""
        deadline = time.monotonic() + timeout
        while self._leader(topic, partition) in (None, other_than.member.number):
            if time.monotonic() > deadline:
                raise BrokerError(f"{topic}-{partition} has no other leader than {other_than.name} in {timeout:g} s")
        return self.leader(topic, partition)

    def _leader(self, topic: str, partition: int) -> int | None:
        alive = [node.address.bootstrap for node in self.nodes if node.pid is not None]
        return leaders(",".join(alive), topic).get(partition)

    def tool(self, name: str, *arguments: str) -> str:
        """Run one of Kafka's own command-line tools against the cluster; see `kafka_tool`."""
        return kafka_tool(self.address.bootstrap, name, *arguments)

    def _seen(self) -> int:
        return min(len(node.serves()) for node in self.nodes)


def archive_classes() -> None:
    """Write the archives of Java's classes that are missing; 8 seconds, once for each set of jars."""
    if not archives.are_missing():
        return
    home = KafkaHome()
    home.java = (*SERVER_JAVA, *QUICK, *archives.writing(archives.SERVER))
    try:
        node = KafkaNode(home)
        node.start()
        kafka_tool(node.address.bootstrap, "kafka-topics", "--list", archive=archives.writing(archives.TOOL))
        node.stop()
        archives.keep(archives.SERVER)
        archives.keep(archives.TOOL)
    except (BrokerError, OSError) as error:
        print(f"kafka: its nodes start slowly, because Java wrote no archive of its classes: {error}")
    finally:
        home.close()
