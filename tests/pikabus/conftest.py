"""Real services of PikaBus, each in a process of its own.

Version 2 is among the test dependencies. Version 1 would shut it out of one environment, so it has a directory of its
own; CI makes it, elsewhere the skipped test says how.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IN_CI

PEER = Path(__file__).with_name("peer.py")
OLD = ["PikaBus==1.3.7", "pika==1.4.4"]
#: Seconds in which anything expected of a peer happens.
PATIENCE = 30


class Peer:
    """A service of PikaBus in another process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.received: list[dict[str, Any]] = []
        self._said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._arrived = asyncio.Event()

    async def listen(self) -> None:
        """Read what it says, until it ends."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "received" in said:
                self.received.append(said)
                self._arrived.set()
            else:
                self._said.put_nowait(said)

    async def ready(self) -> str:
        """Wait until it consumes; its version."""
        said = await asyncio.wait_for(self._said.get(), PATIENCE)
        return str(said["ready"])

    async def tell(self, verb: str, payload: object, **arguments: object) -> None:
        """Have it call a verb of its bus."""
        assert self._process.stdin is not None
        told = {"verb": verb, "payload": payload, **arguments}
        self._process.stdin.write(json.dumps(told).encode() + b"\n")
        await self._process.stdin.drain()
        assert await asyncio.wait_for(self._said.get(), PATIENCE) == {"done": verb}

    async def arrival(self, payload: object, number: int = 1) -> dict[str, str]:
        """Wait until it has received this payload so often; the headers of the last one."""
        async with asyncio.timeout(PATIENCE):
            while len(found := [each for each in self.received if each["received"] == payload]) < number:
                self._arrived.clear()
                await self._arrived.wait()
        headers: dict[str, str] = found[-1]["headers"]
        return headers


StartPeer = Callable[..., Any]


@pytest.fixture(params=["2", "1"], ids=["PikaBus 2", "PikaBus 1"])
def start_peer(request: pytest.FixtureRequest) -> StartPeer:
    """Starts a service: `async with start_peer(url, queue, topic) as peer`."""
    environment = {**os.environ}
    if request.param == "1":
        environment["PYTHONPATH"] = str(old_pikabus())

    @asynccontextmanager
    async def start(url: str, queue: str, topic: str) -> AsyncIterator[Peer]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(PEER), url, queue, topic,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        peer = Peer(process)
        listening = asyncio.create_task(peer.listen())
        try:
            assert (await peer.ready()).startswith(request.param)
            yield peer
        finally:
            process.kill()
            await process.wait()
            await listening

    return start


def old_pikabus() -> Path:
    """The directory with version 1; made in CI."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "streamtools" / OLD[0]
    # Beside uv, which is quicker, and is all that tox's environments have.
    uv = [Path(sys.executable).with_name("uv"), "pip", "install", "--python", sys.executable]
    pip = uv if uv[0].exists() else [sys.executable, "-m", "pip", "install"]
    if not place.exists():
        if not IN_CI:
            pytest.skip(f"PikaBus 1 is not installed. Type: {' '.join(map(str, [*pip, '--target', place, *OLD]))}")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as work:  # a cut-off download is no cache
            subprocess.run([*pip, "-q", "--target", f"{work}/new", *OLD], check=True, timeout=300)
            if not place.exists():  # two may do it at once
                os.rename(f"{work}/new", place)
    return place
