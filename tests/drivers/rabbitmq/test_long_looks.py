"""A look at thousands of messages of a quorum queue puts each back once, in its place."""

from __future__ import annotations

import pytest

from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQProducer
from streamtools.message import Message
from tests.brokers.address import RabbitMQAddress

pytestmark = pytest.mark.rabbitmq

#: More than a broker's channel acknowledges at once, however they are taken.
MANY = 6_000


async def fill(url: str, number: int) -> None:
    async with RabbitMQProducer("long", url=url) as producer:
        await producer.send_messages([Message(body=b"x", queue="long", id=str(n)) for n in range(number)])


async def test_a_long_look_puts_each_message_back_once(rabbitmq_vhost: RabbitMQAddress) -> None:
    await fill(rabbitmq_vhost.url, MANY)
    async with RabbitMQAdmin(url=rabbitmq_vhost.url) as admin:
        for limit in (MANY, MANY - 100, MANY):
            assert len(await admin.peek("long", limit)) == limit
            assert (await admin.stats("long")).ready == MANY
        assert [message.id for message in await admin.peek("long", 2 * MANY)] == [str(n) for n in range(MANY)]
