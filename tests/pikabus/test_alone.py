"""Buses that write and read the headers of PikaBus, among themselves, on every protocol with exchanges."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from streamtools import Bus, Command, Event, Message, MessageContext, RemoteError, Retry
from streamtools.testing import eventually

PATIENCE = 30


class Place(Command, name="orders.Place"):
    id: int


class Placed(Event, name="orders.Placed"):
    id: int


@pytest.fixture(params=["asyncio", "sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    return f"sqlite:///{tmp_path}/bus.db" if request.param == "sqlite" else "asyncio://"


async def test_two_of_them_understand_each_other_in_full(url: str) -> None:
    shop = Bus("shop", url=url, header_style="pikabus", header_prefix="Acme", retry=Retry(retries=0))
    ear = Bus("ear", url=url, header_style="pikabus", header_prefix="Acme")
    seen: list[Message] = []
    heard: list[int] = []

    @shop.handler
    async def place(command: Place, message: Message, context: MessageContext) -> int:
        seen.append(message)
        if command.id < 0:
            raise LookupError("no such order")
        await context.publish(Placed(id=command.id))
        return command.id + 1

    @ear.handler
    async def hear(event: Placed, message: Message) -> None:
        seen.append(message)
        heard.append(event.id)

    async with shop, ear:
        requests = [
            ear.request(Place(id=n), to="shop", headers={"tenant": "acme"}, timeout=PATIENCE) for n in range(10)
        ]
        assert await asyncio.gather(*requests) == list(range(1, 11))
        await eventually(lambda: len(heard) == 10)
        assert sorted(heard) == list(range(10))

        [asked, *_] = [message for message in seen if message.intent == "request"]
        assert (asked.version, asked.type, asked.source, asked.headers) == (
            1,
            "orders.Place",
            "ear",
            {"tenant": "acme"},
        )
        told = next(message for message in seen if message.causation_id == asked.id)
        assert (told.intent, told.correlation_id) == ("event", asked.correlation_id)

        with pytest.raises(RemoteError, match="LookupError"):
            await ear.request(Place(id=-1), to="shop", timeout=PATIENCE)


async def test_retries_and_deferred_commands_keep_what_they_are(url: str) -> None:
    bus = Bus("orders", url=url, header_style="pikabus", retry=Retry(retries=2, delay=0.1))
    seen: list[Message] = []

    @bus.handler
    async def place(command: Place, message: Message) -> None:
        seen.append(message)
        raise LookupError("no such order")

    async with bus:
        receipt = await bus.defer(Place(id=1), delay=0.3, to="orders", headers={"tenant": "acme"})
        [failed] = await bus.receive("error", timeout=PATIENCE)
        await failed.ack()

    assert [message.attempt for message in seen] == [1, 2, 3]
    assert {message.id for message in [*seen, failed.message]} == {receipt.id}
    assert all(message.headers == {"tenant": "acme"} for message in seen)
    assert failed.message.error is not None
    assert (failed.message.error.queue, failed.message.error.attempts) == ("orders", 3)
    assert failed.message.headers == {"tenant": "acme"}


async def test_what_is_rejected_by_hand_has_the_headers_too(url: str) -> None:
    bus = Bus("orders", url=url, header_style="pikabus")
    async with bus, Bus(url=url) as plain:  # without the style: as it is on the wire
        await bus.send(Place(id=1), to="orders")
        [delivery] = await bus.receive(timeout=PATIENCE)
        await delivery.reject("not today")
        [failed] = await plain.receive("error", timeout=PATIENCE)
        await failed.ack()

    assert failed.message.headers["PikaBus.SourceQueue"] == "orders"
    assert failed.message.headers["PikaBus.ErrorDetails"] == "not today"


async def test_what_a_handler_sends_to_no_queue_fails_that_message_alone(url: str) -> None:
    bus = Bus("orders", url=url, header_style="pikabus", retry=Retry(retries=0), concurrency=10)

    @bus.handler
    async def place(command: Place, context: MessageContext) -> None:
        await context.send({"of": command.id}, "nowhere" if command.id % 5 == 0 else "others")

    async with bus, Bus("others", url=url, header_style="pikabus") as others:
        await others.declare()
        for number in range(20):
            await bus.send(Place(id=number), to="orders")
        sent, failed = set[int](), set[int]()
        async with asyncio.timeout(PATIENCE):
            while len(sent) < 16 or len(failed) < 4:
                for queue, found, field in (("others", sent, "of"), ("error", failed, "id")):
                    for delivery in await bus.receive(queue, 20, timeout=0.2):
                        found.add(json.loads(delivery.message.body or b"")[field])
                        await delivery.ack()
    assert failed == {0, 5, 10, 15} and sent == set(range(20)) - failed
