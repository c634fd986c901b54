"""The connections of one port: what each holds, how long it may take, and which end first when there are too many.

aiohttp limits one line, one header and their number, and gives an idle connection its time. It does not limit a head
as a whole, the connections, what all of them hold together, or the time that a client takes to read an answer.
`_Connection` is aiohttp's protocol for one connection, with these limits. It overrides its public methods alone,
and reads one private name, `_messages`.

A connection *waits* while it is idle or a request has not arrived whole; then it may be ended. It is *busy* while a
whole request is in hand: then it stays. Whenever a limit is reached, the peer that has the most loses first, and of
its connections the slowest: one that has sent a request in good time is not waiting any more.
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

#: Seconds for the first byte of a connection, and for a head from its first byte to its last.
HEAD_TIMEOUT: Final = 20.0
#: Seconds for a TLS handshake.
HANDSHAKE_TIMEOUT: Final = 10.0
#: Seconds between two looks at all connections.
CHECK_INTERVAL: Final = 1.0
#: What a line of a head costs beside its bytes: the objects that aiohttp makes of it.
LINE_COST: Final = 300
#: The most that an unfinished head may cost; a whole one is measured exactly when it is read.
HEAD_LIMIT: Final = 640 * 1024
#: Bytes of chunk headers and the like that may stand beside each byte of a body, once `HEAD_LIMIT` is used up.
OVERHEAD: Final = 8
#: Bytes that may come behind a request that is in hand; then the connection ends with its answer.
PIPELINED: Final = 256 * 1024
#: What all unfinished requests may hold together, in bytes; at least four of the largest bodies.
UNFINISHED: Final = 32 * 1024 * 1024
#: What all answers that their clients do not read may hold together, in bytes.
UNREAD: Final = 32 * 1024 * 1024
#: Bytes a second that a client has to read of an answer, once the seconds of `READ_GRACE_TIMEOUT` are over.
READ_RATE: Final = 4096
READ_GRACE_TIMEOUT: Final = 10.0
#: Seconds that the rest of a refused request is read, so that its sender gets to see the answer.
LINGER_TIMEOUT: Final = 2.0
#: The share of a limit that is ended at once when it is reached, so that not each new connection has to look.
SHARE: Final = 1 / 16
#: Seconds between two lines of the log about connections that were ended.
LOG_INTERVAL: Final = 60.0

_TOO_SLOW: Final = b"408 Request Timeout", b"The request took too long to arrive."
_TOO_LONG: Final = b"431 Request Header Fields Too Large", b"The head of the request is too long."
_NO_BODY: Final = b"400 Bad Request", b"The body is not sent as HTTP has it."


class Counted:
    """A connection as those of its port count it."""

    def __init__(self, connections: Connections) -> None:
        self.peer: str = ""
        #: When it began to wait.
        self.since: float = 0.0
        #: What the bytes cost that belong to no whole request yet.
        self.held: int = 0
        self.busy: bool = False
        #: Whole requests so far.
        self.requests: int = 0
        self._connections = connections
        self._wire: asyncio.Transport | None = None

    @property
    def unsent(self) -> int:
        """Bytes that are to go out."""
        return self._wire.get_write_buffer_size() if self._wire is not None else 0

    def wait(self) -> None:
        """It waits from now on."""
        self.busy = False
        self.since = monotonic()

    def look(self, now: float) -> None:
        """End it if its time is over."""

    def end(self) -> None:
        """End it, whatever it waits for."""
        self.abort()

    def abort(self) -> None:
        """End it at once, and forget what is to go out."""
        if self._wire is not None:
            self._wire.abort()

    def _join(self, wire: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, wire)  # uvloop's is no subclass
        self.peer = peer_of(wire.get_extra_info("peername"))
        self._connections.add(self)


class Door(Counted, asyncio.Protocol):
    """A connection whose TLS handshake is under way.

    Parameters:
        connections: those of its port.
        tls: what to speak.
        inside: makes the protocol that speaks behind the handshake.
    """

    def __init__(self, connections: Connections, tls: ssl.SSLContext, inside: Callable[[], asyncio.Protocol]) -> None:
        super().__init__(connections)
        self._tls = tls
        self._inside = inside
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It was accepted."""
        self._join(transport)
        if self._wire is not None and not self._wire.is_closing():
            self._wire.pause_reading()  # what comes now is for TLS
            self._task = asyncio.get_running_loop().create_task(self._shake_hands(self._wire))

    def connection_lost(self, exc: BaseException | None) -> None:
        """It has ended before TLS began."""
        self._connections.remove(self)

    async def _shake_hands(self, wire: asyncio.Transport) -> None:
        inside = self._inside()
        try:
            secured = await asyncio.get_running_loop().start_tls(
                wire, inside, self._tls, server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT, ssl_shutdown_timeout=LINGER_TIMEOUT,
            )  # fmt: skip
        except OSError as error:  # ssl.SSLError and TimeoutError are such
            log.debug("A TLS handshake failed (%s).", type(error).__name__)
            wire.abort()
            secured = None
        finally:
            self._connections.remove(self)
        if secured is not None:
            inside.connection_made(secured)


