"""A RabbitMQ node (or a cluster) of our own, which a test may kill -9 and restart.

    with RabbitMQNode() as node:
        node.kill(); node.start()

Calls block; inside a running event loop use `await asyncio.to_thread(node.restart)`.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.brokers.address import RabbitMQAddress, with_vhost
from tests.brokers.handshake import shake_hands
from tests.brokers.home import ErlangHome
from tests.brokers.node import Cluster, Node
from tests.brokers.processes import POLL, BrokerError, free_ports
from tests.brokers.release import Release

#: Seconds that rabbitmqctl may take; 2 on a quiet machine.
CTL_TIMEOUT = 60.0

CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
listeners.ssl.1 = 127.0.0.1:{tls_port}
ssl_options.cacertfile = {ca}
ssl_options.certfile = {server_cert}
ssl_options.keyfile = {server_key}
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = {require_client_cert}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
management.ssl.ip = 127.0.0.1
management.ssl.port = {management_tls_port}
management.ssl.cacertfile = {ca}
management.ssl.certfile = {server_cert}
management.ssl.keyfile = {server_key}
management.ssl.verify = verify_peer
management.ssl.fail_if_no_peer_cert = {require_client_cert}
disk_free_limit.absolute = 50MB
# The default of 512 MB is kept in memory, too, and weighs on small machines.
raft.wal_max_size_bytes = 67108864
"""
CLUSTER = """\
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.target_cluster_size_hint = {size}
"""
#: The last one as docs/protocols/rabbitmq.md has it for operators, see "Delayed messages minutes late".
ERL_ARGS = (
    "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false "
    "-rabbit dead_letter_worker_publisher_confirm_timeout 10000"
)


