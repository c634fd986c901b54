"""What passes is waited for, and said once; what does not is an error at once."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Any, Final

import pytest

from streamtools import Bus, Command, Consumer, ConsumerFactory, ConsumerRunner, Producer, Retry
from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.errors import TROUBLES, Trouble
from streamtools.errors import ConnectError, QueueError, SendError
from tests.brokers.address import RabbitMQAddress
from tests.faults.amqp import RefusingBroker
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until

PAGE: Final = Path(__file__).parents[3] / "docs/protocols/rabbitmq.md"
CONNECT, CHANNEL, DECLARE = "Connection.Open", "Channel.Open", "Queue.Declare"
CONSUME, PUBLISH = "Basic.Consume", "Basic.Publish"
#: Words as brokers have them, where the row's own are not enough to try all of its forms.
TEXTS: Final = {
    (530, "limit"): (
        "NOT_ALLOWED - access to vhost 'v' refused for user 'u': connection limit (1) is reached",
        "NOT_ALLOWED - access to vhost 'v' refused for user 'u': vhost connection limit (1) is reached",
        "NOT_ALLOWED - Connection refused for user 'u': user connection limit (1) is reached",
        "NOT_ALLOWED - connection refused: node connection limit (10) is reached",
        "NOT_ALLOWED - number of channels opened for user 'u' has reached the maximum allowed user limit of (10)",
    ),
    (530, ""): (
        "NOT_ALLOWED - vhost v not found",
        "NOT_ALLOWED - access to vhost 'v' refused for user 'u'",
    ),
    (404, "down or inaccessible"): (
        "NOT_FOUND - home node 'rabbit@b' of durable queue 'orders' in vhost '/' is down or inaccessible",
    ),
    (403, ""): ("ACCESS_REFUSED - access to queue 'orders' in vhost '/' refused for user 'u'",),
    (406, "delivery acknowledgement"): ("PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out",),
}
#: The requests that can meet a trouble.
STAGES: Final = {
    320: (CONNECT, CHANNEL, DECLARE, CONSUME, PUBLISH),
    403: (DECLARE, CONSUME, PUBLISH),
    404: (DECLARE, CONSUME, PUBLISH),
    405: (DECLARE, CONSUME),
    406: (DECLARE, CONSUME, PUBLISH),
    504: (CHANNEL, DECLARE, CONSUME, PUBLISH),
    506: (CONNECT, CHANNEL, DECLARE, CONSUME, PUBLISH),
    530: (CONNECT,),
    541: (CONNECT, CHANNEL, DECLARE, CONSUME, PUBLISH),
}


def _cases(*, passes: bool) -> list[Any]:
    return [
        pytest.param(row.code, text, stage, id=f"{row.code}-{row.words or 'else'}-{stage}")
        for row in TROUBLES
        if row.passes is passes
        for text in TEXTS.get((row.code, row.words), (f"SOME_WORD - {row.words} of something",))
        for stage in STAGES[row.code]
        if (row.code, row.passes, stage) not in ELSEWHERE
    ]


#: A queue that is missing is made, and an exchange that is missing is made before the message is sent again.
ELSEWHERE: Final = {(404, False, DECLARE), (404, False, CONSUME), (404, False, PUBLISH)}


async def _do(stage: str, url: str) -> None:
    if stage in (DECLARE, CONSUME):
        async with RabbitMQConsumer("orders", url=url):
            return
    async with RabbitMQProducer("orders", url=url, declare=False) as producer:
        await producer.send(b"x")


@pytest.mark.parametrize(("code", "text", "stage"), _cases(passes=True))
async def test_what_passes_is_tried_again_and_said_once(
    code: int, text: str, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamtools")
    async with RefusingBroker(stage, code, text, times=3) as broker:
        await _do(stage, broker.url)
        assert broker.refused == 3
        assert broker.held in ([], [b"x"])
    said = [record for record in caplog.records if record.name == "streamtools" and record.levelno >= logging.WARNING]
    assert len(said) <= 1


@pytest.mark.parametrize(("code", "text", "stage"), _cases(passes=False))
async def test_what_does_not_pass_is_an_error_at_once(code: int, text: str, stage: str) -> None:
    async with RefusingBroker(stage, code, text, times=100) as broker:
        with pytest.raises((ConnectError, QueueError, SendError)) as caught:
            async with asyncio.timeout(10):
                await _do(stage, broker.url)
        assert not isinstance(caught.value, ConnectError) or caught.value.permanent
        assert broker.refused <= 2
        assert broker.held == []


async def test_a_message_to_a_classic_queue_whose_node_is_down_waits_for_it() -> None:
    text = "NOT_FOUND - home node 'rabbit@b' of durable queue 'orders' in vhost '/' is down or inaccessible"
    async with (
        RefusingBroker(DECLARE, 404, text, times=2, unroutable=3) as broker,
        RabbitMQProducer("orders", url=broker.url, declare=False) as producer,
    ):
        await producer.send(b"x")
        assert broker.held == [b"x"]
        assert broker.refused == 2
        assert producer._opened == 1


async def test_a_message_to_a_queue_that_is_not_there_is_refused_at_once() -> None:
    text = "NOT_FOUND - no queue 'orders' in vhost '/'"
    async with (
        RefusingBroker(DECLARE, 404, text, times=9, unroutable=9) as broker,
        RabbitMQProducer("orders", url=broker.url, declare=False) as producer,
    ):
        with pytest.raises(SendError, match="no queue 'orders'") as caught:
            await producer.send(b"x", id="1")
        assert caught.value.refused == ("1",)
        assert broker.held == []


async def test_a_queue_that_is_deleted_while_its_consumer_opens_is_made_again() -> None:
    text = "NOT_FOUND - no queue 'orders' in vhost '/'"
    async with RefusingBroker(CONSUME, 404, text, times=2) as broker, RabbitMQConsumer("orders", url=broker.url):
        assert broker.refused == 2
    async with RefusingBroker(CONSUME, 404, text, times=2) as broker:
        with pytest.raises(QueueError, match="no queue 'orders'"):
            await RabbitMQConsumer("orders", url=broker.url, declare=False).open()
        assert broker.refused == 1


@pytest.mark.parametrize("ordered_by", [None, "queue"])
async def test_a_consumer_that_is_not_told_that_its_queue_is_gone_notices(
    monkeypatch: pytest.MonkeyPatch, ordered_by: Any
) -> None:
    monkeypatch.setattr("streamtools.drivers.rabbitmq.rare.forgotten_consumer.SILENCE_POLL_INTERVAL", 0.02)
    async with RefusingBroker(DECLARE, 404, "NOT_FOUND - no queue 'orders' in vhost '/'", times=0) as broker:
        consumer = RabbitMQConsumer("orders", url=broker.url, declare=False, ordered_by=ordered_by)

        @consumer()
        async def handle(message: bytes) -> None: ...

        running = asyncio.create_task(handle())
        await wait_until(lambda: "Basic.Consume" in broker.asked)
        broker.times = 1
        await wait_until(lambda: consumer._opened == 2 or running.done())
        assert consumer._opened == 2
        consumer.stop()
        await running


def test_the_page_shows_the_table_as_it_is() -> None:
    page = PAGE.read_text()
    for row in TROUBLES:
        assert _ordering_key(row) in page


def _ordering_key(row: Trouble) -> str:
    return f"| {row.code} | {row.words} | {row.meaning} | {'passes' if row.passes else 'does not pass'} |"


# --- against the real thing -------------------------------------------------------------------------


class Door(Proxy):
    """Closes connections at once, some times: a load balancer without anything behind it."""

    closing = 0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closing > 0:
            self.closing -= 1
            self.accepted += 1
            writer.close()
            return
        await super()._accept(reader, writer)


def _through(address: RabbitMQAddress, proxy: Proxy, query: str = "") -> str:
    return address.url.replace(f":{proxy.target[1]}/", f":{proxy.port}/") + query


def _door(address: RabbitMQAddress) -> Door:
    host, _, port = address.url.split("@")[1].split("/")[0].partition(":")
    return Door(host, int(port))


async def test_a_port_that_closes_what_it_accepts_is_waited_for_at_start_and_later(
    rabbitmq_vhost: RabbitMQAddress,
) -> None:
    handled: list[int] = []
    async with _door(rabbitmq_vhost) as door:
        door.closing = 3
        consumers = ConsumerFactory("rabbitmq", url=_through(rabbitmq_vhost, door))

        @consumers.route("orders")
        async def handle(message: int) -> None:
            handled.append(message)

        runner = ConsumerRunner(consumers)
        running = asyncio.create_task(runner.serve())
        async with Producer("orders", url=_through(rabbitmq_vhost, door)) as producer:
            await producer.send(1)
            await wait_until(lambda: handled == [1])
            door.closing = 3
            await door.cut()
            await producer.send(2)
            await wait_until(lambda: handled[-1] == 2)
        assert not running.done()
        runner.stop()
        await running


async def test_an_exclusive_queue_is_waited_for_while_the_broker_does_not_know_that_its_owner_has_gone(
    rabbitmq_vhost: RabbitMQAddress,
) -> None:
    handled: list[int] = []
    async with _door(rabbitmq_vhost) as door:
        consumer = RabbitMQConsumer("orders", url=_through(rabbitmq_vhost, door, "?heartbeat=2"), exclusive=True)

        @consumer()
        async def handle(message: int) -> None:
            handled.append(message)

        running = asyncio.create_task(handle())
        await wait_until(lambda: consumer.connected)
        await door.abandon()
        await wait_until(lambda: consumer._opened == 2, timeout=60)
        async with Producer("orders", url=rabbitmq_vhost.url, declare=False) as producer:
            await producer.send(1)
        await wait_until(lambda: handled == [1])
        consumer.stop()
        await running


class Quote(Command, name="troubles.Quote"):
    """A request."""

    id: int


async def test_requests_are_answered_again_after_the_client_alone_saw_the_connection_end(
    rabbitmq_vhost: RabbitMQAddress,
) -> None:
    async with (
        _door(rabbitmq_vhost) as door,
        Bus("prices", url=rabbitmq_vhost.url) as prices,
        Bus("shop", url=_through(rabbitmq_vhost, door, "?heartbeat=2")) as shop,
    ):

        @prices.handler
        async def quote(command: Quote) -> int:
            return command.id

        await prices.start()
        assert await shop.request(Quote(id=1), to="prices", timeout=20) == 1
        await door.abandon()

        async def answers() -> bool:
            try:
                return await shop.request(Quote(id=2), to="prices", timeout=5) == 2
            except TimeoutError:
                return False

        await wait_until(answers, timeout=60)


async def test_a_request_waits_for_no_reply_queue_that_the_broker_keeps_for_a_lost_connection(
    rabbitmq_vhost: RabbitMQAddress,
) -> None:
    async with (
        _door(rabbitmq_vhost) as door,
        Bus("prices", url=rabbitmq_vhost.url) as prices,
        Bus("shop", url=_through(rabbitmq_vhost, door, "?heartbeat=60")) as shop,
    ):

        @prices.handler
        async def quote(command: Quote) -> int:
            return command.id

        await prices.start()
        assert await shop.request(Quote(id=1), to="prices", timeout=20) == 1
        replies = shop._transport.connections.here().requests
        before = replies.queue
        await door.abandon()
        await wait_until(lambda: replies._consumer is not None and not replies._consumer.connected)
        answers = await asyncio.gather(*(shop.request(Quote(id=n), to="prices", timeout=20) for n in range(5)))
        assert answers == list(range(5))
        assert replies.queue != before
        assert len(replies.queue) == len(before)


@pytest.mark.parametrize("whose", ["virtual host", "user"])
async def test_a_limit_of_connections_is_named_and_waited_for(rabbitmq_vhost: RabbitMQAddress, whose: str) -> None:
    address, vhost = rabbitmq_vhost, rabbitmq_vhost.url.rpartition("/")[2]
    user = f"limited-{secrets.token_hex(4)}"
    url = address.url.replace("guest:guest@", f"{user}:limited@")
    address.manage("PUT", f"users/{user}", {"password": "limited", "tags": ""})
    address.manage("PUT", f"permissions/{vhost}/{user}", {"configure": ".*", "write": ".*", "read": ".*"})
    limit = f"vhost-limits/{vhost}" if whose == "virtual host" else f"user-limits/{user}"
    address.manage("PUT", f"{limit}/max-connections", {"value": 0})
    try:
        with pytest.raises(ConnectError, match=r"allows no further connection.*limit \(0\).*rabbitmqctl") as caught:
            await RabbitMQConsumer("orders", url=url, connect_timeout=1).open()
        assert not caught.value.permanent
        opening = asyncio.create_task(RabbitMQConsumer("orders", url=url).open())
        await asyncio.sleep(0)
        address.manage("DELETE", f"{limit}/max-connections")
        await (await opening).close()
    finally:
        address.manage("DELETE", f"users/{user}")


async def test_a_handler_runs_once_for_each_attempt_though_no_connection_may_be_made_for_its_copies(
    rabbitmq_vhost: RabbitMQAddress, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamtools.engine.settler.REFUSED_DELAY", 0.1)
    address = rabbitmq_vhost
    limit = f"vhost-limits/{address.url.rpartition('/')[2]}/max-connections"
    attempts: list[int] = []
    others: list[int] = []
    consumer = Consumer("orders", url=address.url, retry=Retry(retries=1, delay=0))

    @consumer()
    async def handle(message: int) -> None:
        if message:
            others.append(message)
            return
        attempts.append(message)
        raise ValueError("never")

    async with Producer("orders", url=address.url) as producer:
        await producer.send_many([0, 1, 2, 3])
    address.manage("PUT", limit, {"value": 1})
    running = asyncio.create_task(handle())
    await wait_until(lambda: "connection limit" in caplog.text and others == [1, 2, 3])
    assert attempts == [0]
    address.manage("DELETE", limit)
    await wait_until(lambda: attempts == [0, 0])
    async with Consumer("error", url=address.url) as errors:
        (delivery,) = await errors.receive(timeout=20)
        assert delivery.message.attempt == 2
        await delivery.ack()
    assert attempts == [0, 0]
    consumer.stop()
    await running