class _Connection(Counted, web.RequestHandler):  # private, as is _Server: their types are aiohttp's
    """A connection that speaks HTTP.

    Parameters:
        connections: those of its port.
        options: aiohttp's.
    """

    def __init__(self, server: web.Server, connections: Connections, **options: Any) -> None:
        Counted.__init__(self, connections)
        web.RequestHandler.__init__(self, server, **options)
        #: What its client had not read when that was first seen, and when.
        self._unread: tuple[int, float] | None = None
        self._body: Any = None
        self._refused = False

    # --- aiohttp's hooks ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It was accepted."""
        super().connection_made(transport)
        self._join(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It has ended."""
        self._connections.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
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
        """Its client reads more slowly than we write."""
        super().pause_writing()
        self._connections.check_unread(self)

    def handle_error(self, *args: Any, **kwargs: Any) -> web.StreamResponse:
        """Answer what is no HTTP, without the name of the library and its version."""
        response = super().handle_error(*args, **kwargs)
        response.headers["Server"] = SERVER
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, and let go of its body: aiohttp keeps the last answer of a connection that is idle."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if isinstance(resp, web.Response):
                resp.body = None

    # --- the way of a request -------------------------------------------------------------------

    def begun(self, body: Any) -> None:
        """A head has arrived.

        Parameters:
            body: aiohttp's stream of it.
        """
        self._body = body
        if body.is_eof():
            self.whole()

    def whole(self) -> None:
        """A request has arrived whole."""
        if self.busy:
            return
        self._body = None
        self.requests += 1
        self._connections.work(self)

    # --- its end --------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """End it if its time is over."""
        if self._wire is None:
            return
        if self.unsent:
            size, since = self._unread = self._unread or (self.unsent, now)
            if size - self.unsent < (now - since - READ_GRACE_TIMEOUT) * READ_RATE:
                self._wire.abort()
            return
        self._unread = None
        if self.busy or self._body is not None:  # whoever reads a body has a limit of its own
            return
        if self._refused and now - self.since > LINGER_TIMEOUT:
            self._wire.abort()
        elif (self.held or not self.requests) and now - self.since > HEAD_TIMEOUT:
            self.end()

    def end(self) -> None:
        """End it, whatever it waits for; a request that has begun is answered 408, as one to be sent again."""
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
                self.close()  # what is in hand is answered, and nothing more is read
        elif self._body is None:
            if not self._messages:  # aiohttp's own: heads that are whole, and begin with the loop's next turn
                self._refuse(_TOO_LONG)
        elif self.held > HEAD_LIMIT + (1 + OVERHEAD) * self._body.total_bytes:
            self._refuse(_NO_BODY)

    def _refuse(self, why: tuple[bytes, bytes]) -> None:
        """Answer, and read on for a while: a client that still sends would not see the answer otherwise."""
        self._refused = True
        if self._wire is not None and not self.unsent and self._body is None:
            self._wire.write(_answer(*why))
            self.wait()
        else:
            self.force_close()


class Connections:
    """Those of one port.

    Parameters:
        limit: connections at most.
        place: for the log, such as "port 9000".
    """

    def __init__(self, limit: int, place: str = "") -> None:
        self.limit: int = _within_files(limit)
        self.place: str = place
        #: What all unfinished requests may hold, in bytes.
        self.room: int = UNFINISHED
        #: What they hold.
        self.held: int = 0
        self._all: dict[Counted, None] = {}
        self._unread: dict[Counted, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ended = 0
        self._told = -LOG_INTERVAL

    def __len__(self) -> int:
        return len(self._all)

    def close(self) -> None:
        """End all that are left."""
        for connection in list(self._all):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- from the connections -------------------------------------------------------------------

    def add(self, connection: Counted) -> None:
        """One was accepted."""
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
        """One has ended."""
        self._all.pop(connection, None)
        self._unread.pop(connection, None)
        self.held -= connection.held
        connection.held = 0

    def work(self, connection: Counted) -> None:
        """A whole request is in hand."""
        connection.busy = True
        self.held -= connection.held
        connection.held = 0

    def hold(self, connection: Counted, cost: int) -> None:
        """It holds more."""
        if connection in self._all:
            connection.held += cost
            self.held += cost

    def check_held(self) -> None:
        """End the slowest when all hold too much together."""
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
        """End those that have left the most unread for the longest time."""
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
        """End connections that wait, of whichever peer has the most, while `more()`.

        Parameters:
            weight: what one counts.
            order: of two of one peer, the lesser ends first.
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
                "%s: %d connections were ended, the slowest first, because there were more than %d, or because "
                "unfinished requests or unread answers held too much.",
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
        """The protocol of a new connection."""
        options = {name: value for name, value in self._options.items() if name != "request_factory"}
        return _Connection(self, self._limits, loop=asyncio.get_running_loop(), **options)


def peer_of(name: object) -> str:
    """Who is at the other end: an address, or the network of 64 bits that one IPv6 host has to itself."""
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
    """No more connections than three quarters of the files that this process may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit if files == resource.RLIM_INFINITY else max(1, min(limit, files * 3 // 4))


def _answer(status: bytes, why: bytes) -> bytes:
    body = b'{"error":"' + why + b'"}'
    return (
        b"HTTP/1.1 " + status + b"\r\nServer: streamtools\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