class RabbitMQNode(Node):
    """One node with ports of its own: AMQP and management, each plain and over TLS, and Erlang distribution.

    Parameters:
        home: shared by the nodes of a cluster; None makes one, which `close()` removes.
        name: the node's short name, without a dot.
        peers: names of all nodes of its cluster; empty for a single node.
        require_client_cert: True makes the TLS listener refuse clients without a certificate.
        guarded: see `Home`.
        release: see `ErlangHome`, for a home of its own.
    """

    product = "RabbitMQ"
    home: ErlangHome

    def __init__(
        self,
        home: ErlangHome | None = None,
        *,
        name: str = "n1",
        peers: tuple[str, ...] = (),
        require_client_cert: bool = False,
        guarded: bool = True,
        release: Release | None = None,
    ) -> None:
        super().__init__(home or ErlangHome(guarded=guarded, release=release), name, owns_home=home is None)
        self.source = self.home.release.source
        self.vhost = "/"
        self.port, self.tls_port, self.management_port, self.management_tls_port, self._dist_port = free_ports(5)
        self._configure(peers, require_client_cert)

    # --- where it is ---------------------------------------------------------------------------------

    @property
    def address(self) -> RabbitMQAddress:
        """Everything that a client needs, as data."""
        certificates = self.home.certificates
        return RabbitMQAddress(
            url=with_vhost(f"amqp://guest:guest@127.0.0.1:{self.port}/", self.vhost),
            tls_url=with_vhost(f"amqps://guest:guest@127.0.0.1:{self.tls_port}/", self.vhost),
            management_url=f"http://guest:guest@127.0.0.1:{self.management_port}",
            management_tls_url=f"https://127.0.0.1:{self.management_tls_port}",
            ca=str(certificates.ca),
            cert=str(certificates.client_cert),
            key=str(certificates.client_key),
        )

    @property
    def url(self) -> str:
        """`amqp://guest:guest@127.0.0.1:<port>/<vhost>`."""
        return self.address.url

    @property
    def tls_url(self) -> str:
        """`amqps://...`; check it with `ca`, show `cert` and `key`."""
        return str(self.address.tls_url)

    @property
    def management_url(self) -> str:
        """`http://guest:guest@127.0.0.1:<port>`."""
        return str(self.address.management_url)

    @property
    def ca(self) -> str:
        """Path of the authority's certificate."""
        return str(self.home.certificates.ca)

    @property
    def cert(self) -> str:
        """Path of the client certificate."""
        return str(self.home.certificates.client_cert)

    @property
    def key(self) -> str:
        """Path of the client certificate's key."""
        return str(self.home.certificates.client_key)

    # --- commands ------------------------------------------------------------------------------------

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl against this node and return what it prints; about 2 seconds each."""
        done = subprocess.run(
            self.home.release.command(self.home.directory, "rabbitmqctl", "-q", "-n", self._node_name, *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CTL_TIMEOUT,
        )
        if done.returncode:
            raise BrokerError(
                f"rabbitmqctl {' '.join(arguments)} failed: {(done.stderr or done.stdout).strip()[-2000:]}"
            )
        return done.stdout

    def raise_alarm(self) -> None:
        """A memory alarm: the broker blocks every connection that publishes, until `clear_alarm`."""
        self.ctl("set_vm_memory_high_watermark", "0.0001")
        self._wait_alarm(True)

    def clear_alarm(self) -> None:
        """Back to the default limit; returns when publishers are free again."""
        self.ctl("set_vm_memory_high_watermark", "0.4")
        self._wait_alarm(False)

    def has_alarm(self) -> bool:
        """Whether any alarm is on, of memory or of disk."""
        try:
            self.manage("GET", "health/checks/alarms")
        except BrokerError as error:  # 503 while an alarm is on
            if '"alarms":' not in str(error):
                raise
            return True
        return False

    def close_all_connections(self, reason: str = "closed by a test") -> None:
        """Close every client's connection by the protocol (320 CONNECTION_FORCED)."""
        self.ctl("close_all_connections", reason)

    def list_queues(self, *columns: str) -> list[dict[str, Any]]:
        """Queues of the current virtual host as they are now: `list_queues("name", "messages", "type")`."""
        columns = columns or ("name", "messages")
        rows: list[dict[str, Any]] = json.loads(
            self.ctl("--formatter", "json", "list_queues", "-p", self.vhost, *columns)
        )
        return rows

    def delete_queue(self, queue: str) -> None:
        """Delete a queue under its consumers: the broker cancels them."""
        self.manage("DELETE", f"queues/{quote(self.vhost, safe='')}/{quote(queue, safe='')}")

    def freeze_queue(self, queue: str) -> None:
        """A quorum queue gives no answer any more, as one without a leader, until `thaw_queue`."""
        self.ctl("eval", f"sys:suspend('{self._ra_name(queue)}').")

    def thaw_queue(self, queue: str) -> None:
        """After `freeze_queue`."""
        self.ctl("eval", f"sys:resume('{self._ra_name(queue)}').")

    def unsave(self, queue: str) -> None:
        """From the next restart on this quorum queue has no leader: the opposite of `wait_saved`."""
        uid = f"ra_directory:uid_of(quorum_queues, '{self._ra_name(queue)}')"
        self.ctl("eval", f"ra_directory:unregister_name(quorum_queues, {uid}), ok = dets:sync(ra_directory_reverse).")

    def forget_consumers(self, queue: str) -> None:
        """A quorum queue has no consumers any more, and their channels do not know."""
        server = f"{{'{self._ra_name(queue)}', node()}}"
        self.ctl(
            "eval",
            f"{{ok, {{_, Consumers}}, _}} = ra:leader_query({server}, fun rabbit_fifo:query_consumers/1), "
            # The keys are (tag, pid) on 3.x, numbers on 4.x; the values begin with pid and tag on both.
            f"[{{ok, _, _}} = ra:process_command({server}, "
            "rabbit_fifo:make_checkout({element(2, C), element(1, C)}, cancel, #{})) "
            "|| C <- maps:values(Consumers)].",
        )

    def wait_saved(self, timeout: float = 30) -> None:
        """Return when all quorum queues of the current virtual host would outlive a kill -9.

        Up to a second after it is declared a queue's name is in memory only (Ra's directory, names.dets,
        auto_save 500 ms). A node that is killed before starts the queue empty, as a follower that waits for
        a leader for ever: no request to it is answered, no message confirmed. Seen on 3.10;
        github.com/rabbitmq/rabbitmq-server/issues/15725 tells the same of later ones.
        """
        deadline = time.monotonic() + timeout
        rows = self.manage("GET", f"queues/{quote(self.vhost, safe='')}?columns=name,type")
        names = {self._ra_name(row["name"]).encode() for row in rows if row["type"] == "quorum"}
        while missing := {name for name in names if not any(name in data for data in self._directories())}:
            if time.monotonic() > deadline:
                raise BrokerError(f"RabbitMQ {self.name} has not saved {missing} after {timeout:g} s")
            time.sleep(POLL)

    def _ra_name(self, queue: str) -> str:
        return f"{'%2F' if self.vhost == '/' else self.vhost}_{queue}"

    def _directories(self) -> list[bytes]:
        home = self.home.directory / self.name / "data"
        return [path.read_bytes() for path in home.glob("*/quorum/*/names.dets")]

    def manage(self, method: str, path: str, body: Any = None) -> Any:
        """Call the management API; see `RabbitMQAddress.manage`."""
        return self.address.manage(method, path, body)

    def fresh_vhost(self) -> None:
        """Go on in a new, empty virtual host; the one before, unless it is `/`, is deleted."""
        if self.vhost != "/":
            self.manage("DELETE", f"vhosts/{self.vhost}")
        self.vhost = f"test-{secrets.token_hex(4)}"
        add_vhost(self.address, self.vhost)

    # --- how -----------------------------------------------------------------------------------------

    @property
    def _node_name(self) -> str:
        return f"{self.name}@localhost"

    def _configure(self, peers: tuple[str, ...], require_client_cert: bool) -> None:
        certificates = self.home.certificates
        config = CONFIG.format(
            port=self.port,
            tls_port=self.tls_port,
            management_port=self.management_port,
            management_tls_port=self.management_tls_port,
            ca=certificates.ca,
            server_cert=certificates.server_cert,
            server_key=certificates.server_key,
            require_client_cert=str(require_client_cert).lower(),
        )
        if peers:
            config += CLUSTER.format(size=len(peers))
            config += "".join(
                f"cluster_formation.classic_config.nodes.{i} = {n}@localhost\n" for i, n in enumerate(peers, 1)
            )
        self._file("conf").write_text(config)
        self._file("plugins").write_text("[rabbitmq_management].\n")
        self._file("advanced.config").write_text("[].\n")

    def _prepare(self) -> None:
        self.home.start_epmd()

    def _command(self) -> list[str]:
        return self.home.release.command(self.home.directory, "rabbitmq-server", "-noinput")

    def _environment(self) -> dict[str, str]:
        data = self.home.directory / self.name
        return self.home.environment() | {
            "RABBITMQ_ALLOW_INPUT": "1",  # with it the script ends in `exec`: its pid is the node's
            "RABBITMQ_NODENAME": self._node_name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": str(self._file("conf")),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self._file("advanced.config")),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._file("plugins")),
            "RABBITMQ_PLUGINS_EXPAND_DIR": str(data / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(data / "data"),
            "RABBITMQ_LOG_BASE": str(data / "log"),
            "RABBITMQ_PID_FILE": str(data / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERL_ARGS,
        }

    def _wait_alarm(self, wanted: bool, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while self.has_alarm() is not wanted:
            if time.monotonic() > deadline:
                raise BrokerError(f"RabbitMQ {self.name}: memory alarm is not {wanted} after {timeout:g} s")
            time.sleep(POLL)

    def _trouble(self) -> Exception | None:
        """What still stands against calling it ready."""
        try:
            shake_hands(with_vhost(self.url, "/"))
            shake_hands(with_vhost(self.tls_url, "/"), ca=self.ca, cert=(self.cert, self.key))
            self.manage("GET", "overview")
        except (OSError, BrokerError) as error:
            return error
        return None

    def _logs(self) -> Iterable[Path]:
        return sorted((self.home.directory / self.name / "log").glob("*.log"))


class RabbitMQCluster(Cluster):
    """Several nodes that know each other; `nodes` one by one, `urls` for a client."""

    def __init__(self, size: int = 3, *, guarded: bool = True) -> None:
        self.home: ErlangHome = ErlangHome(guarded=guarded)
        names = tuple(f"n{i}" for i in range(1, size + 1))
        self.nodes: Sequence[RabbitMQNode] = [RabbitMQNode(self.home, name=name, peers=names) for name in names]

    @property
    def urls(self) -> list[str]:
        """One URL for each node."""
        return [node.url for node in self.nodes]

    @property
    def url(self) -> str:
        """One URL with all hosts: `amqp://guest:guest@127.0.0.1:1,127.0.0.1:2/`."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"amqp://guest:guest@{hosts}/%2F"

    def start(self) -> None:
        """Start what does not run; returns when all nodes serve and see each other."""
        self.home.start_epmd()
        super().start()

    def wait_saved(self) -> None:
        """Return when all quorum queues of `/` would outlive a kill -9 of any node; see `RabbitMQNode.wait_saved`."""
        for node in self.nodes:
            node.wait_saved()

    def _seen(self) -> int:
        return min(sum(bool(n.get("running")) for n in node.manage("GET", "nodes")) for node in self.nodes)


def add_vhost(address: RabbitMQAddress, vhost: str) -> None:
    """Make a virtual host that `guest` may use."""
    name = quote(vhost, safe="")
    address.manage("PUT", f"vhosts/{name}", {})
    address.manage("PUT", f"permissions/{name}/guest", {"configure": ".*", "write": ".*", "read": ".*"})
