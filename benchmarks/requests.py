"""Requests and replies through a broker, beside FastStream and aio-pika by hand, and in process.

One process asks and answers: a request leaves, the handler of the other side returns a model, and the asker gets it
back validated. On RabbitMQ the request is persistent and confirmed, in a quorum queue; ours and the one by hand have
their replies in an exclusive queue of their own, FastStream by RabbitMQ's direct reply-to. A `RabbitBroker` of
FastStream has one request under way at a time, so that the others wait behind it.

    python -m benchmarks.requests            # all; a RabbitMQ of its own
    python -m benchmarks.requests process    # only this; also: rabbitmq
    STREAMTOOLS_TEST_RABBITMQ_URL=amqp://... python -m benchmarks.requests
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import aio_pika
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from pydantic import BaseModel

from benchmarks.nodes import rabbitmq_url
from benchmarks.rounds import Contender, Stopwatch, compare
from streamtools import ADMINS, Bus, Command
from streamtools.message import id_generator

TASKS = 100
TOGETHER = 1_000
ALONE = 300
IN_PROCESS = 5_000
PREFETCH = 200
QUEUE = "bench-prices"
NOTE = "x" * 200


class Quote(Command, name="bench.Quote", to=QUEUE):
    """What is asked."""

    id: int
    note: str


class Price(BaseModel):
    """What is answered."""

    id: int
    cents: int


class Plain(BaseModel):
    """The question without a contract."""

    id: int
    note: str


#: Asks once, with this number.
Ask = Callable[[int], Awaitable[Price]]


# --- who answers, and how one asks --------------------------------------------------------------------


@asynccontextmanager
async def by_bus(url: str) -> AsyncIterator[Ask]:
    prices = Bus(QUEUE, url=url, concurrency=PREFETCH, prefetch=PREFETCH)

    @prices.handler
    async def quote(question: Quote) -> Price:
        return Price(id=question.id, cents=350)

    async with prices, Bus(None, url=url) as shop:
        yield lambda n: shop.request(Quote(id=n, note=NOTE), returns=Price, timeout=60)


@asynccontextmanager
async def by_faststream(url: str) -> AsyncIterator[Ask]:
    queue = RabbitQueue(QUEUE, durable=True, queue_type=QueueType.QUORUM, declare=False)
    prices = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)

    @prices.subscriber(queue)
    async def quote(question: Plain) -> Price:
        return Price(id=question.id, cents=350)

    async with prices, RabbitBroker(url, logger=None) as shop:
        await prices.start()

        async def ask(n: int) -> Price:
            question = Plain(id=n, note=NOTE)
            answer = await shop.request(question, queue, persist=True, timeout=60)
            return Price.model_validate(await answer.decode())

        yield ask


@asynccontextmanager
async def by_hand(url: str) -> AsyncIterator[Ask]:
    """The same on aio-pika, without what happens when something fails."""
    new_id, waiting = id_generator(), dict[str, asyncio.Future[Price]]()
    async with await aio_pika.connect(url) as service, await aio_pika.connect(url) as client:
        answering, asking = await service.channel(), await client.channel()
        await answering.set_qos(PREFETCH)
        replies = await asking.declare_queue("", exclusive=True)

        async def quote(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            async with message.process():
                question = Plain.model_validate_json(message.body)
                price = Price(id=question.id, cents=350).model_dump_json().encode()
                reply = aio_pika.Message(price, correlation_id=message.correlation_id)
                await answering.default_exchange.publish(reply, routing_key=message.reply_to or "")

        async def answered(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            waiting.pop(message.correlation_id or "").set_result(Price.model_validate_json(message.body))

        async def ask(n: int) -> Price:
            name, answer = new_id(), asyncio.get_running_loop().create_future()
            waiting[name] = answer
            question = aio_pika.Message(
                Plain(id=n, note=NOTE).model_dump_json().encode(),
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                correlation_id=name,
                reply_to=replies.name,
            )
            await asking.default_exchange.publish(question, routing_key=QUEUE)
            return await answer

        questions = await answering.get_queue(QUEUE, ensure=False)
        tag = await questions.consume(quote)
        await replies.consume(answered, no_ack=True)
        yield ask
        # A quorum queue forgets acknowledgements with a channel that closes right behind them.
        await questions.cancel(tag)
        await answering.close()


@asynccontextmanager
async def by_queue(_: str) -> AsyncIterator[Ask]:
    """The same in process: a task that takes the JSON of questions from a queue, and a future for each answer."""
    questions: asyncio.Queue[tuple[bytes, asyncio.Future[bytes]]] = asyncio.Queue()

    async def quote() -> None:
        while True:
            body, answer = await questions.get()
            question = Plain.model_validate_json(body)
            answer.set_result(Price(id=question.id, cents=350).model_dump_json().encode())

    async def ask(n: int) -> Price:
        answer = asyncio.get_running_loop().create_future()
        questions.put_nowait((Plain(id=n, note=NOTE).model_dump_json().encode(), answer))
        return Price.model_validate_json(await answer)

    service = asyncio.create_task(quote())
    yield ask
    service.cancel()


# --- rounds -------------------------------------------------------------------------------------------


@dataclass
class Asking:
    """One way to ask, measured.

    Attributes:
        name: as it stands in the tables.
        way: opens both sides.
        times: milliseconds that each request took, of all rounds.
    """

    name: str
    way: Callable[[str], AbstractAsyncContextManager[Ask]]
    times: list[float] = field(default_factory=list)

    def contender(self, url: str, number: int, tasks: int) -> Contender:
        """Asks `number` times, from so many tasks."""
        return Contender(self.name, lambda: asyncio.run(self._measure(url, number, tasks)))

    async def _measure(self, url: str, number: int, tasks: int) -> tuple[int, float, float]:
        left = iter(range(number))

        async def work() -> None:
            for n in left:
                began = time.perf_counter()
                answer = await ask(n)
                self.times.append((time.perf_counter() - began) * 1000)
                if (answer.id, answer.cents) != (n, 350):
                    raise SystemExit(f"{self.name}: request {n} was answered {answer!r}")

        async with self.way(url) as ask:
            await ask(0)  # what asks is connected
            with Stopwatch() as watch:
                await asyncio.gather(*(work() for _ in range(tasks)))
        return number, watch.wall, watch.cpu


async def _fresh(url: str) -> None:
    """The queue, empty."""
    async with Bus(QUEUE, url=url) as bus, ADMINS["rabbitmq"](url=url) as admin:
        await bus.declare()
        await admin.delete(QUEUE)
        await bus.declare()


def _compare(url: str, title: str, ways: list[Asking], number: int, tasks: int, rounds: int) -> dict[str, float]:
    ratios = compare(
        f"{title}: {number:,} requests of 220 B", [w.contender(url, number, tasks) for w in ways], rounds=rounds
    )
    for way in ways:
        cuts = statistics.quantiles(way.times, n=100)
        print(f"{way.name}: p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms")
    return ratios


def rabbitmq(url: str, rounds: int = 5) -> None:
    """Beside FastStream and aio-pika."""

    def ways() -> list[Asking]:
        return [
            Asking("Bus.request", by_bus),
            Asking("aio-pika by hand", by_hand),
            Asking("FastStream", by_faststream),
        ]

    asyncio.run(_fresh(url))
    _compare(url, "RabbitMQ, one after the other", ways(), ALONE, 1, rounds)
    ratios = _compare(url, f"RabbitMQ, from {TASKS} tasks", ways(), TOGETHER, TASKS, rounds)
    print(f"\nGoal 2.0x of FastStream from {TASKS} tasks: {ratios['Bus.request']:.2f}x.")


def process(rounds: int = 5) -> None:
    """What the bus costs, where nothing else takes time."""
    ways = [Asking("Bus.request", by_bus), Asking("asyncio.Queue and futures by hand", by_queue)]
    _compare("asyncio://bench", f"In process, from {TASKS} tasks", ways, IN_PROCESS, TASKS, rounds)


def main(names: list[str]) -> None:
    """Print the tables."""
    logging.disable(logging.WARNING)
    names = names or ["process", "rabbitmq"]
    if "process" in names:
        process()
    if "rabbitmq" in names:
        with rabbitmq_url() as url:
            rabbitmq(url)


if __name__ == "__main__":
    main(sys.argv[1:])
