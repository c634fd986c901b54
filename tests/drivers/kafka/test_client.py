"""Ending the client library's objects, whatever they do, and reaching into them from one room alone."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient

from streamtools import Closed, KafkaSettings
from streamtools.drivers import kafka as driver
from streamtools.drivers.kafka.client.connect import stopped
from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.producing.publisher import Publisher
from streamtools.drivers.kafka.producing.sender import Sender
from streamtools.drivers.kafka.producing.transactions import TransactionalProducer
from tests.brokers.kafka.address import KafkaAddress


class Stubborn:
    """Ends by cancelling its caller, as the library does when it is closed in the middle of an error."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        task = asyncio.create_task(asyncio.sleep(3600))
        task.cancel()
        await task


class Silent(Stubborn):
    async def stop(self) -> None:
        await asyncio.Event().wait()


async def test_a_stray_cancellation_in_a_librarys_stop_is_none_of_ours() -> None:
    await stopped(Stubborn())


async def test_a_stop_that_never_ends_is_given_up_and_our_own_cancellation_goes_through() -> None:
    await stopped(Silent(), timeout=0.01)
    task = asyncio.create_task(stopped(Silent()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_connection_that_is_made_while_its_client_ends_is_closed(kafka: KafkaAddress) -> None:
    client = AIOKafkaClient(bootstrap_servers=kafka.bootstrap)
    harden(client)
    await client.bootstrap()
    [broker, *_] = client.cluster.brokers()
    connecting = asyncio.create_task(client._get_conn(broker.nodeId))
    await asyncio.sleep(0)
    await client.close()
    assert await connecting is None
    assert not any(connection.connected() for connection in client._conns.values())


async def test_a_client_that_starts_while_its_owner_is_closed_is_ended(
    kafka: KafkaAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end sees no client yet; the start would leave one that nobody ends."""
    settings = KafkaSettings(host=kafka.bootstrap)
    made: list[Any] = []
    start = AIOKafkaProducer.start

    async def closed_meanwhile(client: Any) -> None:
        await start(client)
        made.append(client)
        await owner.close()

    monkeypatch.setattr(AIOKafkaProducer, "start", closed_meanwhile)
    owners: list[Any] = [TransactionalProducer(settings, f"id-{token_hex(4)}", "test"), Publisher(settings, "test")]
    for owner in owners:
        with pytest.raises(Closed):
            await owner.open()
        assert made[-1]._closed
        assert not any(connection.connected() for connection in made[-1].client._conns.values())


async def test_a_sender_that_is_closed_while_it_connects_lets_go_of_the_shared_client(
    kafka: KafkaAddress,
) -> None:
    sender = Sender(KafkaSettings(host=kafka.bootstrap), f"test-{token_hex(4)}")
    opening = asyncio.create_task(sender.open())
    await asyncio.sleep(0)
    await sender.close()
    with pytest.raises(Closed):
        await opening
    # What it leaves open is seen at the end of the test.


def test_only_the_client_room_uses_private_names_of_the_library() -> None:
    """A private name is used of oneself, or of another object of the same class."""
    room = Path(driver.__file__).parent
    ours = re.compile(r"\b(?:self|cls|here|fresh|other)\._[a-z]|super\(\)\._[a-z]")
    for path in room.rglob("*.py"):
        if path.parent.name == "client":
            continue
        for line in path.read_text().splitlines():
            assert not re.search(r"[\w)\]]\._[a-z]", ours.sub("", line)), f"{path.relative_to(room)}: {line.strip()}"
            assert not re.search(r"from aiokafka.* import .*\b_[a-zA-Z]", line), f"{path.relative_to(room)}: {line}"
