"""One outbox: what leaves with a message's acknowledgement, and what leaves at once with the same ids again."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamtools import Bus, Consumer, ConsumerFactory, ConsumerRunner, Message, Producer, Retry
from streamtools.errors import SendError
from streamtools.settings import KafkaSettings
from streamtools.testing.waiting import eventually
from tests.brokers.kafka.node import KafkaNode
from tests.bus.conftest import NO_RETRY, SOON, MakeBus, emptied
from tests.bus.contracts import OrderPlaced, PlaceOrder

SINK = "sink"


class Fails:
    """Raises, so often."""

    def __init__(self, times: int = 2) -> None:
        self.left = times
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        if self.left:
            self.left -= 1
            raise RuntimeError("not yet")


@asynccontextmanager
async def routed(url: str, function: Callable[..., Any], **options: Any) -> AsyncIterator[Consumer]:
    """A route of the queue `work`, running."""
    factory = ConsumerFactory(url=url, retry=SOON)
    factory.route("work", **options)(function)
    async with ConsumerRunner(factory, shutdown_timeout=1):
        yield factory.instances[0]


@pytest.fixture
async def sink(make: MakeBus) -> None:
    """A queue that has all events, and no handlers."""
    await make(SINK, subscriptions=["#"]).declare()


@pytest.mark.usefixtures("sink")
async def test_what_a_bus_publishes_in_a_route_leaves_with_the_acknowledgement(
    url: str, make: MakeBus, waiting: Any, nothing_waits: Any
) -> None:
    bus, fails = make("orders"), Fails()

    async def place(msg: int) -> None:
        await bus.publish(OrderPlaced(id=msg))
        await bus.send(msg, SINK)
        fails()

    async with routed(url, place), Producer("work", url=url) as producer:
        receipt = await producer.send(1)
        found = await waiting(SINK, 2)
        await nothing_waits(SINK)
    assert fails.runs == 3
    assert sorted(m.intent or "" for m in found) == ["command", "event"]
    assert {(m.correlation_id, m.causation_id) for m in found} == {(receipt.id, receipt.id)}


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("place", ["route", "bus"])
async def test_what_a_producer_sends_leaves_at_once_and_keeps_its_id(
    url: str, make: MakeBus, waiting: Any, place: str
) -> None:
    fails = Fails()
    out = Producer(SINK, url=url)

    async def send(msg: Any) -> None:
        receipt = await out.send({"at": fails.runs})
        many = await out.send_many([1, 2])
        assert len({receipt.id, *(each.id for each in many)}) == 3
        fails()

    async with out, Producer("work", url=url) as producer:
        if place == "route":
            async with routed(url, send):
                first = await producer.send(1, correlation_id="talk")
                found = await waiting(SINK, 9)
        else:
            bus = make("work", retry=SOON)
            bus.handler(type="Work")(send)
            async with bus:
                first = await producer.send(1, type="Work", correlation_id="talk")
                found = await waiting(SINK, 9)
        other = await out.send("by itself")
        [alone] = await waiting(SINK, 1)
    ids = [message.id for message in found]
    assert len(set(ids)) == 3 and all(ids.count(each) == 3 for each in ids)
    assert {(m.correlation_id, m.causation_id) for m in found} == {("talk", first.id)}
    assert (alone.id, alone.correlation_id, alone.causation_id) == (other.id, None, None)


@pytest.mark.usefixtures("sink")
async def test_what_is_given_by_name_is_kept(url: str, waiting: Any) -> None:
    out = Producer(SINK, url=url)

    async def send(msg: Any) -> None:
        await out.send("a", id="mine", correlation_id="other")

    async with out, routed(url, send), Producer("work", url=url) as producer:
        await producer.send(1)
        [found] = await waiting(SINK, 1)
    assert (found.id, found.correlation_id) == ("mine", "other")


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("place", ["route", "bus"])
async def test_a_producer_with_an_outbox_sends_when_the_handler_has_succeeded(
    url: str, make: MakeBus, waiting: Any, nothing_waits: Any, place: str
) -> None:
    fails = Fails()
    out = Producer(SINK, url=url, outbox=True)
    ids: list[str] = []

    async def send(msg: Any) -> None:
        ids.append((await out.send("one")).id)
        ids.extend(receipt.id for receipt in await out.send_many(["two", "three"]))
        fails()

    async with out, Producer("work", url=url) as producer:
        if place == "route":
            async with routed(url, send):
                await producer.send(1)
                found = await waiting(SINK, 3)
        else:
            bus = make("work", retry=SOON)
            bus.handler(type="Work")(send)
            async with bus:
                await producer.send(1, type="Work")
                found = await waiting(SINK, 3)
        await nothing_waits(SINK)
        await out.send("outside")
        assert [m.body for m in await waiting(SINK, 1)] == [b"outside"]
    assert [m.body for m in found] == [b"one", b"two", b"three"]
    assert [m.id for m in found] == ids[:3] == ids[3:6] == ids[6:]


async def test_an_outbox_at_another_address_is_emptied_before_the_acknowledgement(
    url: str, tmp_path: Path, nothing_waits: Any
) -> None:
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    fails = Fails()
    out, events = Producer("far", url=elsewhere, outbox=True), Bus("far", url=elsewhere)

    async def send(msg: Any) -> None:
        await out.send("by the producer")
        await events.send({"by": "the bus"}, "far")
        fails()

    async with out, events, routed(url, send), Producer("work", url=url) as producer:
        await producer.send(1)
        await nothing_waits("work")
        async with Consumer("far", url=elsewhere) as far:
            found = [(await far.receive(timeout=20))[0].message.body for _ in range(2)]
            assert await far.receive(timeout=0) == []
    assert (fails.runs, sorted(found)) == (3, [b"by the producer", b'{"by":"the bus"}'])


async def test_what_cannot_leave_fails_the_handler(url: str, tmp_path: Path, failed: Any, make: MakeBus) -> None:
    out = Producer("none", url=url, outbox=True, declare=False)
    far = Producer("none", url=f"sqlite:///{tmp_path}/far.db", outbox=True, declare=False)
    bus = make("orders")
    runs: list[str] = []

    async def send(msg: str) -> None:
        runs.append(msg)
        if msg == "event":
            await bus.publish(OrderPlaced(id=1))  # nobody has subscribed
        else:
            await (out if msg == "near" else far).send("x")

    async with out, far, routed(url, send, retry=Retry(retries=0)), Producer("work", url=url) as producer:
        kinds = ["far", "event", *(["near"] if out.protocol != "kafka" else [])]
        await producer.send_many(kinds)
        rejected = await failed(len(kinds))
    assert sorted(m.body.decode() for m in rejected) == sorted(kinds) == sorted(runs)
    assert {m.error.exception for m in rejected} == {"streamtools.errors.SendError"}


@pytest.mark.usefixtures("sink")
async def test_a_task_that_outlives_its_handler_sends_at_once(url: str, waiting: Any) -> None:
    out = Producer(SINK, url=url, outbox=True)
    go, tasks = asyncio.Event(), []

    async def later() -> None:
        await go.wait()
        await out.send("later")

    async def send(msg: Any) -> None:
        tasks.append(asyncio.create_task(later()))
        await out.send("now")

    async with out, routed(url, send), Producer("work", url=url) as producer:
        await producer.send(1)
        assert [m.body for m in await waiting(SINK, 1)] == [b"now"]
        go.set()
        assert [m.body for m in await waiting(SINK, 1)] == [b"later"]
        await tasks[0]


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("ack", ["on_receive", "manual"])
async def test_without_an_acknowledgement_that_follows_it_leaves_when_the_handler_has_succeeded(
    url: str, make: MakeBus, waiting: Any, nothing_waits: Any, ack: str
) -> None:
    bus, out = make("orders"), Producer(SINK, url=url, outbox=True)

    async def send(msg: Message) -> None:
        await out.send("by the producer")
        await bus.send({"n": 1}, SINK)
        if msg.body == b"2":
            raise RuntimeError("not this one")

    async with out, routed(url, send, ack=ack, retry=Retry(retries=0)), Producer("work", url=url) as producer:
        await producer.send_many([2, 1])
        found = await waiting(SINK, 2)
        await nothing_waits(SINK)
    assert sorted(m.body for m in found) == [b"by the producer", b'{"n":1}']


@pytest.mark.usefixtures("sink")
async def test_a_producer_with_an_outbox_gathers_in_a_transaction(bus_of: Any, url: str, waiting: Any) -> None:
    async with Producer(SINK, url=url, outbox=True) as out:
        with pytest.raises(ValueError, match="undone"):
            async with bus_of.transaction():
                await out.send("undone")
                raise ValueError("undone")
        async with bus_of.transaction():
            await out.send("first")
            await bus_of.send({"n": 2}, SINK)
        assert sorted(m.body for m in await waiting(SINK, 2)) == [b"first", b'{"n":2}']


@pytest.fixture
async def bus_of(make: MakeBus) -> Bus:
    return make("orders")


async def test_handlers_of_one_name_at_two_queues_send_under_two_ids(url: str, make: MakeBus, waiting: Any) -> None:
    await make(SINK).declare()
    out = Producer(SINK, url=url)

    async def handle(event: OrderPlaced) -> None:
        await out.send("x")

    one, other = make("one"), make("other")
    for bus in (one, other):
        bus.handler(handle)
    async with out, one, other:
        await make("asks").publish(OrderPlaced(id=1))
        found = await waiting(SINK, 2)
    assert len({m.id for m in found}) == 2


@pytest.mark.usefixtures("sink")
async def test_a_retry_in_its_place_sends_nothing_twice(
    url: str, make: MakeBus, waiting: Any, nothing_waits: Any
) -> None:
    bus, out, fails = make("orders"), Producer(SINK, url=url, outbox=True), Fails()

    async def send(msg: Any) -> None:
        await out.send("by the producer")
        await bus.send({"n": 1}, SINK)
        fails()

    async with out, routed(url, send, ordered_by="queue"), Producer("work", url=url) as producer:
        await producer.send(1)
        found = await waiting(SINK, 2)
        await nothing_waits(SINK)
    assert sorted(m.body for m in found) == [b"by the producer", b'{"n":1}'] and fails.runs == 3


@pytest.mark.usefixtures("sink")
async def test_what_is_deferred_in_a_route_comes_when_its_time_has_come(
    url: str, make: MakeBus, waiting: Any
) -> None:
    bus, out = make("orders"), Producer(SINK, url=url, outbox=True)

    async def send(msg: Any) -> None:
        await out.send("by the producer", delay=0.3)
        await bus.defer({"n": 1}, delay=0.3, to=SINK)

    async with out, routed(url, send), Producer("work", url=url) as producer:
        before = time.time()
        await producer.send(1)
        found = await waiting(SINK, 2)
    assert sorted(m.body for m in found) == [b"by the producer", b'{"n":1}'] and time.time() - before >= 0.3


async def test_exactly_once_carries_what_a_route_sends(own_kafka: KafkaNode) -> None:
    url, fails = own_kafka.address.url, Fails()
    await emptied(KafkaSettings.from_url(url))
    async with Bus("exact-sink", url=url) as sink:
        await sink.declare()
    bus, out = Bus("exact-orders", url=url), Producer("exact-sink", url=url, outbox=True)
    plain = Producer("exact-sink", url=url)

    async def send(msg: Any) -> None:
        await out.send("outbox")
        await plain.send("plain")
        await bus.send({"n": 1}, "exact-sink")
        fails()

    async with bus, out, plain, routed(url, send, exactly_once=True), Producer("work", url=url) as producer:
        await producer.send(1)
        async with Consumer("exact-sink", url=url) as consumer:
            found: list[bytes | None] = []
            while len(found) < 3:
                taken = await consumer.receive(10, timeout=30)
                assert taken, found
                found += [delivery.message.body for delivery in taken]
            assert await consumer.receive(timeout=1) == []
    assert sorted(map(str, found)) == sorted(map(str, [b"outbox", b"plain", b'{"n":1}']))


async def test_a_bus_with_other_headers_writes_them_from_a_route_too() -> None:
    url = "asyncio://styled"
    bus, fails = Bus("far", url=url, header_style="pikabus"), Fails()

    async def send(msg: Any) -> None:
        await bus.send({"n": 1}, "far")
        fails()

    async with bus, routed(url, send), Producer("work", url=url) as producer, Consumer("far", url=url) as far:
        await producer.send(1)
        [delivery] = await far.receive(timeout=20)
        assert delivery.message.headers["PikaBus.MessageId"] == delivery.message.id
        assert await far.receive(timeout=0) == []


async def test_an_http_route_sends_what_it_gathered_before_it_answers(tmp_path: Path) -> None:
    far = f"sqlite:///{tmp_path}/far.db"
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    bus, out = Bus("far", url=far), Producer("far", url=far, outbox=True)
    await bus.declare()
    left = [True]

    async def send(msg: Any) -> str:
        await bus.send({"n": 1}, "far")
        await out.send("by the producer")
        if left.pop() if left else False:
            raise RuntimeError("not yet")
        return "done"

    async with (
        bus,
        out,
        routed(url, send),
        Producer("work", url=url) as producer,
        Consumer("far", url=far) as consumer,
    ):
        await producer.send(1)
        found = [d.message.body for _ in range(2) for d in await consumer.receive(timeout=20)]
        assert await consumer.receive(timeout=0) == []
    assert sorted(map(str, found)) == sorted(map(str, [b'{"n":1}', b"by the producer"]))


async def test_over_http_nothing_that_stands_in_a_request_is_called_with_the_answer() -> None:
    called: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.append(await reader.read(1))
        writer.close()

    victim = await asyncio.start_server(note, "127.0.0.1", 0)
    port = victim.sockets[0].getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    bus = Bus("orders", url=url, retry=NO_RETRY)

    @bus.handler
    async def take(msg: dict[str, Any]) -> int:
        if msg:
            raise RuntimeError("secret")
        return 5

    async with bus, Producer("orders", url=url) as producer, victim:
        for body in (b"{}", b'{"n":1}'):
            message = Message(
                body=body, queue="orders", id="1", content_type="application/json", intent="request",
                reply_to=f"http://127.0.0.1:{port}/any?x=1",
            )  # fmt: skip
            with suppress(SendError):
                await producer.send_messages([message])
    assert called == []


# --- answers --------------------------------------------------------------------------------------


async def test_a_route_answers_who_asks_by_what_it_returns(url: str, make: MakeBus, waiting: Any) -> None:
    await make("answers").declare()

    async def double(msg: int) -> int | None:
        return 2 * msg if msg else None

    async with routed(url, double), Producer("work", url=url) as producer:
        await producer.send(0, reply_to="answers")  # which is not answered: there is no value
        await producer.send(21, reply_to="answers", correlation_id="mine")
        [answer] = await waiting("answers", 1)
        asks = make("asks")
        async with asks:
            assert await asks.request(4, "work", returns=int) == 8
    assert (answer.body, answer.correlation_id, answer.intent) == (b"42", "mine", "reply")


@pytest.mark.parametrize("reply_to", ["x" * 300, "no such queue at all", "http://127.0.0.1:1/", "a\x00b", ""])
async def test_an_address_that_is_none_fails_no_handler(
    url: str, make: MakeBus, nothing_waits: Any, depth: Any, reply_to: str
) -> None:
    bus, done = make("orders", retry=Retry(retries=0)), []

    async def answers(msg: Any) -> int:
        done.append(msg)
        return 5

    bus.handler(type="Ask")(answers)
    async with bus, routed(url, answers, retry=Retry(retries=0)):
        for queue in ("work", "orders"):
            async with Producer(queue, url=url) as producer:
                await producer.send_messages(
                    [Message(body=b"1", queue=queue, id=f"{queue}-1", type="Ask", reply_to=reply_to or None)]
                )
        await eventually(lambda: len(done) >= 2)
        await nothing_waits("work")
        await nothing_waits("orders")
    assert (done, await depth("error")) == ([1, 1], 0)


async def test_a_refused_send_says_so_and_is_the_handlers_own(url: str, make: MakeBus) -> None:
    bus = make("orders")
    async with bus:
        with pytest.raises(SendError):
            await bus.send(PlaceOrder(id=1), "no such queue")
