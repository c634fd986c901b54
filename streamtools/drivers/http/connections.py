"""Limits the connections of one port: their number, their memory and their time.

aiohttp limits the length of a line and of a header, the number of headers, and the time of an idle connection. It
limits neither the whole head of a request, nor the number of connections, nor the memory of all of them together, nor
the time in which a client reads an answer. `_Connection` is aiohttp's protocol for one connection with these limits
added. It overrides public methods only, and reads one private name, `_messages`.

A connection *waits* while it is idle or a request has arrived only in part; then it may be closed. It is *busy* while
a complete request is handled; then it is never closed. When a limit is reached, the peer that uses the most loses
connections first, beginning with the slowest: a connection that sent its request in time is busy, and no longer
waits.
"""

from __future__ import annotations

import asyncio
import heapq
import ipaddress
import logging
import resource
import ssl
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from time import monotonic
from typing import Any, Final, cast

from aiohttp import web

from streamtools.drivers.http.responses import SERVER

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds until the first byte of a connection must arrive, and from the first to the last byte of a head.
HEAD_TIMEOUT: Final = 20.0
#: Seconds for a TLS handshake.
HANDSHAKE_TIMEOUT: Final = 10.0
#: Seconds between two checks of all connections.
CHECK_INTERVAL: Final = 1.0
#: The bytes that a line of a head takes in addition to its own: the objects that aiohttp makes of it.
LINE_COST: Final = 300
#: The most bytes that an unfinished head may take; a complete head is measured exactly when it is read.
HEAD_LIMIT: Final = 640 * 1024
#: For each byte of a body, this many bytes of chunk headers may arrive, in addition to `HEAD_LIMIT`.
OVERHEAD: Final = 8
#: If more bytes than this arrive while a request is handled, the connection closes after its answer.
PIPELINED: Final = 256 * 1024
#: The most bytes of all unfinished requests together; more if four of the largest bodies need more.
UNFINISHED: Final = 32 * 1024 * 1024
#: The most bytes of all answers together that clients have not read.
UNREAD: Final = 32 * 1024 * 1024
#: After `READ_GRACE_TIMEOUT` seconds, a client has to read this many bytes of an answer per second.
READ_RATE: Final = 4096
READ_GRACE_TIMEOUT: Final = 10.0
#: The rest of a refused request is read for this many seconds, so that its sender sees the answer.
LINGER_TIMEOUT: Final = 2.0
#: When a limit is reached, this share of it is freed at once, so that not every new connection has to search.
SHARE: Final = 1 / 16
#: Seconds between two warnings about connections that were closed.
LOG_INTERVAL: Final = 60.0

_TOO_SLOW: Final = b"408 Request Timeout", b"The request took too long to arrive."
_TOO_LONG: Final = b"431 Request Header Fields Too Large", b"The head of the request is too long."
_NO_BODY: Final = b"400 Bad Request", b"The chunks of the body are not valid HTTP."


class Counted:
    """The part of a connection that `Connections` counts and closes."""

    def __init__(self, connections: Connections) -> None:
        self.peer: str = ""
        #: The loop's time at which the connection began to wait.
        self.since: float = 0.0
        #: The bytes that the unfinished request takes.
        self.held: int = 0
        self.busy: bool = False
        #: The number of complete requests so far.
        self.requests: int = 0
        self._connections = connections
        self._wire: asyncio.Transport | None = None

    @property
    def unsent(self) -> int:
        """The bytes that are written and not sent yet."""
        return self._wire.get_write_buffer_size() if self._wire is not None else 0

    def wait(self) -> None:
        """Note that the connection waits from now on."""
        self.busy = False
        self.since = monotonic()

    def look(self, now: float) -> None:
        """Close the connection if its time is over."""

    def end(self) -> None:
        """Close the connection while it waits."""
        self.abort()

    def abort(self) -> None:
        """Close the connection at once, and discard what is not sent yet."""
        if self._wire is not None:
            self._wire.abort()

    def _join(self, wire: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, wire)  # uvloop's transports are not subclasses of it
        self.peer = peer_of(wire.get_extra_info("peername"))
        self._connections.add(self)


class Door(Counted, asyncio.Protocol):
    """A connection during its TLS handshake.

    Parameters:
        connections: the connections of its port.
        tls: the TLS context.
        inside: makes the protocol that takes over after the handshake.
    """

    def __init__(self, connections: Connections, tls: ssl.SSLContext, inside: Callable[[], asyncio.Protocol]) -> None:
        super().__init__(connections)
        self._tls = tls
        self._inside = inside
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, and begin the handshake."""
        self._join(transport)
        if self._wire is not None and not self._wire.is_closing():
            self._wire.pause_reading()  # start_tls reads what comes now
            self._task = asyncio.get_running_loop().create_task(self._shake_hands(self._wire))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection, which was closed before TLS began."""
        self._connections.remove(self)

    async def _shake_hands(self, wire: asyncio.Transport) -> None:
        inside = self._inside()
        try:
            secured = await asyncio.get_running_loop().start_tls(
                wire, inside, self._tls, server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT, ssl_shutdown_timeout=LINGER_TIMEOUT,
            )  # fmt: skip
        except OSError as error:  # the base class of ssl.SSLError and TimeoutError
            log.debug("A TLS handshake failed (%s).", type(error).__name__)
            wire.abort()
            secured = None
        finally:
            self._connections.remove(self)
        if secured is not None:
            inside.connection_made(secured)


