"""A driver that defines `_read`: its client library ignores cancellations, or loses what it has read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from streamtools import Closed, Consumer, Producer
from streamtools.consumer import CONSUMER_LOOPS
from streamtools.delivery import Delivery, Reads
from streamtools.driver import ConnectionLost, ConsumerHooks
from streamtools.drivers.asyncio import AsyncIOConsumer, AsyncIOProducer
from streamtools.message import Message
from streamtools.producer import PRODUCERS
from streamtools.testing.conformance.loops import LoopCases
from streamtools.testing.conformance.receiving import ReceivingCases


class DeafConsumer(AsyncIOConsumer, protocol="deaf"):
    """Its client library goes on after the first cancellation."""

    _receive, _poll = ConsumerHooks._receive, ConsumerHooks._poll

    async def _read(self, limit: int) -> Sequence[Delivery]:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)
        return await super()._receive(limit)

    async def _stop(self) -> None:
        await ConsumerHooks._stop(self)
        await super()._stop()


class DeafProducer(AsyncIOProducer, protocol="deaf"):
    pass


class TestDeaf(ReceivingCases, LoopCases):
    protocol = "deaf"

    @pytest.fixture
    def url(self) -> str:
        return "asyncio://deaf"


def delivery(number: int) -> Delivery:
    return Delivery(Message(body=b"%d" % number, queue="orders", id=str(number)))


def bodies(deliveries: Sequence[Delivery]) -> list[bytes | None]:
    return [each.message.body for each in deliveries]


async def test_whoever_waits_can_be_cancelled_and_the_next_one_gets_it() -> None:
    arrived, limits = asyncio.Event(), []

    async def read(limit: int) -> Sequence[Delivery]:
        limits.append(limit)
        await arrived.wait()
        return [delivery(number) for number in range(limit)]

    reads = Reads(read)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await reads.take(3)
    arrived.set()
    assert bodies(await reads.take(2)) == [b"0", b"1"]
    assert bodies(await reads.take(2)) == [b"2"]
    assert limits == [3]


async def test_what_nobody_has_received_is_given_back_when_it_ends() -> None:
    async def read(limit: int) -> Sequence[Delivery]:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return [delivery(0)]

    reads = Reads(read)
    waiting = asyncio.create_task(reads.take(3))
    await asyncio.sleep(0.01)
    assert bodies(await reads.end()) == [b"0"]
    with pytest.raises(Closed):
        await waiting
    assert await reads.end() == []


async def test_an_error_is_raised_to_the_next_one_that_waits() -> None:
    async def read(limit: int) -> Sequence[Delivery]:
        await asyncio.sleep(0.01)
        raise ConnectionLost("cut")

    reads = Reads(read)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await reads.take(1)
    with pytest.raises(ConnectionLost):
        await reads.take(1)


@pytest.fixture
def stubborn() -> Iterator[str]:
    """A protocol whose reads ignore every cancellation until it is closed."""

    class StubbornConsumer(DeafConsumer, protocol="stubborn"):
        ended = False

        async def _read(self, limit: int) -> Sequence[Delivery]:
            while not self.ended:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)
            raise ConnectionLost("closed")

        async def _close(self) -> None:
            self.ended = True
            await super()._close()

    class StubbornProducer(AsyncIOProducer, protocol="stubborn"):
        pass

    yield StubbornConsumer.protocol
    del CONSUMER_LOOPS["stubborn"], PRODUCERS["stubborn"]


@pytest.mark.parametrize("closes", [True, False])
def test_a_read_that_ignores_every_cancellation_ends_with_its_connection(stubborn: str, closes: bool) -> None:
    async def use() -> Consumer:
        consumer = CONSUMER_LOOPS[stubborn]("orders", url="asyncio://stubborn")
        assert await consumer.receive(timeout=0.05) == []
        if closes:
            await consumer.close()
        return consumer

    assert not asyncio.run(use()).connected


# --- names --------------------------------------------------------------------------------------


def test_a_driver_is_told_that_a_name_is_in_use_by_its_base_class() -> None:
    with pytest.raises(TypeError, match="Clumsy defines _connected, which Consumer has"):

        class Clumsy(Consumer, protocol="clumsy"):
            def _connected(self) -> None:
                """It would hide whether there is a connection."""

    with pytest.raises(TypeError, match="Clumsier defines _outbox, which Producer has"):

        class Clumsier(Producer, protocol="clumsy"):
            _outbox: list[str]
