"""Cases of a process that is killed with messages in hand."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from streamtools.consumer import CONSUMER_LOOPS
from streamtools.delivery import Delivery
from streamtools.testing.conformance.cases import Cases, except_with, needs
from streamtools.testing.conformance.stage import Stage
from streamtools.testing.waiting import TIMEOUT

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

#: Messages in the hands of the process that is killed.
HELD = 5
#: Starts a process that has all of a queue's messages in hand, and kills it with -9.
Kill = Callable[[Stage, str], Awaitable[None]]


class KilledCases(Cases):
    """Messages in the hand of a process that was killed are delivered again."""

    @pytest.fixture
    def kill_url(self, url: str | ProtocolSettings) -> str:
        """The address as a text, for another process; what it had in hand is to come back within some seconds.

        Write this fixture in your class where that takes an option, or `url` is a settings object.
        """
        if not isinstance(url, str):
            raise TypeError(f"{type(self).__name__} gives its address as settings: write a fixture named kill_url.")
        return url

    @pytest_asyncio.fixture
    async def kill_stage(self, kill_url: str, queue: str) -> AsyncIterator[Stage]:
        """A stage like `stage`, at `kill_url`."""
        stage = Stage(self.protocol, kill_url, queue)
        yield stage
        await stage.close()

    @pytest.fixture
    def kill(self) -> Kill:
        """A function that starts a process, lets it take HELD messages of the stage into hand, and kills it."""
        return kill_holder

    @needs("processes", "redelivery")
    @pytest.mark.parametrize("how", ["by_hand", "in_handlers"])
    async def test_what_a_killed_process_had_in_hand_comes_back(
        self, kill_stage: Stage, kill: Kill, how: str
    ) -> None:
        await (await kill_stage.consumer()).close()  # so that there is a queue, and a group
        await kill_stage.send_many(range(HELD))
        await kill(kill_stage, how)
        consumer = await kill_stage.consumer()
        back: list[Delivery] = []
        async with asyncio.timeout(TIMEOUT):
            while len({delivery.message.id for delivery in back}) < HELD:
                back += await consumer.receive(HELD)
        assert sorted(int(d.message.body or b"-1") for d in back) == list(range(HELD))
        assert {delivery.message.attempt for delivery in back} == {1}
        if self.features.delivery_count:
            assert all(delivery.redeliveries for delivery in back), "the broker counts deliveries"
        await consumer.ack_many(back)
        await consumer.close()
        await kill_stage.nothing_waits()

    @needs("processes", "redelivery")
    @except_with("partitioned", "a second consumer takes partitions over, with what is in hand from them")
    async def test_what_a_living_consumer_holds_for_longer_comes_to_no_other(
        self, kill_stage: Stage, kill: Kill
    ) -> None:
        await (await kill_stage.consumer()).close()
        await kill_stage.send_many(range(HELD))
        await kill(kill_stage, "by_hand")
        killed = time.monotonic()
        consumer = await kill_stage.consumer()
        held = await kill_stage.take(consumer, HELD)
        until = time.monotonic() + 1.5 * (time.monotonic() - killed) + 0.2
        other = await kill_stage.consumer()
        while (left := until - time.monotonic()) > 0:
            assert await other.receive(HELD, timeout=left) == []
        await consumer.ack_many(held)


async def kill_holder(stage: Stage, how: str) -> None:
    """Start a process that takes HELD messages into hand, and kill it.

    Parameters:
        how: "by_hand", by `receive`, or "in_handlers", which do not return.
    """
    module = CONSUMER_LOOPS[stage.protocol].__module__
    words = [module, stage.protocol, str(stage.url), stage.queue, str(HELD), how]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streamtools.testing.conformance.holder", *words,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT):
            line = await process.stdout.readline()
        assert line == b"holding\n", "the process has not taken them into hand"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