class _Connection(Counted, web.RequestHandler):  # private like _Server, because their base classes are aiohttp's
    """A connection that speaks HTTP.

    Parameters:
        connections: the connections of its port.
        options: the options of aiohttp's RequestHandler.
    """

    def __init__(self, server: web.Server, connections: Connections, **options: Any) -> None:
        Counted.__init__(self, connections)
        web.RequestHandler.__init__(self, server, **options)
        #: When the client was first seen not to read: the unread bytes, and the loop's time.
        self._unread: tuple[int, float] | None = None
        self._body: Any = None
        self._refused = False

    # --- aiohttp's hooks ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        super().connection_made(transport)
        self._join(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._connections.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes that arrived, pass them on to aiohttp, and check the limits."""
        if self._refused:
            return
        if not self.held and not self.busy:
            self.wait()
        cost = len(data)
        if self._body is None:
            cost += LINE_COST * data.count(b"\n")
        self._connections.hold(self, cost)
        super().data_received(data)
        if self.held > HEAD_LIMIT or self.busy:
            self._check()
        self._connections.check_held()

    def pause_writing(self) -> None:
        """Check the limit of unread answers: the client reads more slowly than we write."""
        super().pause_writing()
        self._connections.check_unread(self)

    def handle_error(self, *args: Any, **kwargs: Any) -> web.StreamResponse:
        """Answer a request that is not HTTP, without telling aiohttp's name and version."""
        response = super().handle_error(*args, **kwargs)
        response.headers["Server"] = SERVER
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, and free its body: an idle connection of aiohttp keeps its last answer."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if isinstance(resp, web.Response):
                resp.body = None

    # --- the way of a request -------------------------------------------------------------------

    def begun(self, body: Any) -> None:
        """Note that the head of a request has arrived.

        Parameters:
            body: aiohttp's stream of the request's body.
        """
        self._body = body
        if body.is_eof():
            self.whole()

    def whole(self) -> None:
        """Note that a request has arrived completely."""
        if self.busy:
            return
        self._body = None
        self.requests += 1
        self._connections.work(self)

    # --- closing --------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Close the connection if its time is over."""
        if self._wire is None:
            return
        if self.unsent:
            size, since = self._unread = self._unread or (self.unsent, now)
            if size - self.unsent < (now - since - READ_GRACE_TIMEOUT) * READ_RATE:
                self._wire.abort()
            return
        self._unread = None
        if self.busy or self._body is not None:  # RequestQueue limits the time of a body
            return
        if self._refused and now - self.since > LINGER_TIMEOUT:
            self._wire.abort()
        elif (self.held or not self.requests) and now - self.since > HEAD_TIMEOUT:
            self.end()

    def end(self) -> None:
        """Close the connection while it waits; if a request has begun, answer it 408, so that it is sent again."""
        if self._wire is None:
            return
        if self.unsent:
            self._wire.abort()
            return
        if self.held:
            self._wire.write(_answer(*_TOO_SLOW))
        self.force_close()

    def _check(self) -> None:
        if self.busy:
            if self.held > PIPELINED:
                self.close()  # the current request is answered, and nothing more is read
        elif self._body is None:
            if not self._messages:  # aiohttp's list of complete heads that it has not begun to handle
                self._refuse(_TOO_LONG)
        elif self.held > HEAD_LIMIT + (1 + OVERHEAD) * self._body.total_bytes:
            self._refuse(_NO_BODY)

    def _refuse(self, why: tuple[bytes, bytes]) -> None:
        """Refuse a request, and read on for a while: a client that is still sending would not see the answer."""
        self._refused = True
        if self._wire is not None and not self.unsent and self._body is None:
            self._wire.write(_answer(*why))
            self.wait()
        else:
            self.force_close()


class Connections:
    """The connections of one port.

    Parameters:
        limit: the most connections.
        place: the port as the log names it, such as "port 9000".
    """

    def __init__(self, limit: int, place: str = "") -> None:
        self.limit: int = _within_files(limit)
        self.place: str = place
        #: The most bytes that all unfinished requests may take together.
        self.room: int = UNFINISHED
        #: The bytes that they take now.
        self.held: int = 0
        self._all: dict[Counted, None] = {}
        self._unread: dict[Counted, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ended = 0
        self._told = -LOG_INTERVAL

    def __len__(self) -> int:
        return len(self._all)

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._all):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- from the connections -------------------------------------------------------------------

    def add(self, connection: Counted) -> None:
        """Count a connection that was accepted; if there are too many now, close some."""
        self._all[connection] = None
        connection.wait()
        if len(self._all) > self.limit:
            goal = self.limit - int(self.limit * SHARE)
            self._thin(
                lambda one: 1,
                lambda one: (one.requests > 0 and not one.held, one.since),
                lambda: len(self._all) > goal,
            )
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CHECK_INTERVAL, self._look)

    def remove(self, connection: Counted) -> None:
        """Forget a connection that was closed."""
        self._all.pop(connection, None)
        self._unread.pop(connection, None)
        self.held -= connection.held
        connection.held = 0

    def work(self, connection: Counted) -> None:
        """Note that a connection is busy with a complete request."""
        connection.busy = True
        self.held -= connection.held
        connection.held = 0

    def hold(self, connection: Counted, cost: int) -> None:
        """Note that the unfinished request of a connection takes more bytes."""
        if connection in self._all:
            connection.held += cost
            self.held += cost

    def check_held(self) -> None:
        """Close the slowest connections if all unfinished requests together take too much."""
        if self.held <= self.room:
            return
        now = monotonic()
        goal = self.room * (1 - SHARE)
        self._thin(
            lambda one: one.held,
            lambda one: -one.held * (now - one.since + 0.001),
            lambda: self.held > goal,
        )

    def check_unread(self, connection: Counted) -> None:
        """Close the connections that have been unread for the longest time, if all unread answers take too much."""
        self._unread.pop(connection, None)
        self._unread[connection] = connection.unsent
        if sum(self._unread.values()) <= UNREAD:
            return
        self._unread = {one: size for one in self._unread if (size := one.unsent)}
        total = sum(self._unread.values())
        for one in list(self._unread)[:-1]:
            if total <= UNREAD * (1 - SHARE):
                break
            total -= self._unread.pop(one)
            self._ended += 1
            one.abort()

    # --- ending ---------------------------------------------------------------------------------

    def _thin(
        self,
        weight: Callable[[Counted], int],
        order: Callable[[Counted], Any],
        more: Callable[[], bool],
    ) -> None:
        """Close waiting connections, always one of the peer with the greatest weight, while `more()` is true.

        Parameters:
            weight: returns the weight of a connection.
            order: returns a sort key; of one peer, the connection with the least key is closed first.
        """
        waiting: defaultdict[str, list[Counted]] = defaultdict(list)
        for connection in self._all:
            if not connection.busy:
                waiting[connection.peer].append(connection)
        ranked = {peer: sorted(ones, key=order, reverse=True) for peer, ones in waiting.items()}
        heap = [(-sum(map(weight, ones)), peer) for peer, ones in ranked.items()]
        heapq.heapify(heap)
        while heap and more():
            total, peer = heapq.heappop(heap)
            one = ranked[peer].pop()
            total += weight(one)
            if ranked[peer]:
                heapq.heappush(heap, (total, peer))
            self._end(one)

    def _end(self, connection: Counted) -> None:
        self._ended += 1
        connection.end()
        self.remove(connection)

    def _look(self) -> None:
        now = monotonic()
        for connection in list(self._all):
            connection.look(now)
        if self._ended and now - self._told > LOG_INTERVAL:
            log.warning(
                "%s: %d connections were closed, the slowest first, because there were more than %d, or because "
                "unfinished requests or unread answers took too much memory.",
                self.place,
                self._ended,
                self.limit,
            )
            self._ended, self._told = 0, now
        self._timer = None
        if self._all:
            self._timer = asyncio.get_running_loop().call_later(CHECK_INTERVAL, self._look)


class _Server(web.Server):
    """aiohttp's server, whose connections have limits."""

    def __init__(self, handler: Any, connections: Connections, **options: Any) -> None:
        super().__init__(handler, **options)
        self._limits = connections
        self._options = options

    def __call__(self) -> web.RequestHandler:
        """Return the protocol of a new connection."""
        options = {name: value for name, value in self._options.items() if name != "request_factory"}
        return _Connection(self, self._limits, loop=asyncio.get_running_loop(), **options)


def peer_of(name: object) -> str:
    """Return the peer of a connection: its address; for IPv6 its network of 64 bits, which one host can own."""
    if not isinstance(name, tuple) or not name:
        return ""
    return _network(str(name[0]))


@lru_cache(maxsize=4096)
def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4 or address.ipv4_mapped is not None:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False))


def _within_files(limit: int) -> int:
    """Return the limit, but at most three quarters of the files that this process may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit if files == resource.RLIM_INFINITY else max(1, min(limit, files * 3 // 4))


def _answer(status: bytes, why: bytes) -> bytes:
    body = b'{"error":"' + why + b'"}'
    return (
        b"HTTP/1.1 " + status + b"\r\nServer: streamtools\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
