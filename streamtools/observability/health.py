"""Liveness and readiness of every consumer loop, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from streamtools.errors import ConfigurationError, ConnectError
from streamtools.installation import install_line
from streamtools.tokens import Tokens, is_loopback, read_tokens

#: Where the tokens are that open the details.
TOKENS: Final = "HTTP_TOKENS"
#: Headers by which a proxy says that it asks for another machine.
FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")
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
    tokens in `HTTP_TOKENS` (`Authorization: Bearer ...`).
    """

    def __init__(self, host: str, port: int, report: Callable[[], Report | Awaitable[Report]]) -> None:
        self.host = host
        self.port: int = port
        self._report = report
        self._tokens = Tokens(())
        self._runner: Any = None

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: aiohttp is not installed.
            ConnectError: the port is taken.
        """
        try:
            from aiohttp import web  # noqa: PLC0415 - only who asks for health endpoints needs aiohttp
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"Health endpoints need aiohttp. Install it: {install_line('http')}") from error
        self._tokens = self._read_tokens()
        app = web.Application()
        app.router.add_get("/health", self._handler(lambda report: True))
        app.router.add_get("/health/live", self._handler(lambda report: report.live))
        app.router.add_get("/health/ready", self._handler(lambda report: report.ready))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSING, keepalive_timeout=KEEP_ALIVE)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.host, self.port).start()
        except OSError as error:
            await self.stop()
            raise ConnectError(
                f"Health endpoints cannot listen on {self.host}:{self.port}: {error.strerror or error}. "
                "Choose another health_port.",
                permanent=True,
            ) from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening. Safe to repeat."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    @staticmethod
    def _read_tokens() -> Tokens:
        try:
            return Tokens(read_tokens(os.environ.get(TOKENS, "")))
        except ValueError as error:
            raise ConfigurationError(f"{TOKENS} cannot be used: {error}.") from None

    def _may_see(self, request: Any) -> bool:
        """Whether the details are for who asks: from this machine, or with a token."""
        if self._tokens.accept(request.headers.get("Authorization")):
            return True
        return is_loopback(request.remote or "") and not any(name in request.headers for name in FORWARDED)

    def _handler(self, fine: Callable[[Report], bool]) -> Callable[[Any], Any]:
        from aiohttp import web  # noqa: PLC0415

        async def answer(request: web.Request) -> web.Response:
            found = self._report()
            report = await found if isinstance(found, Awaitable) else found
            brief = {"live": report.live, "ready": report.ready}
            content = report.as_dict() if self._may_see(request) else brief
            return web.json_response(content, status=200 if fine(report) else 503)

        return answer
