"""The broker is killed under a bus in this style."""

from __future__ import annotations

import asyncio

from streamtools import Bus, Producer
from tests.brokers.rabbitmq import RabbitMQNode

PATIENCE = 60


async def test_a_first_send_to_a_queue_waits_until_the_broker_is_back(own_rabbitmq: RabbitMQNode) -> None:
    bus = Bus("ours", url=own_rabbitmq.url, header_style="pikabus", send_timeout=PATIENCE)
    seen: asyncio.Queue[dict[str, int]] = asyncio.Queue()

    @bus.handler
    async def handle(payload: dict) -> None:
        seen.put_nowait(payload)

    async with Producer("other", url=own_rabbitmq.url), bus:
        await bus.send({"id": 0}, to="ours")
        await asyncio.wait_for(seen.get(), PATIENCE)
        await asyncio.to_thread(own_rabbitmq.wait_saved)
        await asyncio.to_thread(own_rabbitmq.kill)

        # "other" is not bound yet, and nobody is there to bind it.
        sending = [asyncio.create_task(bus.send({"id": 1}, to=queue)) for queue in ("ours", "other")]
        await asyncio.to_thread(own_rabbitmq.start)
        await asyncio.wait_for(asyncio.gather(*sending), PATIENCE)

        assert await asyncio.wait_for(seen.get(), PATIENCE) == {"id": 1}
        [delivery] = await bus.receive("other", timeout=PATIENCE)
        assert delivery.message.body == b'{"id":1}'
        await delivery.ack()
