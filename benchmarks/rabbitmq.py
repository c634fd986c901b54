"""RabbitMQ: publishing with confirms and consuming with acknowledgement, beside FastStream and aio-pika by hand.

All three do the same on the same broker: durable quorum queue, persistent messages of 256 bytes,
every one confirmed before it counts, prefetch 200, acknowledged after the handler returned. Publishing
is pipelined: as many in flight as the client takes. FastStream and aio-pika publish from tasks that
each await their own confirm, because that is the way they offer; ours is shown both from such
tasks (`send`) and as batches (`send_many`).

    python -m benchmarks.rabbitmq                  # a broker of its own
    STREAMTOOLS_TEST_RABBITMQ_URL=amqp://... python -m benchmarks.rabbitmq
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import aiormq
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

from benchmarks.nodes import rabbitmq_url
from benchmarks.rounds import Contender, Stopwatch, compare
from streamtools import Consumer, Producer

MESSAGES = 10_000
BODY = b"x" * 256
PREFETCH = 200
#: Publishing tasks at once; more do not make the contenders faster.
TASKS = 200
QUEUE = "bench"
ARGUMENTS: dict[str, Any] = {"x-queue-type": "quorum"}

Work = Callable[[str], Awaitable[tuple[float, float]]]


@asynccontextmanager
async def _raw(url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    connection = await aiormq.connect(url)
    yield await connection.channel()
    await connection.close()


async def _fresh(url: str) -> None:
    async with _raw(url) as channel:
        await channel.queue_delete(QUEUE)
        await channel.queue_declare(QUEUE, durable=True, arguments=ARGUMENTS)


async def _depth(url: str) -> int:
    async with _raw(url) as channel:
        return (await channel.queue_declare(QUEUE, passive=True)).message_count or 0


async def _fill(url: str) -> None:
    await _fresh(url)
    async with Producer(QUEUE, url=url) as producer:
        await producer.send_many([BODY] * MESSAGES)


async def _from_tasks(send: Callable[[], Awaitable[Any]]) -> None:
    left = iter(range(MESSAGES))

    async def work() -> None:
        for _ in left:
            await send()

    await asyncio.gather(*(work() for _ in range(TASKS)))


# --- publishing ---------------------------------------------------------------------------------------


async def publish_ours(url: str) -> tuple[float, float]:
    async with Producer(QUEUE, url=url) as producer:
        with Stopwatch() as watch:
            await _from_tasks(lambda: producer.send(BODY))
    return watch.wall, watch.cpu


async def publish_ours_batched(url: str) -> tuple[float, float]:
    async with Producer(QUEUE, url=url) as producer:
        with Stopwatch() as watch:
            for _ in range(MESSAGES // 500):
                await producer.send_many([BODY] * 500)
    return watch.wall, watch.cpu


async def publish_aio_pika(url: str) -> tuple[float, float]:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = channel.default_exchange

        async def send() -> None:
            message = aio_pika.Message(BODY, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await exchange.publish(message, routing_key=QUEUE)

        with Stopwatch() as watch:
            await _from_tasks(send)
    return watch.wall, watch.cpu


def _faststream(url: str) -> tuple[RabbitBroker, RabbitQueue]:
    broker = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)
    return broker, RabbitQueue(QUEUE, durable=True, queue_type=QueueType.QUORUM, declare=False)


async def publish_faststream(url: str) -> tuple[float, float]:
    broker, queue = _faststream(url)
    async with broker:
        await broker.start()
        with Stopwatch() as watch:
            await _from_tasks(lambda: broker.publish(BODY, queue, persist=True))
    return watch.wall, watch.cpu


# --- consuming ----------------------------------------------------------------------------------------


class Counter:
    """A handler's count; done at the last message."""

    def __init__(self) -> None:
        self.left = MESSAGES
        self.done = asyncio.Event()

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.done.set()


async def consume_ours(url: str) -> tuple[float, float]:
    counter = Counter()
    consumer = Consumer(QUEUE, url=url, concurrency=PREFETCH, prefetch=PREFETCH)

    @consumer()
    async def handle(body: bytes) -> None:
        counter.count()

    with Stopwatch() as watch:
        running = asyncio.create_task(handle())
        await counter.done.wait()
        consumer.stop()
        await running
    return watch.wall, watch.cpu


async def consume_aio_pika(url: str) -> tuple[float, float]:
    counter = Counter()
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(PREFETCH)
        queue = await channel.get_queue(QUEUE, ensure=False)

        async def handle(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            async with message.process():
                pass
            counter.count()

        with Stopwatch() as watch:
            tag = await queue.consume(handle)
            await counter.done.wait()
            # A quorum queue forgets acknowledgements with a channel that closes right behind them.
            await queue.cancel(tag)
            await channel.close()
    return watch.wall, watch.cpu


async def consume_faststream(url: str) -> tuple[float, float]:
    counter = Counter()
    broker, queue = _faststream(url)

    @broker.subscriber(queue)
    async def handle(body: bytes) -> None:
        counter.count()

    with Stopwatch() as watch:
        await broker.start()
        await counter.done.wait()
        await broker.stop()
    return watch.wall, watch.cpu


# --- rounds -------------------------------------------------------------------------------------------


def _contender(
    url: str, name: str, before: Callable[[str], Coroutine[Any, Any, None]], work: Work, left: int
) -> Contender:
    async def once() -> tuple[float, float]:
        await before(url)
        measured = await work(url)
        for _ in range(100):  # a quorum queue counts a moment late
            if await _depth(url) == left:
                return measured
            await asyncio.sleep(0.05)
        raise SystemExit(f"{name}: {await _depth(url)} messages in the queue, {left} expected")

    def run() -> tuple[int, float, float]:
        return MESSAGES, *asyncio.run(once())

    return Contender(name, run)


def main(rounds: int = 5) -> None:
    """Measure, and say whether the goals are met."""
    logging.disable(logging.WARNING)
    with rabbitmq_url() as url:
        _measure(url, rounds)


def _measure(url: str, rounds: int) -> None:
    publishing = [
        _contender(url, "streamtools send_many(500)", _fresh, publish_ours_batched, MESSAGES),
        _contender(url, f"streamtools send, {TASKS} tasks", _fresh, publish_ours, MESSAGES),
        _contender(url, f"aio-pika by hand, {TASKS} tasks", _fresh, publish_aio_pika, MESSAGES),
        _contender(url, f"FastStream publish, {TASKS} tasks", _fresh, publish_faststream, MESSAGES),
    ]
    consuming = [
        _contender(url, "streamtools", _fill, consume_ours, 0),
        _contender(url, "aio-pika by hand", _fill, consume_aio_pika, 0),
        _contender(url, "FastStream", _fill, consume_faststream, 0),
    ]
    title = f"{MESSAGES:,} messages of {len(BODY)} B, persistent, quorum queue"
    published = compare(f"Publish, confirmed: {title}", publishing, rounds=rounds)
    consumed = compare(f"Consume, ack after the handler, prefetch {PREFETCH}: {title}", consuming, rounds=rounds)
    print(f"\nGoal 1.5x publishing: {published[f'streamtools send, {TASKS} tasks']:.2f}x as single sends.")
    print(f"Goal 2.0x consuming:  {consumed['streamtools']:.2f}x.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
