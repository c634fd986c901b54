"""The web apps of examples/web, over real HTTP: a bus beside each of them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from streamtools.testing import eventually
from tests.examples.test_examples import EXAMPLES, ROOT

APPS = ["fastapi_app", "starlette_app", "aiohttp_app", "flask_app"]
#: Requests at once.
MANY = 20


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    return f"sqlite:///{tmp_path}/web.db"


@asynccontextmanager
async def running(app: str, url: str, log: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """The app in a process of its own, asked to end by SIGTERM; a client for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STREAMTOOLS_URL": url, "PORT": str(port)}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, f"{app}.py",
            cwd=EXAMPLES / "web", env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            await eventually(lambda: answers(client), log.name)
            yield client
        process.send_signal(signal.SIGTERM)
        # uvicorn ends by the signal itself, once it has shut down.
        assert await asyncio.wait_for(process.wait(), 30) in (0, -signal.SIGTERM), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def answers(client: aiohttp.ClientSession) -> bool:
    """It takes requests."""
    try:
        return await placed(client) is not None
    except aiohttp.ClientConnectionError:
        return False


async def placed(client: aiohttp.ClientSession) -> list[int]:
    """The numbers of the orders placed."""
    async with client.get("/orders") as response:
        assert response.status == 200
        orders: list[int] = await response.json()
        return sorted(orders)


@pytest.mark.parametrize("app", APPS)
async def test_orders_posted_at_once_are_all_placed_once(app: str, url: str, tmp_path: Path) -> None:
    async with running(app, url, tmp_path / "log") as client:

        async def post(number: int) -> None:
            async with client.post("/orders", json={"id": number, "item": "lamp"}) as response:
                assert response.status == 202, await response.text()
                assert (await response.json())["id"]

        await asyncio.gather(*(post(number) for number in range(MANY)))
        await eventually(lambda: all_placed(client))
        assert await placed(client) == list(range(MANY))


async def all_placed(client: aiohttp.ClientSession) -> bool:
    """As many as were posted."""
    return len(await placed(client)) >= MANY


@pytest.mark.parametrize("app", APPS)
async def test_a_body_that_is_no_order_is_refused(app: str, tmp_path: Path) -> None:
    async with running(app, f"sqlite:///{tmp_path}/web.db", tmp_path / "log") as client:
        async with client.post("/orders", json={"id": "many"}) as response:
            assert response.status == 422, await response.text()


async def test_the_shops_hear_of_each_others_orders(url: str, tmp_path: Path) -> None:
    async with (
        running("flask_app", url, tmp_path / "flask.log") as flask,
        running("fastapi_app", url, tmp_path / "fastapi.log") as fastapi,
        running("aiohttp_app", url, tmp_path / "aiohttp.log") as aio,
    ):
        shops = [flask, fastapi, aio]
        for number, shop in enumerate(shops):
            async with shop.post("/orders", json={"id": number, "item": "lamp"}) as response:
                assert response.status == 202
        for shop in shops:

            async def has_all(shop: aiohttp.ClientSession = shop) -> bool:
                return await placed(shop) == [0, 1, 2]

            await eventually(has_all)
