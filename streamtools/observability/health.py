"""Liveness and readiness of every consumer loop, over HTTP."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any, Final, Protocol

from streamtools.errors import ConfigurationError, ConnectError
from streamtools.observability.port import Request, SmallServer
from streamtools.validation.tokens import Tokens, is_loopback, read_tokens

#: Where the tokens are that open the details.
TOKENS: Final = "HTTP_TOKENS"
#: Headers by which a proxy says that it asks for another machine.
FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
#: Headers by which a browser says that a web page asks, and values that say that none does.
OF_PAGES: Final = ("origin", "sec-fetch-site", "referer")
OF_NONE: Final = (None, "none")


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


#: Path -> whether its answer is 200.
FINE: Final[dict[str, Callable[[Report], bool]]] = {
    "/health": lambda report: True,
    "/health/live": lambda report: report.live,
    "/health/ready": lambda report: report.ready,
}


class HealthServer:
    """Serves `GET /health/live` and `/health/ready` (200 or 503) and `/health` (JSON).

    A connection has one answer, and limits in number, size and time.

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
        self._server = SmallServer(self._answer)

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: the tokens cannot be used.
            ConnectError: the port is taken.
        """
        self._tokens = self._read_tokens()
        try:
            self.port = await self._server.start(self.host, self.port)
        except OSError as error:
            raise ConnectError(
                f"Health endpoints cannot listen on {self.host}:{self.port}: {error.strerror or error}. "
                "Choose another health_port.",
                permanent=True,
            ) from error

    async def stop(self) -> None:
        """Stop listening. Safe to repeat."""
        await self._server.stop()

    @staticmethod
    def _read_tokens() -> Tokens:
        try:
            return Tokens(read_tokens(os.environ.get(TOKENS, ())))
        except ValueError as error:
            raise ConfigurationError(f"{TOKENS} cannot be used: {error}.") from None

    def _may_see(self, request: Request) -> bool:
        """Whether the details are for who asks: from this machine, or with a token."""
        headers = request.headers
        if self._tokens.accept(headers.get("authorization")):
            return True
        if not is_loopback(request.peer) or not _is_own_name(headers.get("host", "")):
            return False
        return not any(name in headers for name in FORWARDED) and all(headers.get(n) in OF_NONE for n in OF_PAGES)

    async def _answer(self, request: Request) -> tuple[int, object]:
        fine = FINE.get(request.path)
        if fine is None or request.method not in ("GET", "HEAD"):
            status = HTTPStatus.NOT_FOUND if fine is None else HTTPStatus.METHOD_NOT_ALLOWED
            return status, {"error": "GET /health, /health/live or /health/ready."}
        found = self._report()
        report = await found if isinstance(found, Awaitable) else found
        brief = {"live": report.live, "ready": report.ready}
        content = report.as_dict() if self._may_see(request) else brief
        return HTTPStatus.OK if fine(report) else HTTPStatus.SERVICE_UNAVAILABLE, content


def _is_own_name(host: str) -> bool:
    """Whether a `Host` is no name that somebody's DNS could give this machine, for a web page to ask it by."""
    name, colon, port = host.rpartition(":")
    name = name if colon and port.isdigit() else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.lower() == "localhost"
    return True
