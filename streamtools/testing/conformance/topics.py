"""Cases of exchanges: which queues get a message that is published under a topic."""

from __future__ import annotations

import secrets
from typing import Any, Final

import pytest

from streamtools.errors import ConfigurationError, FeatureError, QueueError, SendError
from streamtools.exchange import Binding, Exchange, ExchangeType
from streamtools.message import Message
from streamtools.testing.conformance.cases import Cases, needs
from streamtools.testing.conformance.payloads import HEADERS
from streamtools.testing.conformance.stage import Stage
from streamtools.testing.waiting import eventually

#: Type of exchange, what a queue is bound by, topics that it has, topics that it has not.
ROUTES: Final[list[tuple[ExchangeType, str, list[str], list[str]]]] = [
    ("direct", "orders.placed", ["orders.placed"], ["orders", "orders.placed.eu", "orders.*"]),
    ("direct", "orders.*", ["orders.*"], ["orders.placed"]),
    ("fanout", "", ["", "orders", "anything.at.all"], []),
    ("topic", "orders.placed", ["orders.placed"], ["orders", "orders.placed.eu"]),
    ("topic", "orders.*", ["orders.placed", "orders."], ["orders", "orders.placed.eu"]),
    ("topic", "*.placed", ["orders.placed"], ["placed", "eu.orders.placed"]),
    ("topic", "orders.#", ["orders", "orders.placed", "orders.placed.eu"], ["order", "eu.orders"]),
    ("topic", "#.placed", ["placed", "orders.placed", "eu.orders.placed"], ["placed.orders"]),
    ("topic", "eu.#.placed.*", ["eu.placed.x", "eu.a.b.placed.x"], ["eu.placed", "us.placed.x"]),
    ("topic", "#", ["", "orders", "orders.placed.eu"], []),
]


def new_exchange(type: ExchangeType = "topic") -> Exchange:  # noqa: A002
    """Return an exchange that no other case uses."""
    return Exchange(f"case-{secrets.token_hex(4)}", type=type)


def to(exchange: Exchange, topic: str, body: bytes = b"x", **fields: Any) -> Message:
    """Return a message to a topic."""
    return Message(body=body, queue=topic, exchange=exchange, id=secrets.token_hex(8), **fields)


