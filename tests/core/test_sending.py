"""`send` keeps trying for its time, not longer and not much shorter, and says what it knows at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import ClassVar

import pytest

from streamtools import (
    CONSUMER_LOOPS,
    PRODUCERS,
    ConfigurationError,
    ConnectError,
    ConnectionLost,
    FeatureError,
    Message,
    Producer,
    SendError,
)
from streamtools.engine.backoff import LAST_TRY_MARGIN, backoff_within
from streamtools.settings import AsyncIOSettings


class Silent(Producer):
    """Its broker takes the connection and says nothing."""

    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings

    async def _open(self) -> None:
        await asyncio.Event().wait()


class Away(Silent):
    """Its broker is not there."""

    async def _open(self) -> None:
        raise ConnectError("Nobody is there.")


class Cut(Silent):
    """Its broker takes the message, and the connection ends."""

    async def _open(self) -> None: ...

    async def _send(self, batch: Sequence[Message], options: object) -> None:
        raise ConnectionLost("It was cut.")


async def test_a_broker_that_never_greets_costs_no_more_than_the_time_given() -> None:
    producer = Silent("orders", send_timeout=0.3)
    begin = time.monotonic()
    with pytest.raises(SendError, match=r"within 0.3 s.*Nothing of it has reached the broker") as caught:
        await producer.send(1, id="a")
    with pytest.raises(ConnectError, match="does anything answer there"):
        await producer.open()
    assert caught.value.unknown == ("a",)
    assert time.monotonic() - begin < 20


async def test_what_never_left_is_said_to_have_never_left() -> None:
    with pytest.raises(SendError, match=r"2 messages.*Nobody is there\. Nothing of it") as caught:
        await Away("orders", send_timeout=0.3).send_many([1, 2])
    assert len(caught.value.unknown) == 2


async def test_an_outage_is_told_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    reasons = iter(["Nobody is there.", "Nobody is there.", "Nobody is there.", "It is starting."])

    class Starting(Cut):
        async def _open(self) -> None:
            for reason in reasons:
                raise ConnectError(reason)

    async with Starting("orders", send_timeout=30):
        pass

    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.partition(": ")[2] for text in told] == [
        "Nobody is there. Trying again.",
        "It is starting. Trying again.",
    ]


async def test_what_may_have_arrived_is_said_to_be_in_doubt() -> None:
    with pytest.raises(SendError, match=r"It was cut\. The broker may hold it; send again with the same id"):
        await Cut("orders", send_timeout=0.3).send(1)


async def test_a_loss_that_is_noticed_late_does_not_end_the_next_connection() -> None:
    noticed = asyncio.Event()

    class Twice(Silent):
        opened = 0

        async def _open(self) -> None:
            self.opened += 1

        async def _send(self, batch: Sequence[Message], options: object) -> None:
            if self.opened == 1:
                if batch[0].id == "late":
                    await noticed.wait()
                raise ConnectionLost("It was cut.")

    producer = Twice("orders")
    late = asyncio.create_task(producer.send(1, id="late"))
    await asyncio.sleep(0)
    await producer.send(1, id="early")
    noticed.set()
    await late
    await producer.send(1)
    assert producer.opened == 2


@pytest.mark.parametrize("attempt", [1, 5, 50])
def test_tries_go_on_until_shortly_before_the_end(attempt: int) -> None:
    left = 6.0
    for _ in range(1000):
        delay = backoff_within(attempt, left)
        if delay is None:
            break
        assert 0 < delay < left
        left -= delay
    assert left <= LAST_TRY_MARGIN


async def test_a_tombstone_is_refused_where_the_protocol_has_none() -> None:
    producer = Silent("orders")
    with pytest.raises(FeatureError, match="carries no tombstones"):
        await producer.send(None, key="k", tombstone=True)
    with pytest.raises(FeatureError, match="carries no tombstones"):
        await producer.send_messages([Message(body=None, queue="orders", id="1", key="k")])


@pytest.mark.parametrize(("payload", "key"), [(None, None), ({}, "k"), ("", b"k")])
async def test_a_tombstone_has_a_key_and_no_payload(payload: object, key: str | bytes | None) -> None:
    async with PRODUCERS["asyncio"]("orders", url="asyncio://tombstones") as producer:
        with pytest.raises(ConfigurationError, match=r"send\(None, key=\.\.\., tombstone=True\)"):
            await producer.send(payload, key=key, tombstone=True)


async def test_a_tombstone_and_a_key_of_bytes_arrive_as_such() -> None:
    url = "asyncio://tombstones-and-keys"
    async with (
        CONSUMER_LOOPS["asyncio"]("orders", url=url) as consumer,
        PRODUCERS["asyncio"]("orders", url=url) as producer,
    ):
        await producer.send(None, key=b"\x00\xff", tombstone=True)
        await producer.send("", key=b"plain")
        one, two = [*await consumer.receive(2, timeout=5)]
        assert (one.message.body, one.message.key) == (None, b"\x00\xff")
        assert (two.message.body, two.message.key) == (b"", "plain")
