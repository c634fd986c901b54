"""The bus on Kafka: bindings in a topic of their own, what they outlive, and exactly once."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest

from streamtools import (
    ADMINS,
    Bus,
    ConnectionLost,
    Consumer,
    Exchange,
    Message,
    MessageContext,
    Producer,
    QueueError,
    SendError,
)
from streamtools.drivers.kafka.brokers.bindings import Bindings, bind, unbind
from streamtools.drivers.kafka.brokers.cluster import Cluster
from streamtools.drivers.kafka.names import BINDINGS
from streamtools.exchange import Binding
from streamtools.settings import KafkaSettings
from streamtools.testing.waiting import eventually, reaches
from tests.brokers.kafka.node import KafkaCluster, KafkaNode
from tests.bus.conftest import SOON, MakeBus, emptied
from tests.bus.contracts import OrderPlaced, PlaceOrder

A_B = Binding("a.b")


@pytest.fixture
def url(own_kafka: KafkaNode) -> str:
    """Kafka, with nothing in it."""
    asyncio.run(emptied(KafkaSettings.from_url(own_kafka.address.url)))
    return own_kafka.address.url


@pytest.fixture
async def cluster(url: str) -> Any:
    """A connection of the test's own."""
    cluster = Cluster(KafkaSettings.from_url(url), "test")
    await cluster.open()
    yield cluster
    await cluster.stop()


async def test_what_was_bound_before_is_known_and_what_is_known_is_not_read_again(url: str, cluster: Cluster) -> None:
    settings = KafkaSettings.from_url(url)
    async with ADMINS["kafka"](url=url) as admin:
        await admin.create("q")
    table = Bindings(settings)
    await table.read(cluster.client)
    assert table.queues(A_B.exchange, "a.b") == []
    for _ in range(2):
        await bind(cluster.client, settings, "q", [A_B, Binding("#")])
    await table.read(cluster.client)
    assert (table.queues(A_B.exchange, "a.b"), table.queues(A_B.exchange, "c")) == (["q"], ["q"])
    assert table._next == 2, "bound twice, written once"
    await unbind(cluster.client, settings, "q", [Binding("#")])
    await asyncio.gather(*(table.read(cluster.client) for _ in range(100)))
    assert (table.queues(A_B.exchange, "a.b"), table.queues(A_B.exchange, "c")) == (["q"], [])
    assert table._reads <= 4, "those that ask at once share one answer"
    await unbind(cluster.client, settings, "q")
    fresh = Bindings(settings)
    await fresh.read(cluster.client)
    assert fresh.of("q") == []


