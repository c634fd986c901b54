"""Other programs on the same broker: who subscribes knows the topic, and who asks is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import pytest

from streamtools import Bus, Consumer, Message, Retry
from streamtools.exchange import Binding, Exchange
from streamtools.testing.waiting import eventually
from tests.brokers.address import RabbitMQAddress
from tests.bus.conftest import SOON, MakeBus
from tests.bus.contracts import OrderShipped
from tests.bus.test_outbox import Fails, routed


async def test_a_subscriber_of_many_topics_knows_which_one_it_was(make: MakeBus) -> None:
    fails, seen = Fails(), []
    logs = make("logs", subscriptions=["logs.#", "shipping.#"], retry=SOON)

    @logs.handler
    async def note(message: Message) -> None:
        seen.append((message.topic, message.queue, message.attempt))
        fails()

    async with logs, make("asks") as other:
        await other.publish({"n": 1}, "logs.web.error")
        await eventually(lambda: len(seen) == 3)
        await other.publish(OrderShipped(id=1))
        await other.send({"n": 1}, "logs")
        await eventually(lambda: len(seen) == 5)
    assert seen[:3] == [("logs.web.error", "logs", attempt) for attempt in (1, 2, 3)]
    assert set(seen[3:]) == {(None, "logs", 1), ("shipping.eu.shipped", "logs", 1)}


@pytest.fixture
async def channel(rabbitmq_vhost: RabbitMQAddress) -> AsyncIterator[Any]:
    """Another program's channel."""
    async with await aio_pika.connect(rabbitmq_vhost.url) as connection:
        yield await connection.channel()


async def test_the_topic_of_what_another_program_publishes_is_known(
    rabbitmq_vhost: RabbitMQAddress, channel: Any
) -> None:
    consumer = Consumer(
        "logs", url=rabbitmq_vhost.url, bindings=[Binding("kern.*", Exchange("syslog", type="topic"))]
    )
    async with consumer:
        exchange = await channel.get_exchange("syslog")
        await exchange.publish(aio_pika.Message(b"disk full"), "kern.critical")
        await channel.default_exchange.publish(aio_pika.Message(b"to the queue"), "logs")
        first = (await consumer.receive(timeout=20))[0]
        second = (await consumer.receive(timeout=20))[0]
        assert [first.message.topic, second.message.topic] == ["kern.critical", None]
        await second.ack()
        await first.retry(0.01)  # by the chain of delays, which is no topic of its own
        again = (await consumer.receive(timeout=20))[0]
        assert (again.message.topic, again.message.attempt) == ("kern.critical", 2)
        await again.ack()


@pytest.mark.parametrize("place", ["route", "bus"])
@pytest.mark.parametrize("reply", ["named by the broker", "direct reply-to", "of its own name"])
async def test_a_request_of_another_program_is_answered_by_what_the_handler_returns(
    rabbitmq_vhost: RabbitMQAddress, channel: Any, place: str, reply: str
) -> None:
    url = rabbitmq_vhost.url
    answers: asyncio.Queue[Any] = asyncio.Queue()

    async def double(msg: Any) -> dict[str, int]:
        return {"twice": 2 * msg["n"]}

    if reply == "direct reply-to":
        name = "amq.rabbitmq.reply-to"
        queue = await channel.get_queue(name, ensure=False)
        await queue.consume(answers.put, no_ack=True)
    else:
        queue = await channel.declare_queue("" if reply == "named by the broker" else "my answers", exclusive=True)
        name = queue.name
        await queue.consume(answers.put, no_ack=True)
    question = aio_pika.Message(b'{"n": 21}', correlation_id="rpc-1", reply_to=name)
    if place == "route":
        async with routed(url, double):
            await channel.default_exchange.publish(question, "work")
            answer = await asyncio.wait_for(answers.get(), 20)
    else:
        bus = Bus("work", url=url, retry=Retry(retries=0))

        @bus.handler
        async def take(msg: dict[str, Any]) -> dict[str, int]:
            return await double(msg)

        async with bus:
            await channel.default_exchange.publish(question, "work")
            answer = await asyncio.wait_for(answers.get(), 20)
    assert (answer.body, answer.correlation_id) == (b'{"twice":42}', "rpc-1")
