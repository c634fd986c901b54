"""The users of docs/operate/security.md: with just the permissions that stand there, each does its work."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from streamtools import Binding, Bus, Command, Consumer, Event, Exchange, Producer, Retry
from streamtools.drivers.rabbitmq import RabbitMQAdmin
from streamtools.errors import QueueError, SendError
from tests import rights
from tests.brokers.address import RabbitMQAddress
from tests.brokers.rabbitmq import add_vhost
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until

SHOP = Exchange("shop")
BOUND = [Binding("roles.*", SHOP)]


class Sold(Event, name="roles.Sold"):
    """What is published."""

    id: int


class Ask(Command, name="roles.Ask"):
    """What is asked."""

    id: int


@pytest.fixture
def url_of(rabbitmq_vhost: RabbitMQAddress) -> Iterator[Callable[..., str]]:
    """Makes a user as the page says, in the test's virtual host; its URL."""
    vhost = rabbitmq_vhost.url.rpartition("/")[2]
    made: list[str] = []

    def make(user: str, patterns: dict[str, str] | None = None) -> str:
        allowed, tags = rights.rabbitmq(user)
        name = f"{user}-{secrets.token_hex(4)}"
        made.append(name)
        rabbitmq_vhost.manage("PUT", f"users/{name}", {"password": "little", "tags": tags})
        rabbitmq_vhost.manage("PUT", f"permissions/{vhost}/{name}", patterns or allowed)
        api = quote(str(rabbitmq_vhost.management_url).replace("guest:guest", f"{name}:little"), safe="")
        url = rabbitmq_vhost.url.replace("guest:guest@", f"{name}:little@")
        return f"{url}?management_url={api}"

    yield make
    for name in made:
        rabbitmq_vhost.manage("DELETE", f"users/{name}")


@pytest.fixture
async def deployed(url_of: Callable[[str], str]) -> None:
    """All that is there before the services: made by the user who may."""
    url = url_of("deployer")
    async with Consumer("orders", url=url, bindings=BOUND) as consumer, Producer("orders", url=url) as producer:
        await producer.send(b"", delay=0.2)
        (delivery,) = await consumer.receive(timeout=20)
        await delivery.ack()


pytestmark = pytest.mark.usefixtures("deployed")


async def test_a_sender_sends_and_does_no_more(url_of: Any, consumer: Any) -> None:
    url = url_of("sender")
    async with Producer("orders", url=url) as producer:
        await producer.send(b"x")
    assert await take(await consumer(), 1)
    with pytest.raises(QueueError):
        await Consumer("orders", url=url).open()


async def test_a_publisher_publishes_and_does_no_more(url_of: Any, consumer: Any) -> None:
    bus = Bus(url=url_of("publisher"))
    async with bus:
        await bus.publish(Sold(id=1), exchange=SHOP)
        with pytest.raises(SendError):
            await bus.send(Ask(id=1), to="orders")
    assert await take(await consumer(), 1)


async def test_a_worker_retries_delays_and_rejects(url_of: Any, producer: Any, consumer: Any) -> None:
    attempts: list[int] = []
    receiver = Consumer("orders", url=url_of("worker"), retry=Retry(retries=1, delay=0.1))

    @receiver()
    async def handle(message: int) -> None:
        attempts.append(message)
        raise ValueError("never")

    running = asyncio.create_task(handle())
    await (await producer()).send(1)
    (failed,) = await take(await consumer("error"), 1)
    assert failed.message.error is not None and attempts == [1, 1]
    receiver.stop()
    await running


async def test_a_subscriber_binds_and_handles(url_of: Any, url: str) -> None:
    async with Consumer("orders", url=url_of("subscriber"), bindings=[Binding("more.*", SHOP), *BOUND]) as consumer:
        async with Bus(url=url) as bus:
            await bus.publish(Sold(id=1), "more.sold", exchange=SHOP)
        (delivery,) = await consumer.receive(timeout=20)
        await delivery.ack()


async def test_a_requester_asks_and_is_answered(url_of: Any, url: str) -> None:
    service = Bus("orders", url=url)

    @service.handler
    async def answer(ask: Ask) -> Any:
        return Sold(id=ask.id)

    site = Bus(url=url_of("requester"), client_id="site")
    async with service, site:
        await service.start()
        reply = await site.request(Ask(id=7), to="orders", timeout=20)
    assert "7" in str(reply)


