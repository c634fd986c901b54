"""Kafka: producing confirmed and consuming with commits, beside aiokafka by hand, FastStream and confluent-kafka.

All do the same on the same broker: one partition, records of 256 bytes, every one confirmed by all
in-sync replicas of an idempotent producer before it counts, batches of 500. Consuming is measured from the
first message to the last, so that no one's way into its group counts; offsets are committed, and the table
says how.

    python -m benchmarks.kafka                  # a broker of its own
    STREAMTOOLS_TEST_KAFKA_URL=kafka://... python -m benchmarks.kafka
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from statistics import median
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from confluent_kafka import Consumer as ConfluentConsumer
from confluent_kafka import Producer as ConfluentProducer
from faststream import AckPolicy
from faststream.kafka import KafkaBroker

from benchmarks.rounds import Contender, Stopwatch, compare
from streamtools import Consumer, Producer
from tests.brokers.kafka.node import KafkaNode

MESSAGES = 10_000
#: Consumed: so many that what is read ahead of the first one, before the clock runs, is little of it.
CONSUMED = 100_000
BATCH = 500
BODY = b"x" * 256
#: Single sends at once.
TASKS = 200
#: Handlers at once, where a contender has that.
HANDLERS = 32
#: FastStream's safe setting commits after each message; this many are enough to see its rate.
SLOW = 2_000

#: Where, and the topic; wall and CPU seconds.
Work = Callable[[str, str], Awaitable[tuple[float, float]]]


async def _create(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()


async def _end(bootstrap: str, topic: str) -> int:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap)
    await consumer.start()
    [end] = (await consumer.end_offsets(list(consumer.assignment()))).values()
    await consumer.stop()
    return int(end)


async def _fill(bootstrap: str, topic: str, number: int) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_batch_size=500_000)
    await producer.start()
    await asyncio.gather(*[await producer.send(topic, BODY) for _ in range(number)])
    await producer.stop()


def _hand(bootstrap: str) -> AIOKafkaProducer:
    return AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True, max_batch_size=500_000)


async def _from_tasks(send: Callable[[], Awaitable[Any]]) -> None:
    left = iter(range(MESSAGES))

    async def work() -> None:
        for _ in left:
            await send()

    await asyncio.gather(*(work() for _ in range(TASKS)))


# --- producing --------------------------------------------------------------------------------------


async def batches_ours(bootstrap: str, topic: str) -> tuple[float, float]:
    async with Producer(topic, url=f"kafka://{bootstrap}") as producer:
        with Stopwatch() as watch:
            for _ in range(MESSAGES // BATCH):
                await producer.send_many([BODY] * BATCH)
    return watch.wall, watch.cpu


async def batches_aiokafka(bootstrap: str, topic: str) -> tuple[float, float]:
    async with _hand(bootstrap) as producer:
        with Stopwatch() as watch:
            for _ in range(MESSAGES // BATCH):
                await asyncio.gather(*[await producer.send(topic, BODY) for _ in range(BATCH)])
    return watch.wall, watch.cpu


async def batches_faststream(bootstrap: str, topic: str) -> tuple[float, float]:
    async with KafkaBroker(bootstrap, enable_idempotence=True, logger=None, max_batch_size=500_000) as broker:
        await broker.start()
        with Stopwatch() as watch:
            for _ in range(MESSAGES // BATCH):
                await broker.publish_batch(*([BODY] * BATCH), topic=topic)
    return watch.wall, watch.cpu


async def batches_confluent(bootstrap: str, topic: str) -> tuple[float, float]:
    producer = ConfluentProducer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 0})
    with Stopwatch() as watch:
        for _ in range(MESSAGES // BATCH):
            for _ in range(BATCH):
                producer.produce(topic, BODY)
            await asyncio.to_thread(producer.flush)
    return watch.wall, watch.cpu


async def single_ours(bootstrap: str, topic: str) -> tuple[float, float]:
    async with Producer(topic, url=f"kafka://{bootstrap}") as producer:
        with Stopwatch() as watch:
            await _from_tasks(lambda: producer.send(BODY))
    return watch.wall, watch.cpu


async def single_aiokafka(bootstrap: str, topic: str) -> tuple[float, float]:
    async with _hand(bootstrap) as producer:
        with Stopwatch() as watch:
            await _from_tasks(lambda: producer.send_and_wait(topic, BODY))
    return watch.wall, watch.cpu


async def single_faststream(bootstrap: str, topic: str) -> tuple[float, float]:
    async with KafkaBroker(bootstrap, enable_idempotence=True, logger=None) as broker:
        await broker.start()
        with Stopwatch() as watch:
            await _from_tasks(lambda: broker.publish(BODY, topic))
    return watch.wall, watch.cpu


async def in_turns(bootstrap: str, batches: int = 300) -> None:
    """One batch of ours and one of FastStream's in turns: the fairest comparison on a machine that is not quiet."""
    ours, theirs = (f"bench-{secrets.token_hex(4)}" for _ in range(2))
    await _create(bootstrap, ours)
    await _create(bootstrap, theirs)
    faststream = KafkaBroker(bootstrap, enable_idempotence=True, logger=None, max_batch_size=500_000)
    async with Producer(ours, url=f"kafka://{bootstrap}") as producer, faststream as broker:
        await broker.start()
        works: list[Callable[[], Awaitable[Any]]] = [
            lambda: producer.send_many([BODY] * BATCH),
            lambda: broker.publish_batch(*([BODY] * BATCH), topic=theirs),
        ]
        found: list[list[tuple[float, float]]] = [[], []]
        for number in range(batches):
            for who in (0, 1) if number % 2 else (1, 0):
                with Stopwatch() as watch:
                    await works[who]()
                found[who].append((watch.wall, watch.cpu))
    (wall, cpu), (other_wall, other_cpu) = (map(median, zip(*times[2:], strict=True)) for times in found)
    us = 1e6 / BATCH
    print(f"\nIn turns, {batches} batches of each, medians: send_many has {other_wall / wall:.2f}x of publish_batch;")
    print(f"CPU {cpu * us:.2f} and {other_cpu * us:.2f} us/message.")


