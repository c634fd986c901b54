"""A bus and a real service of PikaBus on one RabbitMQ, both ways."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime

import pytest

from streamtools import (
    ADMINS,
    Bus,
    Command,
    Consumer,
    Message,
    MessageContext,
    Producer,
    QueueError,
    Retry,
    SendError,
)
from streamtools.compat.pikabus import COUNTED, OTHERS, TEXT
from streamtools.testing import eventually
from tests.brokers.address import RabbitMQAddress
from tests.pikabus.conftest import PATIENCE, StartPeer

pytestmark = pytest.mark.rabbitmq


class Place(Command, name="orders.Place"):
    id: int


class Kept:
    """What a bus has received, with the message around it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def arrival(self, body: bytes, number: int = 1) -> Message:
        """Wait until it has received this body so often; the last one."""
        await eventually(lambda: self._count(body) >= number, timeout=PATIENCE)
        return [message for message in self.messages if message.body == body][-1]

    def _count(self, body: bytes) -> int:
        return sum(message.body == body for message in self.messages)


def make_bus(url: str, **options: object) -> tuple[Bus, Kept]:
    """A bus that keeps all it receives; a payload with "fail" fails, one with "reply" is replied to."""
    bus, kept = Bus("ours", url=url, header_style="pikabus", **options), Kept()  # type: ignore[arg-type]

    @bus.handler
    async def keep(payload: dict, message: Message, context: MessageContext) -> None:
        kept.messages.append(message)
        if "reply" in payload:
            await context.reply(payload["reply"])
        if "fail" in payload:
            raise ValueError(payload["fail"])

    return bus, kept


