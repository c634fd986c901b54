"""Is it really RabbitMQ, and does it let us in? The opening of AMQP 0-9-1, by hand.

An open port proves little: a node listens before it serves. From the specification, §1.4 of
amqp0-9-1.xml: Start, Start-Ok, Tune, Tune-Ok, Open, Open-Ok.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

FRAME_END = b"\xce"
START, TUNE, OPEN_OK = (10, 10), (10, 30), (10, 41)


def shake_hands(url: str, *, ca: str | None = None, cert: tuple[str, str] | None = None, timeout: float = 5) -> None:
    """Open an AMQP connection and close it again.

    Raises:
        OSError: when nothing answers, TLS fails, or the answer is not the expected one.
    """
    parts = urlsplit(url)
    port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
    with socket.create_connection((parts.hostname or "localhost", port), timeout=timeout) as raw:
        stream = _encrypt(raw, parts.hostname, ca, cert) if parts.scheme == "amqps" else raw
        with stream, stream.makefile("rb") as answers:
            stream.sendall(b"AMQP\x00\x00\x09\x01")
            _expect(answers.read, START)
            stream.sendall(_start_ok(unquote(parts.username or "guest"), unquote(parts.password or "guest")))
            limits = _expect(answers.read, TUNE)
            stream.sendall(_method(10, 31, limits[:8]) + _method(10, 40, _short(_vhost(parts.path)) + b"\x00\x00"))
            _expect(answers.read, OPEN_OK)
            stream.sendall(_method(10, 50, struct.pack("!H", 200) + _short("bye") + bytes(4)))


def _vhost(path: str) -> str:
    return unquote(path[1:]) or "/"


def _encrypt(raw: socket.socket, host: str | None, ca: str | None, cert: tuple[str, str] | None) -> socket.socket:
    context = ssl.create_default_context(cafile=ca)
    if cert:
        context.load_cert_chain(*cert)
    return context.wrap_socket(raw, server_hostname=host)


def _start_ok(username: str, password: str) -> bytes:
    response = f"\0{username}\0{password}".encode()
    properties = struct.pack("!I", 0)
    return _method(
        10, 11, properties + _short("PLAIN") + struct.pack("!I", len(response)) + response + _short("en_US")
    )


def _short(text: str) -> bytes:
    return struct.pack("!B", len(text.encode())) + text.encode()


def _method(class_id: int, method_id: int, arguments: bytes) -> bytes:
    payload = struct.pack("!HH", class_id, method_id) + arguments
    return struct.pack("!BHI", 1, 0, len(payload)) + payload + FRAME_END


def _expect(read: Callable[[int], bytes], method: tuple[int, int]) -> bytes:
    head = read(7)
    if len(head) < 7:
        raise ConnectionError("the broker closed the connection during the AMQP handshake")
    _, _, size = struct.unpack("!BHI", head)
    payload = read(size + 1)
    if struct.unpack("!HH", payload[:4]) != method:
        raise ConnectionError(f"unexpected answer in the AMQP handshake: {payload[:200]!r}")
    return payload[4:-1]