class TopicCases(Cases):
    """An event reaches every bound queue once; if no queue is bound, publishing it is an error."""

    @needs("topics")
    @pytest.mark.parametrize(("kind", "pattern", "yes", "no"), ROUTES)
    async def test_a_queue_has_the_topics_that_match(
        self, stage: Stage, kind: ExchangeType, pattern: str, yes: list[str], no: list[str]
    ) -> None:
        exchange = new_exchange(kind)
        consumer = await stage.consumer(bindings=[Binding(pattern, exchange)])
        producer = await stage.producer()
        await producer.send_messages([to(exchange, topic, topic.encode()) for topic in yes])
        for topic in no:
            with pytest.raises(SendError, match="No queue is bound") as caught:
                await producer.send_messages([message := to(exchange, topic)])
            assert caught.value.refused == (message.id,)
        got = await stage.take(consumer, len(yes))
        assert sorted((d.message.body or b"").decode() for d in got) == sorted(yes)
        for delivery in got:
            assert (delivery.message.queue, delivery.message.exchange) == (stage.queue, None)
            await delivery.ack()
        await consumer.close()
        await stage.nothing_waits()

    @needs("topics")
    async def test_each_subscriber_has_its_own_copy_and_retries_it_alone(self, stage: Stage) -> None:
        exchange, runs = new_exchange(), list[tuple[str, int]]()

        async def fails(msg: Message) -> None:
            runs.append(("fails", msg.attempt))
            if msg.attempt == 1:
                raise ValueError("once")

        async def works(msg: Message) -> None:
            runs.append(("works", msg.attempt))
            assert (msg.body, dict(msg.headers), msg.type, msg.version) == (b"x", HEADERS, "orders.Placed", 2)

        bindings, other = [Binding("orders.#", exchange)], f"{stage.queue}-2"
        message = to(exchange, "orders.placed", headers=HEADERS, type="orders.Placed", version=2)
        async with stage.running(fails, bindings=bindings), stage.running(works, other, bindings=bindings):
            await (await stage.producer()).send_messages([message])
            await eventually(lambda: len(runs) == 3)
        assert sorted(runs) == [("fails", 1), ("fails", 2), ("works", 1)]

    @needs("topics")
    async def test_two_bindings_that_match_bring_a_message_once(self, stage: Stage) -> None:
        exchange = new_exchange()
        consumer = await stage.consumer(bindings=[Binding("#", exchange), Binding("orders.*", exchange)])
        await (await stage.producer()).send_messages([to(exchange, "orders.placed")])
        [delivery] = await stage.take(consumer, 1)
        await delivery.ack()
        await consumer.close()
        await stage.nothing_waits()

    @needs("topics")
    async def test_what_may_reach_nobody_is_forgotten(self, stage: Stage) -> None:
        producer, exchange = await stage.producer(), new_exchange()
        await producer.send_messages([to(exchange, "orders.placed", mandatory=False)])
        await producer.send_messages([Message(body=b"", queue=f"{stage.queue}-no", id="1", mandatory=False)])
        await stage.nothing_waits()

    @needs("topics", "admin")
    async def test_bindings_come_and_go_while_it_runs(self, stage: Stage) -> None:
        admin, exchange, consumer = await stage.admin(), new_exchange(), await stage.consumer()
        producer = await stage.producer()
        for _ in range(2):
            await admin.bind(stage.queue, "orders.*", exchange)
        await producer.send_messages([to(exchange, "orders.placed", b"bound")])
        for _ in range(2):
            await admin.unbind(stage.queue, "orders.*", exchange)
        with pytest.raises(SendError, match="No queue is bound"):
            await producer.send_messages([to(exchange, "orders.placed", b"unbound")])
        [delivery] = await stage.take(consumer, 1)
        assert delivery.message.body == b"bound"
        await delivery.ack()

    @needs("topics", "admin")
    async def test_binding_what_is_not_there_is_an_error(self, stage: Stage) -> None:
        admin = await stage.admin()
        with pytest.raises(QueueError, match="no queue|no file|no topic"):
            await admin.bind(f"{stage.queue}-missing", "orders.*", new_exchange())

    @needs("topics")
    async def test_an_exchange_of_another_type_is_an_error(self, stage: Stage) -> None:
        exchange = new_exchange("topic")
        await stage.consumer(bindings=[Binding("orders", exchange)])
        with pytest.raises(QueueError, match=exchange.name):
            await stage.consumer(f"{stage.queue}-2", bindings=[Binding("orders", Exchange(exchange.name, "fanout"))])

    @needs("topics", "delay")
    async def test_a_deleted_queue_has_no_bindings_any_more(self, stage: Stage) -> None:
        exchange, admin = new_exchange(), await stage.admin()
        consumer = await stage.consumer(bindings=[Binding("orders", exchange)])
        await consumer.close()
        await admin.delete(stage.queue)
        producer = await stage.producer()
        with pytest.raises(SendError, match="No queue is bound"):
            await producer.send_messages([to(exchange, "orders")])

    async def test_exchanges_where_there_are_none_are_refused_at_once(self, stage: Stage) -> None:
        if self.features.topics:
            pytest.skip(f"{self.protocol!r} says topics=True")
        with pytest.raises(FeatureError, match="has no exchanges"):
            stage.new_consumer(bindings=[Binding("orders")])

    async def test_an_exchange_of_no_known_type_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="'topic'"):
            Exchange("orders", type="headers")  # type: ignore[arg-type]

    # --- taking back ----------------------------------------------------------------------------

    @needs("cancel", "admin", "delay")
    async def test_a_delayed_message_can_be_taken_back(self, stage: Stage) -> None:
        producer, admin = await stage.producer(), await stage.admin()
        receipts = [await producer.send(n, delay=delay) for n, delay in enumerate((0.1, 3600, 0.1))]
        assert await admin.cancel(stage.queue, receipts[1].id)
        assert not await admin.cancel(stage.queue, receipts[1].id)
        got = await stage.take(await stage.consumer(), 2)
        assert [d.message.body for d in got] == [b"0", b"2"]
        assert not await admin.cancel(stage.queue, receipts[0].id)
        for delivery in got:
            await delivery.ack()
        with pytest.raises(QueueError):
            await admin.cancel(f"{stage.queue}-missing", "1")

    @needs("cancel", "admin", "delay")
    async def test_a_message_that_is_due_is_not_taken_back_though_nobody_has_it_yet(self, stage: Stage) -> None:
        producer, admin = await stage.producer(), await stage.admin()
        receipt = await producer.send("due", delay=0.05)

        async def due() -> bool:
            return (await admin.stats(stage.queue)).ready == 1

        await eventually(due)
        assert not await admin.cancel(stage.queue, receipt.id)
        [delivery] = await stage.take(await stage.consumer(), 1)
        await delivery.ack()

    @needs("admin")
    async def test_taking_back_where_it_cannot_be_is_refused(self, stage: Stage) -> None:
        if self.features.cancel:
            pytest.skip(f"{self.protocol!r} says cancel=True")
        with pytest.raises(FeatureError, match="taken back"):
            await (await stage.admin()).cancel(stage.queue, "1")
