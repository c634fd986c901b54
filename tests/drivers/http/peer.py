"""An HTTP server that answers what a test says, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float


class Peer:
    """What it was asked, and where it is."""

    def __init__(self, answer: Callable[[int], web.StreamResponse]) -> None:
        self.asked: list[Asked] = []
        self.port = 0
        self._answer = answer

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        self.asked.append(Asked(request.method, request.raw_path, request.headers, await request.read(), now))
        try:
            return self._answer(len(self.asked))
        except ConnectionResetError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

    @property
    def attempts(self) -> list[str]:
        return [asked.headers["ce-attempt"] for asked in self.asked]

    @property
    def ids(self) -> set[str]:
        return {asked.headers["ce-id"] for asked in self.asked}


@asynccontextmanager
async def peer(answer: Callable[[int], web.StreamResponse], port: int = 0) -> AsyncIterator[Peer]:
    """A server whose answer to the n-th request (from 1) is `answer(n)`; a ConnectionError hangs up."""
    it = Peer(answer)
    http = web.Server(it.handle, access_log=None)
    listener = await asyncio.get_running_loop().create_server(http, "127.0.0.1", port)
    it.port = listener.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        listener.close()
        http.pre_shutdown()
        await http.shutdown(1)
        await listener.wait_closed()


def hang_up() -> web.StreamResponse:
    """End the connection without an answer."""
    raise ConnectionResetError
