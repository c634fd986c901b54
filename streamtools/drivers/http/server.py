"""SharedServer: the server of one host and port in one event loop, which all its consumers share."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from contextlib import suppress
from typing import Any, ClassVar, Final
from urllib.parse import unquote_to_bytes, urlsplit
from weakref import WeakKeyDictionary, WeakValueDictionary

from aiohttp import web
from aiohttp.http import HttpProcessingError, RawRequestMessage
from yarl import URL

from streamtools.drivers.http import responses
from streamtools.drivers.http.access import Access
from streamtools.drivers.http.connections import Connections, Door, _Connection, _Server
from streamtools.drivers.http.headers import PLAIN_LIMIT, size_of
from streamtools.drivers.http.request_queue import RequestQueue, attempt_of
from streamtools.errors import ConfigurationError, ConnectError

log: logging.Logger = logging.getLogger("streamtools")

#: The longest header, in bytes: all 64 KiB of user headers, percent-encoded in one header.
MAX_FIELD: Final = 200 * 1024
#: The most headers of one request: those of the user, and those that this library, the client and proxies add.
MAX_HEADERS: Final = PLAIN_LIMIT + 128
#: The longest request line, in bytes.
MAX_LINE: Final = 64 * 1024
#: An idle connection stays open for this many seconds.
KEEP_ALIVE_TIMEOUT: Final = 75.0
#: The rest of a refused body is read for this many seconds, so that its sender sees the answer.
LINGER_TIMEOUT: Final = 3.0
#: When the server closes, each of its two steps may take this many seconds to send the last responses.
CLOSE_TIMEOUT: Final = 1.0
#: After a longer head (in bytes) the connection is closed: an idle connection of aiohttp keeps its last head.
LARGE_HEAD: Final = 16 * 1024
#: At least this many of the largest bodies may arrive at the same time.
LARGEST: Final = 4
#: Stands in for a target that cannot be read.
ROOT: Final[URL] = URL("/")
#: The most connections that wait to be accepted.
BACKLOG: Final = 1024

Key = tuple[str, int]


class SharedServer:
    """Serves the request queues of one host and port, from the first that joins until the last has left.

    When a consumer has left its path, requests to that path are answered 503, not 404, while the server lives: during
    a restart of the consumer, senders try again.
    """

    #: The servers by event loop. References are weak, so that a server ends with its consumers.
    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[Key, SharedServer]]] = (
        WeakKeyDictionary()
    )

    def __init__(self, key: Key, tls: ssl.SSLContext | None, terms: object, access: Access, connections: int) -> None:
        self._key = key
        self._tls = tls
        #: The settings from which the TLS context was made, to compare them.
        self.terms = terms
        self.access = access
        self._request_queues: dict[str, dict[str, RequestQueue]] = {}
        self._starting = asyncio.Lock()
        self._listener: asyncio.Server | None = None
        self._http: _Server | None = None
        self._connections = Connections(connections, f"port {key[1]}")
        #: The host and the port; once the server listens, the port that it really has.
        self.address: tuple[str, int] = key

    @classmethod
    def of(
        cls, host: str, port: int, tls: ssl.SSLContext | None, terms: object, access: Access, connections: int
    ) -> SharedServer:
        """Return the server of this host and port in the running loop; make it if there is none.

        Raises:
            ConfigurationError: another consumer listens there with other TLS settings or other access rules.
        """
        servers = cls._all.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        server = servers.get((host, port))
        if server is None:
            server = servers[host, port] = cls((host, port), tls, terms, access, connections)
        if (server.terms, server.access) != (terms, access):
            raise ConfigurationError(
                f"Consumers on {host}:{port} share one port, so they need the same TLS settings (scheme, certfile, "
                "keyfile, client_ca), and the same tokens, hosts and origins."
            )
        return server

    async def join(self, path: str, requests: RequestQueue) -> None:
        """Serve the requests to a path (not percent-encoded); the first path makes the server listen.

        Raises:
            ConfigurationError: another consumer has this path and method.
            ConnectError: the server cannot listen on the port.
        """
        methods = self._request_queues.setdefault(path, {})
        before = methods.get(requests.method)
        if before is not None and not before.closed:
            raise ConfigurationError(
                f"Another consumer takes {requests.method} {path} on port {self._key[1]} already. Give one of them "
                'another queue, another port=, or another method= (as in method="GET").'
            )
        methods[requests.method] = requests
        self._connections.room = max(self._connections.room, LARGEST * requests.max_body)
        try:
            async with self._starting:
                if self._listener is None:
                    await self._listen()
        except BaseException:
            requests.close()
            if not self._any_left():
                self._forget()
            raise

    def drain(self) -> None:
        """Accept no more connections once every consumer here has stopped."""
        if all(requests.stopped for requests in self._each()):
            self._forget()
            if self._listener is not None:
                self._listener.close()

    async def leave(self) -> None:
        """Close the server if all its request queues are closed."""
        if self._any_left():
            return
        self._forget()
        listener, self._listener = self._listener, None
        http, self._http = self._http, None
        if listener is None or http is None:
            return
        listener.close()
        http.pre_shutdown()  # closes idle connections now, and busy ones after their answer
        await http.shutdown(CLOSE_TIMEOUT)
        self._connections.close()
        with suppress(TimeoutError):  # the sockets are closed; only the transports may take longer
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await listener.wait_closed()

    def _any_left(self) -> bool:
        return any(not requests.closed for requests in self._each())

    def _each(self) -> list[RequestQueue]:
        return [requests for methods in self._request_queues.values() for requests in methods.values()]

    def _forget(self) -> None:
        servers = self._all.get(asyncio.get_running_loop())
        if servers is not None and servers.get(self._key) is self:
            del servers[self._key]

    # --- listening ------------------------------------------------------------------------------

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        host, port = self._key
        connections = self._connections
        self._http = _Server(
            self._handle,
            connections,
            request_factory=_make_request,
            auto_decompress=False,  # RequestQueue decompresses: aiohttp accepts a body that was cut short
            access_log=None,
            logger=_Quiet(),
            max_line_size=MAX_LINE,
            max_field_size=MAX_FIELD,
            max_headers=MAX_HEADERS,
            keepalive_timeout=KEEP_ALIVE_TIMEOUT,
            lingering_time=LINGER_TIMEOUT,
        )  # fmt: skip
        try:
            if port == 0:  # use one address only: each address would get another port
                found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
                host = str(found[0][4][0])
            self._listener = await loop.create_server(self._make_protocol, host, port, backlog=BACKLOG)
        except OSError as error:
            raise ConnectError(
                f"Cannot listen on {self._key[0]}:{port}: {error.strerror or error}. Does another process use it? "
                "Choose another port with port=, or HTTP_PORT.",
                permanent=True,
            ) from error
        self.address = self._key[0], self._listener.sockets[0].getsockname()[1]
        log.info("Listening on %s port %d.", *self.address)

    def _make_protocol(self) -> asyncio.Protocol:
        assert self._http is not None
        return self._http() if self._tls is None else Door(self._connections, self._tls, self._http)

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        try:
            found = self._find(request)
            response = await found.handle(request) if isinstance(found, RequestQueue) else found
            if size_of(request.raw_headers) > LARGE_HEAD:
                response.force_close()
            return response
        except Exception:  # an error in this library must end only this request
            log.exception("A request could not be handled.")
            return responses.cut_off(500, "The request could not be handled.")
        finally:
            if isinstance(request.protocol, _Connection):
                request.protocol.wait()

    def _find(self, request: web.BaseRequest) -> RequestQueue | web.Response:
        """The queue that takes a request, or the answer where none does."""
        if (refusal := self.access.refusal(request)) is not None:
            return refusal
        path = _path(request.raw_path)
        if path is None:
            return responses.error_response(400, "The target of the request is not valid.")
        methods = self._request_queues.get(path)
        if methods is None:
            if all(requests.stopped for requests in self._each()):
                response = responses.unavailable(attempt_of(request))
                response.force_close()
                return response
            return responses.error_response(404, f"There is no consumer at {path!r}.")
        requests = methods.get(request.method)
        if requests is None and request.method == "HEAD":
            requests = methods.get("GET")  # aiohttp sends the answer without its body
        if requests is None:
            return responses.wrong_method(request.method, methods)
        return requests


def _make_request(
    message: RawRequestMessage, payload: Any, protocol: Any, writer: Any, task: asyncio.Task[None]
) -> web.BaseRequest:
    loop = task.get_loop()
    protocol.begun(payload)
    if message.path is None:  # `CONNECT` without a target
        message = message._replace(path="", url=ROOT)
    try:
        return web.BaseRequest(message, payload, protocol, writer, task, loop)
    except Exception:  # aiohttp cannot parse some targets, and would keep such a connection open for ever
        return web.BaseRequest(message._replace(url=ROOT), payload, protocol, writer, task, loop)


def _path(raw: str) -> str | None:
    """Return the path of a request's target, percent-decoded; None if the target has no path."""
    path = raw.partition("#")[0].partition("?")[0]
    if not path.startswith("/"):  # a request to a proxy has the whole URL (RFC 9112, section 3.2.2)
        try:
            path = urlsplit(path).path
        except ValueError:  # an unclosed bracket
            return None
    if path.isascii() and "%" not in path:
        return path
    return unquote_to_bytes(path.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")


class _Quiet:
    """The log of aiohttp's server; aiohttp's own log would quote malformed requests, with their secrets."""

    def debug(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    def exception(self, text: str, *args: Any, exc_info: BaseException | None = None) -> None:
        """Log errors of this library; log malformed requests only at debug level, without their content."""
        if isinstance(exc_info, HttpProcessingError):
            log.debug("A malformed request was answered %d (%s).", exc_info.code, type(exc_info).__name__)
        elif isinstance(exc_info, ConnectionError | web.RequestPayloadError):
            log.debug("A request could not be read to its end (%s).", type(exc_info).__name__)
        else:
            log.error(text, *args, exc_info=exc_info)
