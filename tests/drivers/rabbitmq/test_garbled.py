"""A stream of frames that is out of step is a lost connection, and everything goes on over another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final
from urllib.parse import urlsplit

import pytest

from streamtools.drivers.rabbitmq import RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.amqp import channel_pool
from streamtools.errors import ConnectionLost
from tests.brokers.address import RabbitMQAddress
from tests.drivers.rabbitmq.conftest import take
from tests.faults.amqp import RefusingBroker
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until


def _with(place: int, octet: int) -> Callable[[bytes], bytes]:
    """Put another octet there."""
    return lambda data: data[:place] + bytes((octet,)) + data[place:][1:]


def _end(data: bytes) -> int:
    """Where the first frame's end octet stands."""
    return 7 + int.from_bytes(data[3:7], "big")


#: What is done to the first frame of a chunk.
GARBLED: Final[dict[str, Callable[[bytes], bytes]]] = {
    "a type that there is not": _with(0, 9),
    "a heartbeat with a payload": _with(0, 8),
    "content without a method": _with(0, 3),
    "a channel that was never opened": _with(1, 7),
    "a length over the frame's largest": _with(3, 0x7F),
    "a length over the method's largest": _with(5, 0x7F),
    "a length that swallows what follows": _with(5, 0x0F),
    "a length that is too small": _with(6, 2),
    "another end octet": lambda data: _with(_end(data), 0xCF)(data),
    "a byte less in the head": lambda data: data[:3] + data[4:],
    "a byte less in the payload": lambda data: data[:9] + data[10:],
    "a byte less at the end": lambda data: data[: _end(data)] + data[_end(data) + 1 :],
}
CASES = pytest.mark.parametrize("how", GARBLED)


class Door(Proxy):
    """Garbles one chunk when it is told to, then nothing any more."""

    is_spoiling = False

    def spoil(self, how: str) -> None:
        """Garble what comes next."""
        self.is_spoiling = True
        self.garble = lambda data: self._once(GARBLED[how], data)

    def _once(self, change: Callable[[bytes], bytes], data: bytes) -> bytes:
        self.is_spoiling = False
        self.garble = lambda data: data
        return change(data)


@pytest.fixture
async def door(rabbitmq_vhost: RabbitMQAddress) -> AsyncIterator[Door]:
    """A way to the broker."""
    where = urlsplit(rabbitmq_vhost.url)
    assert where.hostname is not None
    assert where.port is not None
    async with Door(where.hostname, where.port) as made:
        yield made


@pytest.fixture
def through(rabbitmq_vhost: RabbitMQAddress, door: Door) -> str:
    """Its URL. Two seconds without a whole frame are the end of a connection."""
    return rabbitmq_vhost.url.replace(f":{door.target[1]}/", f":{door.port}/") + "?heartbeat=1"


@CASES
async def test_a_producer_goes_on_after_a_garbled_confirmation(door: Door, through: str, how: str) -> None:
    async with RabbitMQProducer("orders", url=through) as producer:
        door.spoil(how)
        async with asyncio.timeout(10):
            await producer.send(b"x")
        assert not door.is_spoiling


@CASES
async def test_a_consumer_goes_on_after_a_garbled_delivery(door: Door, through: str, url: str, how: str) -> None:
    async with RabbitMQConsumer("orders", url=through) as consumer, RabbitMQProducer("orders", url=url) as producer:
        door.spoil(how)
        await producer.send(b"x")
        (delivery,) = await take(consumer, 1, timeout=10)
        assert delivery.message.body == b"x"
        assert not door.is_spoiling


@pytest.mark.parametrize("patience", [0.05, 600.0])
async def test_a_connection_that_opens_no_channel_is_given_up_however_long_the_caller_waits(
    patience: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel_pool, "OPEN_TIMEOUT", 0.2)
    async with RefusingBroker("", 0, "", times=0) as broker, RabbitMQProducer("orders", url=broker.url) as producer:
        await producer.send(b"first")
        broker.mute = {"Channel.Open"}
        assert producer._publisher is not None
        shared = producer._publisher._connection
        with pytest.raises((ConnectionLost, TimeoutError)):
            async with asyncio.timeout(patience):
                await shared.channels.open(confirms=False)
        await wait_until(lambda: shared.lost is not None)
        assert "not answered the opening of a channel" in str(shared.lost)
        broker.mute = set()
        async with asyncio.timeout(10):
            await producer.send(b"second")
        assert broker.held == [b"first", b"second"]
    assert not [record for record in caplog.records if record.name.startswith("aiormq")]
