"""Requests of other programs, whose replies can never be sent."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from streamtools import Bus, ConsumerRunner, Message, Producer, QueueAdmin, Retry
from streamtools.testing import eventually
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.foreign import AMQP, content_header, entry, sized

#: Requests that are sent, of which the handler fails every second one.
NUMBER = 20


async def served(url: str, queue: str, publish: Any) -> list[Message]:
    """Run a bus over such requests, and a plain one behind them; what its error queue holds."""
    bus = Bus(queue, url=url, retry=Retry(retries=1, delay=0, jitter=0), error_queue=f"{queue}.error", prefetch=10)
    runs: list[int] = []

    @bus.handler
    async def answer(msg: dict[str, Any], message: Message) -> str:
        runs.append(msg["n"])
        if msg["n"] % 2:
            raise ValueError("no answer")
        return "an answer"

    async with ConsumerRunner(bus) as runner, QueueAdmin(url=url) as admin:
        await publish()

        async def all_failed() -> bool:
            return len(await admin.peek(f"{queue}.error", 100)) >= NUMBER // 2

        await eventually(all_failed, "each that failed is in the error queue, once", timeout=15)
        await eventually(lambda: set(runs) == set(range(NUMBER)), "each was run")
        [loop] = runner.health().loops
        await eventually(lambda: not bus_in_hand(runner), "nothing is held back")
        assert loop.restarts == 0
        found = list(await admin.peek(f"{queue}.error", 100))
    # Its success is not its failure: none of the even ones was run again for the sake of its reply.
    assert sorted(runs) == sorted([*range(NUMBER), *range(1, NUMBER, 2)])
    return found


def bus_in_hand(runner: ConsumerRunner) -> int:
    """Deliveries that the loop has in hand."""
    return sum(consumer._loop.in_hand for consumer in runner.consumers if consumer._loop is not None)


@pytest.mark.parametrize("address", ["x" * 300, "ü" * 200], ids=["300 bytes", "400 bytes"])
async def test_a_reply_to_an_address_that_amqp_cannot_name_costs_nothing_else(
    rabbitmq_vhost: RabbitMQAddress, address: str
) -> None:
    queue = f"asked-{secrets.token_hex(4)}"

    async def publish() -> None:
        texts = {"streamtools-intent": "request", "streamtools-replyto": address}
        headers = b"".join(entry(name.encode(), sized(b"S", text.encode())) for name, text in texts.items())
        publisher = AMQP(rabbitmq_vhost.url)
        await publisher.open()
        for n in range(NUMBER):
            header = content_header((b"application/json", None, headers, None, None, b"r%d" % n, None, None, None))
            assert await publisher.publish(queue, b'{"n": %d}' % n, header)
        await publisher.close()

    url = f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}"
    found = await served(url, queue, publish)
    assert sorted(m.id for m in found) == sorted(f"r{n}" for n in range(1, NUMBER, 2))


@pytest.mark.parametrize("address", ["x" * 70_000, "no topic of Kafka's: /", ".."])
async def test_a_reply_to_a_topic_that_cannot_be_costs_nothing_else(kafka: KafkaAddress, address: str) -> None:
    queue = f"asked-{secrets.token_hex(4)}"

    async def publish() -> None:
        headers = [("ce_intent", b"request"), ("ce_replyto", address.encode()), ("content-type", b"application/json")]
        async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap) as producer:
            for n in range(NUMBER):
                await producer.send(queue, b'{"n": %d}' % n, headers=[*headers, ("ce_id", b"r%d" % n)])

    found = await served(kafka.url, queue, publish)
    assert sorted(m.id for m in found) == sorted(f"r{n}" for n in range(1, NUMBER, 2))


async def test_a_reply_to_a_queue_that_is_full_holds_nothing_up(rabbitmq_vhost: RabbitMQAddress) -> None:
    url = f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}"
    queue, full = f"asked-{secrets.token_hex(4)}", f"full-{secrets.token_hex(4)}"
    runs: list[int] = []
    bus = Bus(queue, url=url, prefetch=10)

    @bus.handler
    async def answer(msg: dict[str, Any]) -> str:
        runs.append(msg["n"])
        return "an answer"

    async with QueueAdmin(url=url) as admin:
        await admin.create(full, queue_type="classic", arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
        async with Producer(full, url=url, declare=False) as producer:
            await producer.send("full now")
        async with ConsumerRunner(bus) as runner, Producer(queue, url=url, declare=False) as producer:
            asked = Message(body=b"", queue=queue, id="", content_type="application/json", intent="request")
            await producer.send_messages(
                [asked.replace(id=f"r{n}", body=b'{"n": %d}' % n, reply_to=full) for n in range(200)]
            )
            # To try each reply for as long as another message would take a second for each prefetch.
            await eventually(lambda: len(runs) == 200 and not bus_in_hand(runner), "each is settled", timeout=10)
    assert sorted(runs) == list(range(200))
