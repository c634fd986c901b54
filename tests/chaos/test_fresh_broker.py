"""Many services that start in the same moment on a broker where nothing has been made yet."""

from __future__ import annotations

import asyncio
import os

from streamtools import ConsumerFactory, ConsumerRunner, Producer
from tests.brokers.rabbitmq import RabbitMQNode
from tests.faults.waiting import wait_until

SERVICES = 20
ROUNDS = int(os.environ.get("STREAMTOOLS_TEST_ROUNDS", "2"))


async def test_services_that_start_at_once_on_a_fresh_broker_all_run(own_rabbitmq: RabbitMQNode) -> None:
    for _ in range(ROUNDS):
        await asyncio.to_thread(own_rabbitmq.fresh_vhost)
        await _round(own_rabbitmq.url)


async def _round(url: str) -> None:
    handled: set[tuple[int, int]] = set()
    runners: list[ConsumerRunner] = []
    for service in range(SERVICES):
        # Connections of its own, as another process would have: the address is another one.
        consumers = ConsumerFactory("rabbitmq", url=f"{url}?heartbeat={60 + service}")

        @consumers.route("shared")
        async def share(message: int) -> None:
            handled.add((-1, message))

        @consumers.route(f"own.{service}")
        async def handle(message: int, service: int = service) -> None:
            handled.add((service, message))

        runners.append(ConsumerRunner(consumers))
    running = [asyncio.create_task(runner.serve()) for runner in runners]
    for service in range(SERVICES):
        async with Producer(f"own.{service}", url=url) as producer, Producer("shared", url=url) as shared:
            await asyncio.gather(producer.send(service), shared.send(service))
    await wait_until(lambda: len(handled) == 2 * SERVICES, timeout=60)
    assert not any(task.done() for task in running)
    for runner in runners:
        runner.stop()
    await asyncio.gather(*running)