async def test_a_read_that_fails_fails_for_all_who_waited_for_it(
    url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them was told; the others took what they knew before for all there is."""
    table, read = Bindings(KafkaSettings.from_url(url)), Bindings._catch_up

    async def fails(self: Bindings, cluster: Cluster) -> None:
        monkeypatch.setattr(Bindings, "_catch_up", read)
        raise ConnectionLost("in between")

    monkeypatch.setattr(Bindings, "_catch_up", fails)
    found = await asyncio.gather(*(table.read(cluster.client) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in found] == [ConnectionLost] * 3
    giving_up = asyncio.create_task(table.read(cluster.client))
    staying = asyncio.create_task(table.read(cluster.client))
    await asyncio.sleep(0)
    giving_up.cancel()
    await staying


async def test_what_was_read_long_ago_is_read_anew(url: str, cluster: Cluster) -> None:
    """Kafka forgets after a day that a binding was taken away: an old picture would keep it for ever."""
    settings = KafkaSettings.from_url(url)
    async with ADMINS["kafka"](url=url) as admin:
        await admin.create("q")
    await bind(cluster.client, settings, "q", [A_B])
    table = Bindings(settings)
    await table.read(cluster.client)
    await cluster.delete_topic(BINDINGS)  # as if the record and the word that it is gone were both compacted away
    await cluster.wait(lambda: _is_missing(cluster))
    await bind(cluster.client, settings, "q", [Binding("other")])
    table._begun -= 4000
    await table.read(cluster.client)
    assert table.queues(A_B.exchange, "a.b") == []
    assert table.queues(A_B.exchange, "other") == ["q"]


async def _is_missing(cluster: Cluster) -> bool:
    return not await cluster.topics([BINDINGS])


async def test_bindings_whose_topic_was_made_anew_are_read_from_its_beginning(
    url: str, make: MakeBus, cluster: Cluster
) -> None:
    """An offset that is out of range is no error for ever."""
    bus, sender = make("q", subscriptions=["a", "b"]), make(None)
    await bus.declare()
    await sender.publish({}, "a")
    await cluster.delete_topic(BINDINGS)
    await cluster.wait(lambda: _is_missing(cluster))
    await bind(cluster.client, KafkaSettings.from_url(url), "q", [Binding("c")])
    await sender.publish({}, "c")
    with pytest.raises(SendError, match="No queue is bound"):
        await sender.publish({}, "a")


async def test_a_record_that_is_none_of_ours_is_read_over(url: str, make: MakeBus) -> None:
    bus = make("q", subscriptions=["a"])
    await bus.declare()
    async with Producer(BINDINGS, url=url, declare=False) as producer:
        for key, body in (("", b"x"), ("[1]", b"x"), ('["q","streamtools.topic","c"]', b'"no such type"')):
            await producer.send(body, key=key)
    await bus.publish({}, "a")


async def test_a_queue_that_was_deleted_by_other_means_keeps_no_event_from_the_others(
    make: MakeBus, waiting: Any, cluster: Cluster
) -> None:
    for queue in ("stays", "goes"):
        await make(queue, subscriptions=["a"]).declare()
    await cluster.delete_topic("goes")

    async def gone() -> bool:
        return not await cluster.topics(["goes"])

    await eventually(gone)
    await make(None).publish({"n": 1}, "a")
    assert len(await waiting("stays", 1)) == 1


async def test_no_pattern_reads_them_and_no_list_names_them(url: str, make: MakeBus) -> None:
    await make("q", subscriptions=["a"]).declare()
    async with ADMINS["kafka"](url=url) as admin:
        assert BINDINGS not in {info.name for info in await admin.list()}
    async with Consumer("all", url=url, pattern=".*") as consumer, Producer("q", url=url) as producer:
        await producer.send("1")
        [delivery] = await consumer.receive(10, timeout=30)
        assert (delivery.message.queue, delivery.message.body) == ("q", b"1")
        assert await consumer.receive(10, timeout=0.5) == []
        await delivery.ack()


async def test_events_of_one_key_and_commands_of_it_are_in_order(make: MakeBus) -> None:
    seen: list[int] = []
    bus = make("orders", partitions=3, concurrency=20, ordered_by="key", subscriptions=["n"])

    @bus.handler
    async def note(number: dict[str, int]) -> None:
        seen.append(number["n"])

    await bus.start()
    for start in (0, 50):
        async with bus.transaction():
            for n in range(start, start + 50):
                verb = {True: bus.publish, False: bus.send}[bool(n % 2)]
                await verb({"n": n}, "n" if n % 2 else "orders", key="one")
    await reaches(seen, 100)
    assert seen == list(range(100))


async def test_what_handlers_publish_exactly_once_leaves_with_the_acknowledgement(
    make: MakeBus, waiting: Callable[[str, int], Awaitable[list[Message]]]
) -> None:
    bus = make("orders", retry=SOON, exactly_once=True)
    for queue in ("one", "two"):
        await make(queue, subscriptions=["orders.#"]).declare()
    attempts: list[int] = []

    @bus.handler
    async def place(command: PlaceOrder, context: MessageContext) -> None:
        attempts.append(context.attempt)
        context.publish(OrderPlaced(id=command.id))
        if context.attempt < 3:
            raise ValueError("not yet")

    @bus.handler(type="nobody hears")
    async def lonely(data: int, context: MessageContext) -> None:
        context.publish(data, "nobody.hears")

    await bus.start()
    await bus.send(PlaceOrder(id=5), "orders")
    await bus.send(1, "orders", type="nobody hears")
    for queue in ("one", "two"):
        [message] = await waiting(queue, 1)
        assert message.body == b'{"id":5}'
    [rejected] = await waiting("error", 1)
    assert rejected.error is not None and "No queue is bound" in rejected.error.reason
    assert attempts == [1, 2, 3]


async def test_a_bus_of_another_exchange_type_is_told_so_at_start_up(make: MakeBus) -> None:
    await make("one").subscribe("a", exchange=Exchange("shop", type="topic"))
    bus: Bus = make("two")
    with pytest.raises(QueueError, match=r"Exchange\('shop', type='topic'\)"):
        await bus.subscribe("a", exchange=Exchange("shop", type="direct"))


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_events_go_on_when_the_leader_of_the_bindings_is_killed(kafka_cluster: KafkaCluster) -> None:
    seen, confirmed, over = set[int](), set[int](), asyncio.Event()
    bus = Bus("orders", url=kafka_cluster.url, concurrency=20, replication=3)

    @bus.handler(type="n")
    async def note(number: int) -> None:
        seen.add(number)

    async def publish(sender: Bus) -> None:
        for n in count():
            if over.is_set():
                return
            await sender.publish(n, "n", type="n")
            confirmed.add(n)

    async with bus, Bus(None, url=kafka_cluster.url) as sender:
        await bus.subscribe("n")
        publishing = asyncio.create_task(publish(sender))
        await eventually(lambda: len(confirmed) > 100)
        leader = await asyncio.to_thread(kafka_cluster.leader, BINDINGS)
        await asyncio.to_thread(leader.kill)
        at_the_kill = len(confirmed)
        await eventually(lambda: len(confirmed) > at_the_kill + 100, timeout=60)
        await bus.subscribe("m")
        await asyncio.to_thread(kafka_cluster.start)
        over.set()
        await publishing
        await eventually(lambda: confirmed <= seen, timeout=60)
