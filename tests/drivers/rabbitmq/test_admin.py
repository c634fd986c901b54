"""The operator's side: list, create, delete, purge, stats, peek, move."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiormq.abc import AbstractChannel

from streamtools.admin import QueueAdmin
from streamtools.errors import ConnectError, QueueError, SendError
from streamtools.message import ErrorDetails, Message
from streamtools.settings import RabbitMQSettings
from tests.brokers.address import RabbitMQAddress
from tests.brokers.processes import free_ports
from tests.drivers.rabbitmq.conftest import take
from tests.faults.waiting import wait_until


@pytest.fixture
async def admin(rabbitmq_vhost: RabbitMQAddress) -> AsyncIterator[QueueAdmin]:
    settings = RabbitMQSettings.from_url(f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}")
    async with QueueAdmin(url=settings) as opened:
        yield opened


async def test_create_stats_purge_and_delete(admin: QueueAdmin, producer: Any) -> None:
    await admin.create("orders", queue_type="classic")
    await admin.create("orders", queue_type="classic")
    sender = await producer()
    await sender.send_many([b"x"] * 7)

    assert (await admin.stats("orders")).ready == 7
    assert await admin.purge("orders") == 7
    await admin.delete("orders")
    for call in (admin.stats, admin.purge, admin.delete, admin.peek):
        with pytest.raises(QueueError, match="no queue 'orders'"):
            await call("orders")


async def test_a_difference_is_an_error_on_creation(admin: QueueAdmin) -> None:
    await admin.create("orders", queue_type="classic")

    with pytest.raises(QueueError, match="x-queue-type"):
        await admin.create("orders", queue_type="quorum")


async def test_list_shows_every_queue(admin: QueueAdmin, producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send_many([b"x"] * 3)
    await consumer("payments")

    async def listed() -> bool:  # the management plugin's numbers are some seconds old
        rows = {row.name: row for row in await admin.list()}
        return {"orders", "payments", "error"} <= set(rows) and rows["orders"].ready == 3

    await wait_until(listed)


async def test_a_missing_management_api_says_what_to_do(url: str) -> None:
    port = free_ports(1)[0]
    settings = RabbitMQSettings.from_url(f"{url}?management_url=http://guest:s3cret@127.0.0.1:{port}")
    async with QueueAdmin(url=settings) as admin:
        with pytest.raises(ConnectError, match="rabbitmq-plugins enable") as caught:
            await admin.list()

    assert "s3cret" not in str(caught.value)


async def test_a_management_user_that_is_refused_is_named(rabbitmq_vhost: RabbitMQAddress) -> None:
    base = str(rabbitmq_vhost.management_url).replace("guest:guest", "guest:s3cret")
    async with QueueAdmin(url=f"{rabbitmq_vhost.url}?management_url={base}") as admin:
        with pytest.raises(ConnectError, match="'guest'") as caught:
            await admin.list()

    assert "s3cret" not in str(caught.value)


async def test_peek_leaves_everything_in_its_place(admin: QueueAdmin, producer: Any, consumer: Any) -> None:
    sender = await producer()
    await sender.send_many([str(n) for n in range(30)])

    for _ in range(4):
        assert [m.body for m in await admin.peek("orders", 5)] == [str(n).encode() for n in range(5)]

    async def back() -> bool:
        return (await admin.stats("orders")).ready == 30

    await wait_until(back)


async def test_move_puts_failed_messages_back_once(admin: QueueAdmin, producer: Any, consumer: Any) -> None:
    receiver = await consumer(prefetch=300)
    sender = await producer()
    await sender.send_many([str(n) for n in range(250)], headers={"h": "1"})
    for delivery in await take(receiver, 250):
        await delivery.reject("wrong")

    async def failed() -> bool:
        return (await admin.stats("error")).ready == 250

    await wait_until(failed)
    assert await admin.move("error", failed_in=["orders"], where=lambda m: int(m.body) % 2 == 0) == 125

    moved = await take(receiver, 125)
    assert sorted(int(d.message.body) for d in moved) == list(range(0, 250, 2))
    assert all(d.message.attempt == 1 and d.message.error is None for d in moved)
    assert moved[0].message.headers == {"h": "1"}

    async def left() -> bool:
        return (await admin.stats("error")).ready == 125

    await wait_until(left)


async def test_the_connection_is_made_again_when_it_was_cut(admin: QueueAdmin, producer: Any) -> None:
    await producer()
    connection = admin._lease.connection  # type: ignore[attr-defined]
    connection._transport.abort()
    await wait_until(lambda: connection.lost is not None)

    assert (await admin.stats("orders")).ready == 0


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_move_that_is_refused_in_part_moves_the_rest_once(
    admin: QueueAdmin, foreign: AbstractChannel, kind: str
) -> None:
    full = {"x-max-length": 3, "x-overflow": "reject-publish"}
    await foreign.queue_declare("full", durable=True, arguments=full)
    await foreign.queue_declare("parked", durable=True, arguments={"x-queue-type": kind})
    for number in range(6):
        await foreign.basic_publish(b"%d" % number, routing_key="parked")
    await wait_until(lambda: _holds(admin, "parked", 6))

    with pytest.raises(SendError, match="3 moved; 3 stay in 'parked'"):
        await admin.move("parked", "full")

    assert [message.body for message in await admin.peek("full")] == [b"0", b"1", b"2"]
    assert [message.body for message in await admin.peek("parked")] == [b"3", b"4", b"5"]


async def test_a_redrive_to_several_queues_of_which_one_is_gone_repeats_nothing(
    admin: QueueAdmin, foreign: AbstractChannel, producer: Any
) -> None:
    sender = await producer("parked")
    for name in ("here", "gone", "here", "gone", "here"):
        details = ErrorDetails(queue=name, reason="no")
        await sender.send_messages([Message(body=b"x", queue="parked", id=secrets.token_hex(8), error=details)])
    await foreign.queue_declare("here", durable=True)

    with pytest.raises(SendError, match="3 moved; 2 stay in 'parked'"):
        await admin.move("parked", failed_in=["here", "gone"])

    assert [len(await admin.peek(name)) for name in ("here", "parked")] == [3, 2]


async def _holds(admin: QueueAdmin, queue: str, number: int) -> bool:
    return (await admin.stats(queue)).ready == number
