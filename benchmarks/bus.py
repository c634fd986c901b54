"""The bus: what it costs over the plain consumer, and beside FastStream on RabbitMQ.

    python -m benchmarks.bus        # all; a RabbitMQ of its own
    python -m benchmarks.bus cost   # only this; also: rabbitmq
    STREAMTOOLS_TEST_RABBITMQ_URL=amqp://... python -m benchmarks.bus

The cost is measured in process, where nothing else takes time: the same message from the queue to a handler that is
annotated with the same pydantic model, once by a Consumer and once by a Bus. With FastStream the terms are those of
`benchmarks/rabbitmq.py`, and both validate the same model.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from faststream.rabbit import Channel, ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue
from pydantic import BaseModel

from benchmarks.nodes import rabbitmq_url
from benchmarks.rounds import Contender, Stopwatch, compare
from streamtools import ADMINS, Bus, Command, Consumer, Event, Message, MessageContext
from streamtools.codec import JSON
from streamtools.message import id_generator

MESSAGES = 20_000
ON_RABBITMQ = 10_000
PREFETCH = 200
TASKS = 200
URL = f"asyncio://bench?maxsize={MESSAGES + 1}"
NOTE = "x" * 200


class Place(Command, to="bench"):
    """What is sent."""

    id: int
    note: str


class Placed(Event, name="bench.placed"):
    """What is published."""

    id: int
    note: str


class Plain(BaseModel):
    """The same without a contract."""

    id: int
    note: str


class Counter:
    """A handler's count; done at the last message."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.done = asyncio.Event()

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.done.set()


# --- what it costs ------------------------------------------------------------------------------------


def _messages() -> list[Message]:
    new_id = id_generator()
    body = Place(id=1, note=NOTE).model_dump_json().encode()
    kind = Place.__terms__.name
    return [
        Message(body=body, queue="bench", id=new_id(), content_type=JSON, type=kind, intent="command")
        for _ in range(MESSAGES)
    ]


def _put(consumer: Any) -> None:
    for message in _messages():
        consumer._queues[0].put(message)  # the send side is not what is measured


async def _by_consumer() -> tuple[int, float, float]:
    counter = Counter(MESSAGES)
    consumer = Consumer("bench", url=URL)

    @consumer()
    async def handle(order: Plain) -> None:
        counter.count()

    await consumer.open()
    _put(consumer)
    with Stopwatch() as watch:
        loop = asyncio.create_task(handle())
        await counter.done.wait()
    consumer.stop()
    await loop
    return MESSAGES, watch.wall, watch.cpu


async def _by_bus(*, context: bool) -> tuple[int, float, float]:
    counter = Counter(MESSAGES)
    bus = Bus("bench", url=URL)

    async def handle(order: Place) -> None:
        counter.count()

    async def handle_with_context(order: Place, context: MessageContext) -> None:
        counter.count()

    bus.handler(handle_with_context if context else handle)
    await bus.consumer.open()
    _put(bus.consumer)
    with Stopwatch() as watch:
        await bus.start()
        await counter.done.wait()
    await bus.stop()
    return MESSAGES, watch.wall, watch.cpu


def cost() -> None:
    """Microseconds of the bus per message, over the plain consumer."""
    contenders = [
        Contender("Bus", lambda: asyncio.run(_by_bus(context=False))),
        Contender("Bus, with a MessageContext", lambda: asyncio.run(_by_bus(context=True))),
        Contender("Consumer", lambda: asyncio.run(_by_consumer())),
    ]
    compare("Cost: in-process queue to handler and back", contenders)
    # By CPU, of which one process has one: on a busy machine the wall clock measures the neighbours.
    plain = statistics.median(contenders[-1].cpu)
    for contender in contenders[:-1]:
        extra = statistics.median(contender.cpu) - plain
        print(f"{contender.name}: {extra:.1f} us of CPU per message over the plain consumer (budget: 15)")


# --- beside FastStream --------------------------------------------------------------------------------


async def _from_tasks(send: Callable[[], Awaitable[Any]], number: int = ON_RABBITMQ) -> None:
    left = iter(range(number))

    async def work() -> None:
        for _ in left:
            await send()

    await asyncio.gather(*(work() for _ in range(TASKS)))


async def publish_by_bus(url: str) -> tuple[float, float]:
    async with Bus("bench", url=url, subscriptions=[Placed]) as bus:
        event = Placed(id=1, note=NOTE)
        with Stopwatch() as watch:
            await _from_tasks(lambda: bus.publish(event))
    return watch.wall, watch.cpu