async def test_an_operator_lists_looks_and_puts_back(url_of: Any, producer: Any, url: str) -> None:
    receiver = Consumer("orders", url=url, retry=Retry(retries=0))

    @receiver()
    async def handle(message: int) -> None:
        raise ValueError("never")

    running = asyncio.create_task(handle())
    await (await producer()).send(1)
    async with RabbitMQAdmin(url=url_of("operator")) as admin:

        async def failed() -> bool:
            return (await admin.stats("error")).ready == 1

        await wait_until(failed)
        receiver.stop()
        await running
        assert len(await admin.peek("error", 5)) == 1
        assert await admin.move("error", "orders") == 1
        assert (await admin.stats("orders")).ready == 1
        assert {"orders", "error"} <= {info.name for info in await admin.list()}


# --- none of it can be left out -------------------------------------------------------------------


async def _deploys(url: str) -> None:
    async with Consumer("orders", url=url, bindings=BOUND) as consumer, Producer("orders", url=url) as producer:
        await producer.send(b"", delay=0.01)
        (delivery,) = await consumer.receive(timeout=20)
        await delivery.ack()


async def _sends(url: str) -> None:
    async with Producer("orders", url=url) as producer:
        await producer.send(b"x")


async def _publishes(url: str) -> None:
    async with Bus(url=url) as bus:
        await bus.publish(Sold(id=1), exchange=SHOP)


async def _works(url: str) -> None:
    consumer = Consumer("orders", url=url, retry=Retry(retries=1, delay=0.6))

    @consumer()
    async def handle(message: Any) -> None:
        raise ValueError("never")

    await handle()


async def _subscribes(url: str) -> None:
    async with Consumer("orders", url=url, bindings=[Binding(f"more.{secrets.token_hex(2)}", SHOP)]) as consumer:
        (delivery,) = await consumer.receive(timeout=20)
        await delivery.retry()
        await consumer.receive(timeout=20)


async def _asks(url: str) -> None:
    async with Bus(url=url, client_id="site") as site:
        await site.request(Ask(id=7), to="orders", timeout=20)


async def _operates(url: str) -> None:
    async with RabbitMQAdmin(url=url) as admin:
        await admin.list()
        await admin.peek("error", 5)
        await admin.move("error", "orders")
        await admin.peek("orders", 5)


USES: dict[str, Callable[[str], Awaitable[None]]] = {
    "deployer": _deploys, "sender": _sends, "publisher": _publishes, "worker": _works, "subscriber": _subscribes,
    "requester": _asks, "operator": _operates,
}  # fmt: skip


def lesser(user: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The user's patterns, each time without one of the names."""
    patterns, _ = rights.rabbitmq(user)
    for kind, pattern in patterns.items():
        names = pattern.removeprefix("^").removesuffix("$").removeprefix("(").removesuffix(")").split("|")
        for name in filter(None, names):
            rest = "|".join(other for other in names if other != name)
            yield f"{kind} {name}", patterns | {kind: f"^({rest})$" if rest else "^$"}


#: What is said where a right is missing: by the broker, by what asks it first, and where retries wait otherwise.
SIGNS = (
    "refused for user",
    "may not write to",
    "hold delayed messages are missing",
    "waits in this process for its retry",
)


@pytest.mark.slow
async def test_no_right_can_be_left_out(
    url_of: Any, url: str, rabbitmq_vhost: RabbitMQAddress, caplog: pytest.LogCaptureFixture
) -> None:
    enough = []
    for user, use in USES.items():
        for missing, patterns in lesser(user):
            if user == "deployer":  # it makes what is not there
                rabbitmq_vhost.manage("DELETE", f"vhosts/{url.rpartition('/')[2]}")
                add_vhost(rabbitmq_vhost, url.rpartition("/")[2])
            else:
                async with Consumer("orders", url=url, bindings=BOUND), Producer("orders", url=url) as producer:
                    await producer.send({"x": 1})
                    await producer.send(b"", delay=0.01)
                async with Producer("error", url=url) as producer:
                    await producer.send(b"x")
            if not await fails(use(url_of(user, patterns)), caplog):
                enough.append(f"{user}: {missing}")
    assert enough == []


async def fails(work: Awaitable[None], caplog: pytest.LogCaptureFixture) -> bool:
    """Do it until it ends, or until what is said shows that a right is missing."""
    caplog.clear()
    task = asyncio.ensure_future(work)
    await wait_until(lambda: task.done() or any(sign in caplog.text for sign in SIGNS))
    task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    return any(sign in f"{caplog.text} {result!r}" for sign in SIGNS)
