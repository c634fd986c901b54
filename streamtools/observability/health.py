"""Liveness and readiness of every consumer loop, over HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from streamtools.errors import ConfigurationError, ConnectError
from streamtools.installation import install_line
from streamtools.tokens import Tokens, is_loopback, read_tokens

log: logging.Logger = logging.getLogger("streamtools")

#: Where the tokens are that open the details.
TOKENS: Final = "HTTP_TOKENS"
#: Headers by which a proxy says that it asks for another machine.
FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")
#: Headers by which a browser says that a web page asks, and values that say that none does.
OF_PAGES: Final = ("Origin", "Sec-Fetch-Site", "Referer")
OF_NONE: Final = (None, "none")
#: Connections at once. A further one ends the oldest, which has had its answer or does not want one.
CONNECTIONS: Final = 64
#: The longest line of a request and the most headers: nobody who asks for the health needs more.
MAX_LINE: Final = 4096
MAX_HEADERS: Final = 64
#: What answers name, in place of the library and its version.
SERVER: Final = "streamtools"
#: Seconds that an idle connection stays open.
KEEP_ALIVE: Final = 15.0
#: Seconds that answers under way have to go out when the server stops.
CLOSING: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopHealth:
    """One consumer loop.

    Attributes:
        queue: its queue.
        protocol: its protocol's name.
        state: starting, running, reconnecting, restarting, draining, stopped or dead.
        progress: seconds since a delivery was last settled; None before the loop began.
        restarts: how often it was started again after an error.
        in_flight: handlers at work.
    """

    queue: str
    protocol: str
    state: str
    progress: float | None = None
    restarts: int = 0
    in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """Every loop of a runner."""

    loops: list[LoopHealth] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """No loop is dead: restarting the process would not help."""
        return all(loop.state != "dead" for loop in self.loops)

    @property
    def ready(self) -> bool:
        """There are loops, and each is connected and running."""
        return bool(self.loops) and all(loop.state == "running" for loop in self.loops)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"live": self.live, "ready": self.ready, "loops": [asdict(loop) for loop in self.loops]}


class Report(Protocol):
    """The report of the health endpoints."""

    @property
    def live(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    def as_dict(self) -> dict[str, Any]: ...


class HealthServer:
    """Serves `GET /health/live` and `/health/ready` (200 or 503) and `/health` (JSON).

    Parameters:
        host: where to listen.
        port: likewise; 0 takes a free one, which `port` then holds.
        report: called for each request.

    Whoever asks from another machine learns only whether the service is live and ready, unless it shows one of the
    tokens in `HTTP_TOKENS` (`Authorization: Bearer ...`). So does a web page that a browser on this machine shows:
    its requests say so, or ask by a name (`Host`) that is none of this machine.
    """

    def __init__(self, host: str, port: int, report: Callable[[], Report | Awaitable[Report]]) -> None:
        self.host = host
        self.port: int = port
        self._report = report
        self._tokens = Tokens(())
        self._server: Any = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: aiohttp is not installed.
            ConnectError: the port is taken.
        """
        self._tokens = self._read_tokens()
        try:
            self._server = _server(
                self._answer,
                access_log=None,
                logger=_Quiet(),
                keepalive_timeout=KEEP_ALIVE,
                max_line_size=MAX_LINE,
                max_field_size=MAX_LINE,
                max_headers=MAX_HEADERS,
            )
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"Health endpoints need aiohttp. Install it: {install_line('http')}") from error
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._connection, self.host, self.port)
        except OSError as error:
            await self.stop()
            raise ConnectError(
                f"Health endpoints cannot listen on {self.host}:{self.port}: {error.strerror or error}. "
                "Choose another health_port.",
                permanent=True,
            ) from error
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening. Safe to repeat."""
        listener, self._listener = self._listener, None
        server, self._server = self._server, None
        if listener is not None:
            listener.close()
        if server is not None:
            server.pre_shutdown()
            await server.shutdown(CLOSING)

    def _connection(self) -> Any:
        """The protocol of a new connection; there is room for it."""
        for oldest in self._server.connections[: 1 - CONNECTIONS]:
            oldest.force_close()
        return self._server()

    @staticmethod
    def _read_tokens() -> Tokens:
        try:
            return Tokens(read_tokens(os.environ.get(TOKENS, ())))
        except ValueError as error:
            raise ConfigurationError(f"{TOKENS} cannot be used: {error}.") from None

    def _may_see(self, request: Any) -> bool:
        """Whether the details are for who asks: from this machine, or with a token."""
        if self._tokens.accept(request.headers.get("Authorization")):
            return True
        if not is_loopback(request.remote or "") or not _is_own_name(request.host):
            return False
        headers = request.headers
        return not any(name in headers for name in FORWARDED) and all(headers.get(n) in OF_NONE for n in OF_PAGES)

    async def _answer(self, request: Any) -> Any:
        fine = FINE.get(request.path)
        if fine is None or request.method not in ("GET", "HEAD"):
            return _response(404 if fine is None else 405, {"error": "GET /health, /health/live or /health/ready."})
        found = self._report()
        report = await found if isinstance(found, Awaitable) else found
        brief = {"live": report.live, "ready": report.ready}
        content = report.as_dict() if self._may_see(request) else brief
        return _response(200 if fine(report) else 503, content)


#: Path -> whether its answer is 200.
FINE: Final[dict[str, Callable[[Report], bool]]] = {
    "/health": lambda report: True,
    "/health/live": lambda report: report.live,
    "/health/ready": lambda report: report.ready,
}


def _server(handler: Any, **options: Any) -> Any:
    from aiohttp import web  # noqa: PLC0415 - only who asks for health endpoints needs aiohttp

    class Connection(web.RequestHandler):
        """aiohttp's, whose answers to what is no HTTP do not name the library and its version."""

        def handle_error(self, *args: Any, **kwargs: Any) -> web.StreamResponse:
            response = super().handle_error(*args, **kwargs)
            response.headers["Server"] = SERVER
            return response

    class Server(web.Server):
        """aiohttp's, with these connections."""

        def __call__(self) -> web.RequestHandler:
            return Connection(self, loop=asyncio.get_running_loop(), **options)

    return Server(handler, **options)


def _response(status: int, content: dict[str, Any]) -> Any:
    from aiohttp import web  # noqa: PLC0415

    return web.json_response(content, status=status, headers={"Server": SERVER})


def _is_own_name(host: str) -> bool:
    """Whether a `Host` is no name that somebody's DNS could give this machine, for a web page to ask it by."""
    name, colon, port = host.rpartition(":")
    name = name if colon and port.isdigit() else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.lower() == "localhost"
    return True


class _Quiet:
    """A log for aiohttp's server, whose own would quote what strangers send."""

    def debug(self, *args: Any, **kwargs: Any) -> None:
        """Not kept."""

    def exception(self, text: str, *args: Any, exc_info: BaseException | None = None) -> None:
        """Keep what is our own fault."""
        if type(exc_info).__module__.startswith("aiohttp") or isinstance(exc_info, ConnectionError):
            log.debug("A request for the health could not be read (%s).", type(exc_info).__name__)
        else:
            log.error(text, *args, exc_info=exc_info)