async def consume_by_bus(url: str) -> tuple[float, float]:
    counter = Counter(ON_RABBITMQ)
    bus = Bus("bench", url=url, concurrency=PREFETCH, prefetch=PREFETCH)

    @bus.handler
    async def handle(event: Placed) -> None:
        counter.count()

    with Stopwatch() as watch:
        await bus.start()
        await counter.done.wait()
        await bus.stop()
    return watch.wall, watch.cpu


def _faststream(url: str) -> tuple[RabbitBroker, RabbitQueue, RabbitExchange]:
    broker = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)
    queue = RabbitQueue("bench", durable=True, queue_type=QueueType.QUORUM, declare=False, routing_key="bench.placed")
    return broker, queue, RabbitExchange("streamtools.topic", type=ExchangeType.TOPIC, durable=True)


async def publish_by_faststream(url: str) -> tuple[float, float]:
    broker, _, exchange = _faststream(url)
    async with broker:
        await broker.start()
        event = Plain(id=1, note=NOTE)
        with Stopwatch() as watch:
            await _from_tasks(
                lambda: broker.publish(event, routing_key="bench.placed", exchange=exchange, persist=True)
            )
    return watch.wall, watch.cpu


async def consume_by_faststream(url: str) -> tuple[float, float]:
    counter = Counter(ON_RABBITMQ)
    broker, queue, exchange = _faststream(url)

    @broker.subscriber(queue, exchange)
    async def handle(event: Plain) -> None:
        counter.count()

    with Stopwatch() as watch:
        await broker.start()
        await counter.done.wait()
        await broker.stop()
    return watch.wall, watch.cpu


async def _fresh(url: str) -> None:
    async with Bus("bench", url=url, subscriptions=[Placed]) as bus, ADMINS["rabbitmq"](url=url) as admin:
        await bus.declare()
        await admin.delete("bench")
        await bus.declare()


async def _fill(url: str) -> None:
    await _fresh(url)
    async with Bus(None, url=url) as bus, bus.transaction():
        for n in range(ON_RABBITMQ):
            await bus.publish(Placed(id=n, note=NOTE))


async def _depth(url: str) -> int:
    async with ADMINS["rabbitmq"](url=url) as admin:
        return (await admin.stats("bench")).ready


def _contender(
    url: str,
    name: str,
    before: Callable[[str], Coroutine[Any, Any, None]],
    work: Callable[[str], Coroutine[Any, Any, tuple[float, float]]],
    left: int,
) -> Contender:
    async def once() -> tuple[float, float]:
        await before(url)
        measured = await work(url)
        for _ in range(100):  # a quorum queue counts a moment late
            if await _depth(url) == left:
                return measured
            await asyncio.sleep(0.05)
        raise SystemExit(f"{name}: {await _depth(url)} messages in the queue, {left} expected")

    return Contender(name, lambda: (ON_RABBITMQ, *asyncio.run(once())))


def rabbitmq(url: str, rounds: int = 5) -> None:
    """Events through the bus, beside FastStream."""
    title = f"{ON_RABBITMQ:,} events of 220 B, persistent, quorum queue"
    publishing = [
        _contender(url, f"Bus.publish, {TASKS} tasks", _fresh, publish_by_bus, ON_RABBITMQ),
        _contender(url, f"FastStream publish, {TASKS} tasks", _fresh, publish_by_faststream, ON_RABBITMQ),
    ]
    consuming = [
        _contender(url, "Bus", _fill, consume_by_bus, 0),
        _contender(url, "FastStream", _fill, consume_by_faststream, 0),
    ]
    published = compare(f"Publish to a topic, confirmed: {title}", publishing, rounds=rounds)
    consumed = compare(f"Consume into a model, prefetch {PREFETCH}: {title}", consuming, rounds=rounds)
    print(f"\nGoal 1.5x publishing: {published[publishing[0].name]:.2f}x.")
    print(f"Goal 2.0x consuming:  {consumed['Bus']:.2f}x.")


def main(names: list[str]) -> None:
    """Print the tables."""
    logging.disable(logging.WARNING)
    names = names or ["cost", "rabbitmq"]
    if "cost" in names:
        cost()
    if "rabbitmq" in names:
        with rabbitmq_url() as url:
            rabbitmq(url)


if __name__ == "__main__":
    main(sys.argv[1:])
