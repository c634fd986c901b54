"""Is it really Kafka, and does it serve? A Metadata request, by hand.

An open port proves little. From the protocol guide (kafka.apache.org/protocol): a request is its size, api_key 3,
version 1, a correlation id, a client id, and topics (an empty array: none); the answer begins with its size, the
correlation id and the brokers.
"""

from __future__ import annotations

import socket
import ssl
import struct

from tests.brokers.kafka.address import KafkaAddress

METADATA_V1 = struct.pack("!hhih", 3, 1, 7, -1) + struct.pack("!i", 0)


def look_at(address: KafkaAddress) -> None:
    """Return when the first of its hosts serves; raises OSError if not."""
    host, _, port = address.bootstrap.partition(",")[0].rpartition(":")
    live_brokers(host, int(port))


def live_brokers(host: str, port: int, *, ca: str | None = None, timeout: float = 5) -> list[int]:
    """The ports of the brokers that this one sees alive.

    Parameters:
        ca: PEM file of the authority; with it the connection is encrypted.

    Raises:
        OSError: when nothing answers, TLS fails, or the answer is no Kafka's.
    """
    with socket.create_connection((host, port), timeout=timeout) as raw:
        stream = ssl.create_default_context(cafile=ca).wrap_socket(raw, server_hostname=host) if ca else raw
        with stream, stream.makefile("rb") as answers:
            stream.sendall(struct.pack("!i", len(METADATA_V1)) + METADATA_V1)
            head = answers.read(4)
            body = answers.read(struct.unpack("!i", head)[0]) if len(head) == 4 else b""
    try:
        return _ports(body)
    except struct.error:
        raise ConnectionError(f"the answer is no Kafka's: {(head + body)[:200]!r}") from None


def _ports(body: bytes) -> list[int]:
    """Brokers: node_id int32, host string, port int32, rack nullable string."""
    count = struct.unpack_from("!i", body, 4)[0]
    ports, at = [], 8
    for _ in range(count):
        at += 6 + struct.unpack_from("!h", body, at + 4)[0]
        ports.append(struct.unpack_from("!i", body, at)[0])
        at += 6 + max(0, struct.unpack_from("!h", body, at + 4)[0])
    return ports
