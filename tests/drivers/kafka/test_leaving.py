"""Leaving in the middle of whatever: a consumer that is asked to end does so within two seconds."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamtools.drivers.kafka import KafkaAdmin, KafkaConsumer, KafkaProducer
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.node import KafkaNode
from tests.drivers.kafka.conftest import MakeProducer, Running

#: Seconds within which it ends, on a busy machine.
SOON = 3.0
#: The request with which a client asks which requests a broker knows.
API_VERSIONS = 18


@asynccontextmanager
async def joining(consumer: KafkaConsumer) -> AsyncIterator[asyncio.Task[object]]:
    """A consumer that waits for its group, and is cancelled at the end."""
    task = asyncio.create_task(consumer.open())
    await eventually(lambda: task.done() or _asks(consumer))
    yield task
    task.cancel()
    async with asyncio.timeout(SOON):
        with pytest.raises(asyncio.CancelledError):
            await task


def _asks(consumer: KafkaConsumer) -> bool:
    membership = consumer._member
    return membership is not None and membership.coordinator is not None


@pytest.mark.real_kafka("members that wait for others")
async def test_a_consumer_that_joins_while_another_is_slow_to_let_go_ends_at_once(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def handle(msg: int) -> None:
        begun.set()
        await go.wait()

    async with running(handle) as other:
        await (await producer()).send(1)
        await begun.wait()
        generation = other._member.coordinator.place.generation
        consumer = KafkaConsumer(queue, url=kafka.url)
        async with joining(consumer) as task:
            await eventually(lambda: bool(other._member.partitions) and _going(other))
            assert not task.done()
        go.set()
        # Nobody waits for the one that went: the other has its partitions again long before a session would end.
        async with asyncio.timeout(SOON):
            await eventually(lambda: bool(other._member.partitions) and not _going(other))
        assert other._member.coordinator.place.generation > generation


def _going(consumer: KafkaConsumer) -> bool:
    return any(assigned.revoking for assigned in consumer._member.partitions.values())


class Silent:
    """Says which requests it knows, as a broker does, and answers nothing else."""

    def __init__(self) -> None:
        self.asked: asyncio.Event = asyncio.Event()
        self.open: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4))
                request = await reader.readexactly(size)
                key, number = int.from_bytes(request[:2]), request[4:8]
                if key != API_VERSIONS:
                    self.asked.set()
                    continue
                ranges = b"".join(struct.pack(">hhh", key, 0, 3) for key in range(40))
                answer = number + struct.pack(">hi", 0, 40) + ranges
                writer.write(len(answer).to_bytes(4) + answer)
        except asyncio.IncompleteReadError:
            self.open -= 1
        finally:
            writer.close()


@pytest.mark.parametrize("kind", [KafkaProducer, KafkaConsumer, KafkaAdmin])
async def test_who_is_asked_to_end_before_the_broker_has_answered_closes_the_connection(kind: Any) -> None:
    silent = Silent()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"kafka://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        endpoint = kind(url=url) if kind is KafkaAdmin else kind("orders", url=url)
        opening = asyncio.create_task(endpoint.open())
        await silent.asked.wait()
        opening.cancel()
        async with asyncio.timeout(SOON):
            with pytest.raises(asyncio.CancelledError) as held:  # it keeps alive what would warn in its end
                await opening
        await eventually(lambda: silent.open == 0)
        del held


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_consumer_whose_broker_dies_while_it_joins_ends_at_once(own_kafka: KafkaNode, queue: str) -> None:
    first = await KafkaConsumer(queue, url=own_kafka.url).open()
    try:
        async with joining(KafkaConsumer(queue, url=own_kafka.url)):
            await asyncio.to_thread(own_kafka.kill)
        async with asyncio.timeout(SOON):
            await first.close()
    finally:
        await asyncio.to_thread(own_kafka.start)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_consumer_whose_broker_freezes_ends_soon(own_kafka: KafkaNode, queue: str) -> None:
    first = await KafkaConsumer(queue, url=own_kafka.url).open()
    own_kafka.freeze()
    try:
        opening = asyncio.create_task(KafkaConsumer(queue, url=own_kafka.url).open())
        await asyncio.sleep(0.5)  # wherever it is by then: it has no answer yet
        opening.cancel()
        async with asyncio.timeout(SOON):
            with pytest.raises(asyncio.CancelledError):
                await opening
        async with asyncio.timeout(3 * SOON):
            await first.close()
    finally:
        own_kafka.thaw()
