"""The port of the health endpoints: one small answer for each connection, within bounds.

A probe asks for a few bytes. So each connection has one request, one answer and ten seconds for both; a head may have
8 KiB. When there are too many connections, the one that has waited longest for its request ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, cast

log: logging.Logger = logging.getLogger("streamtools")

#: Connections at once.
CONNECTIONS: Final = 64
#: Bytes of a request's head.
HEAD: Final = 8 * 1024
#: Seconds from the beginning of a connection to the end of its answer.
REQUEST_TIMEOUT: Final = 10.0
#: Seconds that answers under way have when the server stops.
CLOSE_TIMEOUT: Final = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A request without its body.

    Attributes:
        method: such as GET.
        path: without the query.
        headers: by names in lower case.
        peer: the address that it came from.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    peer: str


_REQUEST_LINE: Final = re.compile(rb"[!-~]+ [!-~]+ HTTP/1\.[01]\r")

#: What is answered to a request: the status, and what goes out as JSON.
Respond = Callable[[Request], Awaitable[tuple[int, object]]]


class SmallServer:
    """Answers each request with JSON.

    Parameters:
        respond: gives the answer.
    """

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        #: All connections, the oldest first.
        self._open: dict[_Connection, None] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port that was free where `port` is 0.

        Raises:
            OSError: it cannot be.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening, and end all connections once the answers under way are out. Safe to repeat."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        if answering := [each.answering for each in self._open if each.answering is not None]:
            await asyncio.wait(answering, timeout=CLOSE_TIMEOUT)
        for connection in [*self._open]:
            connection.end()

    def add(self, connection: _Connection) -> None:
        """Count one more; where there are too many, the one that has waited longest for its request ends."""
        self._open[connection] = None
        if len(self._open) > CONNECTIONS:
            next((each for each in self._open if each.answering is None), connection).end()

    def remove(self, connection: _Connection) -> None:
        """Count one less."""
        self._open.pop(connection, None)


class _Connection(asyncio.Protocol):
    """One connection.

    Attributes:
        answering: makes its answer, once the whole request is there.
    """

    def __init__(self, server: SmallServer) -> None:
        self.answering: asyncio.Task[None] | None = None
        self._server = server
        self._head = bytearray()
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It was accepted."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._limit = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT, self.end)
        self._server.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It has ended."""
        self._limit.cancel()
        self._server.remove(self)
        if self.answering is not None:
            self.answering.cancel()

    def end(self) -> None:
        """End it at once."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes came; what comes behind the head is of no matter."""
        if self.answering is not None or self._answered:
            return
        self._head += data
        size = self._head.find(b"\r\n\r\n")
        if max(size, len(self._head) if size < 0 else 0) > HEAD:
            self._send(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, {"error": f"A head has {HEAD} bytes at most."})
        elif _begins_wrong(self._head):
            self._send(HTTPStatus.BAD_REQUEST, {"error": "This is no request of HTTP/1.1."})
        elif size >= 0:
            self.answering = asyncio.create_task(self._answer(self._request(size)), name="streamtools-health")

    def _request(self, size: int) -> Request:
        line, *fields = self._head[:size].decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ")
        pairs = [field.partition(":") for field in fields]
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        peer = str((self._transport.get_extra_info("peername") or ("",))[0])
        return Request(method, target.partition("?")[0], headers, peer)

    async def _answer(self, request: Request) -> None:
        try:
            status, content = await self._server.respond(request)
        except Exception:
            log.exception("The health of this process could not be told.")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content = {"error": "The health could not be told; the log says why."}
        self._send(status, content, body=request.method != "HEAD")

    def _send(self, status: int, content: object, *, body: bool = True) -> None:
        self._answered = True
        data = json.dumps(content).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + (data if body else b""))
        self._transport.close()


def _begins_wrong(head: bytearray) -> bool:
    line, end, _ = head.partition(b"\n")
    return bool(end) and _REQUEST_LINE.fullmatch(line) is None