async def test_commands_events_and_deferred_ones_arrive_at_pikabus(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus, _ = make_bus(rabbitmq_vhost.url)
    async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*") as peer, bus:
        await bus.send(Place(id=1), to="legacy", headers={"tenant": "acme"})
        headers = await peer.arrival({"id": 1})
        assert headers["PikaBus.MessageType"] == "orders.Place"
        assert headers["PikaBus.Intent"] == "command"
        assert headers["PikaBus.ReplyToAddress"] == headers["PikaBus.OriginatingAddress"] == "ours"
        assert headers["PikaBus.ContentType"] == "application/json"
        assert headers["tenant"] == "acme"

        await bus.publish({"id": 2}, "orders.placed")
        assert (await peer.arrival({"id": 2}))["PikaBus.Intent"] == "event"

        begun = time.time()
        await bus.defer({"id": 3}, delay=1.5, to="legacy")
        assert "PikaBus.DeferredTime" in await peer.arrival({"id": 3})
        assert time.time() >= begun + 1.5


async def test_all_thirteen_headers_arrive_at_pikabus(start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress) -> None:
    bus = Bus("ours", url=rabbitmq_vhost.url, header_style="pikabus", retry=Retry(retries=0))

    @bus.handler
    async def place(command: Place) -> None:
        raise ValueError("sold out")

    # The peer is who looks after the error queue.
    async with start_peer(rabbitmq_vhost.url, "error", "orders.*") as peer, bus:
        await bus.defer(Place(id=1), delay=0.5, to="error")
        deferred = await peer.arrival({"id": 1})
        sent = await bus.send(Place(id=2), to="ours")
        failed = await peer.arrival({"id": 2})

    names = {f"PikaBus.{name}" for name in (*TEXT.values(), *OTHERS)} - {f"PikaBus.{COUNTED}"}
    assert len(names) == 13
    assert names <= {*deferred, *failed}
    for header in (deferred["PikaBus.TimeSent"], deferred["PikaBus.DeferredTime"], failed["PikaBus.TimeSent"]):
        assert datetime.strptime(header, "%m/%d/%Y %H:%M:%S")
    assert failed["PikaBus.MessageId"] == failed["PikaBus.CorrelationId"] == sent.id
    assert (failed["PikaBus.ContentType"], failed["PikaBus.ContentEncoding"]) == ("application/json", "utf-8")
    assert failed["PikaBus.SourceQueue"] == "ours"
    assert failed["PikaBus.ErrorDetails"].rstrip().endswith("ValueError: sold out")
    assert int(failed["PikaBus.ErrorRetries"]) == 1


async def test_commands_events_and_deferred_ones_arrive_from_pikabus(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus, kept = make_bus(rabbitmq_vhost.url, subscriptions=["shipments.#"])
    async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*") as peer, bus:
        own = {"PikaBus.MessageId": "m-1", "PikaBus.CorrelationId": "c-1", "tenant": "acme"}
        await peer.tell("Send", {"id": 1}, queue="ours", messageType="shop.Pay", headers=own)
        message = await kept.arrival(b'{"id": 1}')
        assert (message.type, message.intent, message.source, message.reply_to) == (
            "shop.Pay", "command", "legacy", "legacy",
        )  # fmt: skip
        assert message.headers == {"tenant": "acme"}
        assert (message.id, message.correlation_id) == ("m-1", "c-1")
        assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
        assert message.time is not None and abs(message.time - time.time()) < PATIENCE

        await peer.tell("Publish", {"id": 2}, topic="shipments.north.sent")
        assert (await kept.arrival(b'{"id": 2}')).intent == "event"

        begun = time.time()
        await peer.tell("Defer", {"id": 3}, queue="ours", delay=2)
        message = await kept.arrival(b'{"id": 3}')
        assert time.time() >= begun + 2
        assert (message.attempt, kept.messages.count(message)) == (1, 1)


async def test_replies_go_both_ways_in_one_conversation(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus, kept = make_bus(rabbitmq_vhost.url)
    async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*") as peer, bus:
        await peer.tell("Send", {"reply": {"from": "ours"}}, queue="ours")
        asked = await kept.arrival(b'{"reply": {"from": "ours"}}')
        assert (await peer.arrival({"from": "ours"}))["PikaBus.CorrelationId"] == asked.correlation_id

        await bus.send({"reply": {"from": "legacy"}}, to="legacy")
        sent = await peer.arrival({"reply": {"from": "legacy"}})
        answer = await kept.arrival(b'{"from": "legacy"}')
        assert answer.correlation_id == sent["PikaBus.CorrelationId"]

        requests = [bus.request({"reply": {"n": n}}, to="legacy", timeout=PATIENCE) for n in range(20)]
        assert await asyncio.gather(*requests) == [{"n": n} for n in range(20)]


async def test_requests_inside_one_conversation_have_each_its_own_reply(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus = Bus("ours", url=rabbitmq_vhost.url, header_style="pikabus")
    answers: asyncio.Queue[list[object]] = asyncio.Queue()

    @bus.handler
    async def ask(command: Place) -> None:
        requests = [bus.request({"reply": n}, to="legacy", timeout=PATIENCE) for n in (1, 2)]
        answers.put_nowait(await asyncio.gather(*requests))

    async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*"), bus:
        await bus.send(Place(id=1), to="ours")
        assert await asyncio.wait_for(answers.get(), PATIENCE) == [1, 2]


async def test_what_fails_here_is_in_the_error_queue_as_pikabus_has_it(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus, kept = make_bus(rabbitmq_vhost.url, retry=Retry(retries=1, delay=0.1))
    async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*") as peer, bus:
        await peer.tell("Send", {"fail": "no"}, queue="ours", messageType="shop.Pay")
        message = await kept.arrival(b'{"fail": "no"}', 2)
        assert message.attempt == 2

        async with Consumer("error", url=rabbitmq_vhost.url) as errors:  # as it is on the wire
            [failed] = await errors.receive(timeout=PATIENCE)
            headers = failed.message.headers
            assert headers["PikaBus.SourceQueue"] == "ours"
            assert headers["PikaBus.ErrorRetries"] == "2"
            assert headers["PikaBus.ErrorDetails"].rstrip().endswith("ValueError: no")
            assert headers["PikaBus.MessageId"] == message.id
            assert headers["PikaBus.MessageType"] == "shop.Pay"
            assert headers["PikaBus.ReplyToAddress"] == "legacy"
            await failed.ack()


async def test_what_fails_at_pikabus_goes_into_the_error_queue_that_we_made(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus, _ = make_bus(rabbitmq_vhost.url)
    async with bus:  # makes the error queue: a classic one, which PikaBus can declare too
        async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*") as peer:
            await bus.send({"fail": "bad"}, to="legacy")
            await peer.arrival({"fail": "bad"}, 2)

            [failed] = await bus.receive("error", timeout=PATIENCE)
            error = failed.message.error
            assert error is not None and (error.queue, error.exception, error.reason) == (
                "legacy",
                "ValueError",
                "bad",
            )
            assert error.attempts == 2
            await failed.ack()


async def test_old_and_new_processes_share_one_queue_and_count_failures_together(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    # PikaBus gives up after 2 runs, the bus after 4.
    bus, kept = make_bus(rabbitmq_vhost.url, retry=Retry(retries=3, delay=0.1))
    async with start_peer(rabbitmq_vhost.url, "ours", "orders.*") as peer, bus:
        for number in range(20):
            await bus.send({"id": number}, to="ours")
        for number in range(4):
            await bus.send({"fail": str(number)}, to="ours")
        failed = []
        while len(failed) < 4:
            failed += await bus.receive("error", 4, timeout=PATIENCE)
        for delivery in failed:
            await delivery.ack()

        both = [each["received"] for each in peer.received] + [json.loads(message.body) for message in kept.messages]
        assert sorted(payload["id"] for payload in both if "id" in payload) == list(range(20))
        for delivery in failed:
            error = delivery.message.error
            runs = both.count(json.loads(delivery.message.body))
            assert error is not None and (error.queue, error.attempts) == ("ours", runs)
            assert 2 <= runs <= 4


async def test_an_error_queue_that_pikabus_made_is_used_as_it_is(
    start_peer: StartPeer, rabbitmq_vhost: RabbitMQAddress
) -> None:
    bus, _ = make_bus(rabbitmq_vhost.url, retry=Retry(retries=0))
    async with start_peer(rabbitmq_vhost.url, "legacy", "orders.*") as peer:
        async with Producer("legacy", url=rabbitmq_vhost.url, declare=False) as producer:
            await producer.send({"fail": "first"}, headers={"PikaBus.Intent": "command"})
        await peer.arrival({"fail": "first"}, 2)
        await holds_one("error", rabbitmq_vhost.url)
        async with bus:
            await bus.send({"fail": "second"}, to="ours")
            bodies = set()
            while len(bodies) < 2:
                [failed] = await bus.receive("error", timeout=PATIENCE)
                bodies.add(failed.message.body)
                await failed.ack()
        assert bodies == {b'{"fail":"first"}', b'{"fail":"second"}'}


async def holds_one(queue: str, url: str) -> None:
    """Wait until this queue exists and holds one message."""
    async with ADMINS["rabbitmq"](url=url) as admin:

        async def holds() -> bool:
            try:
                return (await admin.stats(queue)).ready == 1
            except QueueError:
                return False

        await eventually(holds, timeout=PATIENCE)


async def test_a_queue_that_pikabus_never_bound_is_reached(rabbitmq_vhost: RabbitMQAddress) -> None:
    # Version 1 binds a queue when something is sent to it, and not before.
    async with Producer("old", url=rabbitmq_vhost.url), Bus(url=rabbitmq_vhost.url, header_style="pikabus") as bus:
        await bus.send({"id": 1}, to="old")
        async with Consumer("old", url=rabbitmq_vhost.url) as consumer:
            [delivery] = await consumer.receive(timeout=PATIENCE)
            assert delivery.message.body == b'{"id":1}'
            await delivery.ack()


async def test_a_queue_that_does_not_exist_is_an_error_until_it_does(rabbitmq_vhost: RabbitMQAddress) -> None:
    async with Bus(url=rabbitmq_vhost.url, header_style="pikabus") as bus:
        with pytest.raises(SendError, match="late"):
            await bus.send({"id": 1}, to="late")
        async with Producer("late", url=rabbitmq_vhost.url):
            await bus.send({"id": 2}, to="late")
        await holds_one("late", rabbitmq_vhost.url)


async def test_a_queue_that_was_deleted_and_made_anew_is_bound_anew(rabbitmq_vhost: RabbitMQAddress) -> None:
    url = rabbitmq_vhost.url
    bus = Bus("ours", url=url, header_style="pikabus", retry=Retry(retries=3, delay=0.1))

    @bus.handler
    async def forward(command: Place, context: MessageContext) -> None:
        await context.send({"id": command.id}, to="other")

    async with ADMINS["rabbitmq"](url=url) as admin, bus:
        for number in (1, 2, 3):
            await admin.create("other")
            if number < 3:
                await bus.send({"id": number}, to="other")
            else:
                await bus.send(Place(id=number), to="ours")
            await holds_one("other", url)
            await admin.delete("other")


async def test_the_usual_error_queue_is_used_where_there_is_one(rabbitmq_vhost: RabbitMQAddress) -> None:
    bus, kept = make_bus(rabbitmq_vhost.url, retry=Retry(retries=0))
    async with Producer("other", url=rabbitmq_vhost.url), bus:  # the producer makes it, with its arguments
        await bus.send({"fail": "no"}, to="ours")
        [failed] = await bus.receive("error", timeout=PATIENCE)
        assert failed.message.body == b'{"fail":"no"}'
        await failed.ack()
    assert len(kept.messages) == 1


async def test_a_request_of_a_bus_without_this_style_is_answered(rabbitmq_vhost: RabbitMQAddress) -> None:
    # Its reply queue is exclusive to its connection, so nobody else can bind it.
    bus, _ = make_bus(rabbitmq_vhost.url)
    async with bus, Bus("plain", url=rabbitmq_vhost.url) as plain:
        assert await plain.request({"reply": 1}, to="ours", timeout=PATIENCE, returns=int) == 1
