"""A file that we make, and the two beside it, are the owner's alone; one that is there keeps its permissions."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamtools.drivers.sqlite import SQLiteAdmin, SQLiteConsumer, SQLiteProducer, schema
from streamtools.errors import ConnectError
from tests.faults.waiting import wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")


@pytest.fixture(autouse=True, params=[0o022, 0o000, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(path: Path) -> dict[str, str]:
    found = {name: path.with_name(path.name + name) for name in ("", "-wal", "-shm")}
    return {name: oct(stat.S_IMODE(file.stat().st_mode)) for name, file in found.items() if file.exists()}


OURS = {"": "0o600", "-wal": "0o600", "-shm": "0o600"}


@pytest.mark.parametrize("kind", [SQLiteProducer, SQLiteConsumer])
async def test_a_new_file_is_the_owners_alone(path: Path, url: str, kind: type) -> None:
    async with kind("orders", url=url):
        assert modes(path) == OURS


async def test_an_operators_new_file_is_too(path: Path, url: str) -> None:
    async with SQLiteAdmin(url=url) as admin:
        await admin.create("orders")
        assert modes(path) == OURS


async def test_what_a_dangling_link_leads_to_is_too(path: Path, url: str, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.db"
    path.symlink_to(target)
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("x")
        assert modes(target) == OURS


async def test_a_file_that_is_there_keeps_its_permissions(path: Path, url: str) -> None:
    path.touch()
    path.chmod(0o640)
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("x")
        assert modes(path) == {"": "0o640", "-wal": "0o640", "-shm": "0o640"}
    async with SQLiteConsumer("orders", url=url) as consumer:
        assert await consumer.receive(timeout=5)
    assert modes(path)[""] == "0o640"


async def test_a_file_that_is_made_anew_under_its_users_is_the_owners_alone(path: Path, url: str) -> None:
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("x")
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()

        async def sent() -> bool:
            try:
                await producer.send("y")
            except ConnectError:
                return False
            return path.exists()

        await wait_until(sent)
        assert modes(path) == OURS


async def test_many_that_make_it_at_once_all_work(path: Path, url: str) -> None:
    async def send(number: int) -> None:
        async with SQLiteProducer(
            "orders", url=f"{url}?busy_timeout={20 + number}"
        ) as producer:  # a thread of its own
            await producer.send(str(number))

    await asyncio.gather(*(send(number) for number in range(12)))
    async with SQLiteAdmin(url=url) as admin:
        assert (await admin.stats("orders")).ready == 12
    assert modes(path)[""] == "0o600"


def test_where_no_node_can_be_made_the_file_is_made_by_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "mknod", refused)
    schema.connect(str(path)).close()
    assert modes(path) == {"": "0o600"}