# --- consuming --------------------------------------------------------------------------------------


class Counter:
    """Counts messages; the clock runs from the first to the last."""

    def __init__(self, number: int = CONSUMED) -> None:
        self.number = number
        self.seen = 0
        self.done = asyncio.Event()
        self.first = self.last = (0.0, 0.0)

    def read(self, bodies: Iterable[bytes]) -> None:
        """Count those that are what was sent; a handler reads them, so all contenders do."""
        self.count(sum(len(body) for body in bodies) // len(BODY))

    def count(self, number: int = 1) -> None:
        if not self.seen:
            self.first = time.perf_counter(), time.process_time()
        self.seen += number
        if self.seen >= self.number and not self.done.is_set():
            self.last = time.perf_counter(), time.process_time()
            self.done.set()

    def measured(self) -> tuple[float, float]:
        return self.last[0] - self.first[0], self.last[1] - self.first[1]


async def batches_consumed_ours(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter()
    async with Consumer(topic, url=f"kafka://{bootstrap}", prefetch=BATCH) as consumer:
        while not counter.done.is_set():
            batch = await consumer.receive(BATCH)
            counter.read(delivery.message.body for delivery in batch)
            await consumer.ack_many(batch)
    return counter.measured()


def _consumer(bootstrap: str, topic: str) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=topic, enable_auto_commit=False, auto_offset_reset="earliest"
    )


async def batches_consumed_aiokafka(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter()
    async with _consumer(bootstrap, topic) as consumer:
        while not counter.done.is_set():
            for records in (await consumer.getmany(timeout_ms=1000, max_records=BATCH)).values():
                counter.read(record.value for record in records)
                await consumer.commit()
    return counter.measured()


async def batches_consumed_faststream(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter()
    broker = KafkaBroker(bootstrap, logger=None)
    options: dict[str, Any] = {"auto_offset_reset": "earliest", "ack_policy": AckPolicy.NACK_ON_ERROR}

    @broker.subscriber(topic, group_id=topic, batch=True, max_records=BATCH, **options)
    async def handle(bodies: list[bytes]) -> None:
        counter.read(bodies)

    return await _run_faststream(broker, counter)


async def handled_ours(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter()
    consumer = Consumer(topic, url=f"kafka://{bootstrap}", concurrency=HANDLERS, prefetch=BATCH)

    @consumer()
    async def handle(body: bytes) -> None:
        counter.count()

    running = asyncio.create_task(handle())
    await counter.done.wait()
    consumer.stop()
    await running
    return counter.measured()


async def handled_aiokafka(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter(SLOW)
    async with _consumer(bootstrap, topic) as consumer:
        async for _ in consumer:
            counter.count()
            await consumer.commit()
            if counter.done.is_set():
                return counter.measured()
    raise AssertionError("not reached")


async def handled_faststream(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter(SLOW)
    broker = KafkaBroker(bootstrap, logger=None)
    options: dict[str, Any] = {"auto_offset_reset": "earliest", "ack_policy": AckPolicy.NACK_ON_ERROR}

    @broker.subscriber(topic, group_id=topic, **options)
    async def handle(body: bytes) -> None:
        counter.count()

    return await _run_faststream(broker, counter)


async def _run_faststream(broker: KafkaBroker, counter: Counter) -> tuple[float, float]:
    await broker.start()
    await counter.done.wait()
    await broker.stop()
    return counter.measured()


async def handled_confluent(bootstrap: str, topic: str) -> tuple[float, float]:
    counter = Counter(SLOW)
    options = {"bootstrap.servers": bootstrap, "group.id": topic, "auto.offset.reset": "earliest"}

    def work() -> None:
        consumer = ConfluentConsumer({**options, "enable.auto.commit": False})
        consumer.subscribe([topic])
        while counter.seen < SLOW:
            message = consumer.poll(1.0)
            if message is not None and message.error() is None:
                counter.count()
                consumer.commit(message, asynchronous=False)
        consumer.close()

    await asyncio.to_thread(work)
    return counter.measured()


# --- rounds -----------------------------------------------------------------------------------------


def _contender(bootstrap: str, name: str, work: Work, *, fill: int = 0, moved: int = MESSAGES) -> Contender:
    expected = fill or MESSAGES

    async def once() -> tuple[float, float]:
        topic = f"bench-{secrets.token_hex(4)}"
        await _create(bootstrap, topic)
        if fill:
            await _fill(bootstrap, topic, fill)
        measured = await work(bootstrap, topic)
        if (end := await _end(bootstrap, topic)) != expected:
            raise SystemExit(f"{name}: {end} messages in the topic, {expected} expected")
        return measured

    def run() -> tuple[int, float, float]:
        return moved, *asyncio.run(once())

    return Contender(name, run)


def main(rounds: int = 5) -> None:
    """Measure, and say whether the goals are met."""
    logging.disable(logging.ERROR)
    if url := os.environ.get("STREAMTOOLS_TEST_KAFKA_URL"):
        return _measure(url.partition("://")[2].rstrip("/"), rounds)
    with KafkaNode() as node:
        _measure(node.address.bootstrap, rounds)


def _measure(bootstrap: str, rounds: int) -> None:
    def produce(name: str, work: Work) -> Contender:
        return _contender(bootstrap, name, work)

    def consume(name: str, work: Work, moved: int = CONSUMED) -> Contender:
        return _contender(bootstrap, name, work, fill=CONSUMED, moved=moved)

    title = f"{MESSAGES:,} messages of {len(BODY)} B, one partition"
    consumed = f"{CONSUMED:,} messages of {len(BODY)} B, one partition"
    batches = compare(
        f"Produce, batches of {BATCH}, confirmed: {title}",
        [
            produce("streamtools send_many", batches_ours),
            produce("FastStream publish_batch", batches_faststream),
            produce("confluent-kafka", batches_confluent),
            produce("aiokafka by hand", batches_aiokafka),
        ],
        rounds=rounds,
    )
    asyncio.run(in_turns(bootstrap))
    single = compare(
        f"Produce, {TASKS} tasks that each await one: {title}",
        [
            produce("streamtools send", single_ours),
            produce("FastStream publish", single_faststream),
            produce("aiokafka by hand", single_aiokafka),
        ],
        rounds=rounds,
    )
    taken = compare(
        f"Consume, batches of {BATCH}, committed: {consumed}",
        [
            consume("streamtools receive", batches_consumed_ours),
            consume("FastStream batch=True", batches_consumed_faststream),
            consume("aiokafka by hand", batches_consumed_aiokafka),
        ],
        rounds=rounds,
    )
    handled = compare(
        f"Handle one by one, nothing lost by a crash: {consumed}; ours {HANDLERS} at once, the others commit after "
        f"each, {SLOW:,} of them",
        [
            consume(f"streamtools, concurrency={HANDLERS}", handled_ours),
            consume("confluent-kafka", handled_confluent, SLOW),
            consume("aiokafka by hand", handled_aiokafka, SLOW),
            consume("FastStream NACK_ON_ERROR", handled_faststream, SLOW),
        ],
        rounds=rounds,
    )
    ours = batches["streamtools send_many"], taken["streamtools receive"]
    theirs = batches["FastStream publish_batch"], taken["FastStream batch=True"]
    print(f"\nGoal 0.9x aiokafka, batches:  produce {ours[0]:.2f}x, consume {ours[1]:.2f}x.")
    print(f"Goal 1.5x FastStream, batches: produce {ours[0] / theirs[0]:.2f}x, consume {ours[1] / theirs[1]:.2f}x.")
    print(f"      1.5x FastStream, single: {single['streamtools send'] / single['FastStream publish']:.2f}x.")
    print(f"Goal 3.0x FastStream, safe and concurrent: {handled[f'streamtools, concurrency={HANDLERS}']:.2f}x.")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
