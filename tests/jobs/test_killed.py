"""The broker is killed under a sender and a receiver of job messages."""

from __future__ import annotations

import asyncio

from streamtools.jobs import JobMessage, connect, receive_message
from tests.brokers.rabbitmq import RabbitMQNode

PATIENCE = 60


async def test_every_message_comes_through_a_killed_broker(own_rabbitmq: RabbitMQNode) -> None:
    url = own_rabbitmq.url
    seen: set[int] = set()
    some, all_ = asyncio.Event(), asyncio.Event()

    async def callback(message: JobMessage) -> None:
        seen.add(message.data["n"])
        if len(seen) >= 20:
            some.set()
        if len(seen) == 200:
            all_.set()

    async def send() -> None:
        async with connect(url) as q:
            for n in range(200):
                await q.send_message(title="t", message_type="m", send_from="a", send_to="b", data={"n": n})
                if n == 10:
                    await asyncio.to_thread(own_rabbitmq.wait_saved)

    receiving = asyncio.create_task(receive_message("b", 0, callback, url=url))
    sending = asyncio.create_task(send())
    await asyncio.wait_for(some.wait(), PATIENCE)
    await asyncio.to_thread(own_rabbitmq.restart, force=True)
    await asyncio.wait_for(sending, PATIENCE)
    await asyncio.wait_for(all_.wait(), PATIENCE)
    receiving.cancel()
    await asyncio.wait({receiving})

    assert seen == set(range(200))
