"""Cases of event loops: global objects are used in one event loop after the other, and in several at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery
from streamtools.testing.conformance.cases import Cases, except_with, needs
from streamtools.testing.conformance.stage import Inbox, Stage
from streamtools.testing.waiting import TIMEOUT, eventually

#: Event loops, one after the other.
LOOPS: Final = 3
#: Event loops at once, each in a thread.
AT_ONCE: Final = 6

CALL: Final = "its messages are calls, which nobody receives by hand later"


class LoopCases(Cases):
    """A producer and a consumer that are created outside of an event loop can be used in any number of loops."""

    async def test_a_handler_runs_in_one_event_loop_after_the_other(self, stage: Stage) -> None:
        producer, consumer, inbox = stage.new_producer(), stage.new_consumer(), Inbox()
        handle = consumer()(inbox)

        async def round_(number: int) -> None:
            running = asyncio.create_task(handle())
            await eventually(lambda: consumer.connected)
            await producer.send(number)
            await inbox.holds(number + 1)
            if number % 2:  # else the end of the loop cancels it
                consumer.stop()
                await running

        for number in range(LOOPS):
            await in_a_loop_of_its_own(partial(round_, number))
        assert inbox.items == [*range(LOOPS)]

    @except_with("reply", CALL)
    async def test_what_is_closed_in_one_event_loop_is_opened_in_the_next(self, stage: Stage) -> None:
        await self._rounds(stage, closes=True)

    @except_with("reply", CALL)
    async def test_what_is_left_open_in_one_event_loop_is_closed_with_it(self, stage: Stage) -> None:
        await self._rounds(stage, closes=False)

    async def _rounds(self, stage: Stage, *, closes: bool) -> None:
        producer, consumer = stage.new_producer(), stage.new_consumer()
        await in_a_loop_of_its_own(partial(_make, consumer))

        async def round_(number: int) -> bytes | None:
            await producer.send(number)
            [delivery] = await _take(consumer, 1)
            await delivery.ack()
            if closes:
                await producer.close()
                await consumer.close()
            return delivery.message.body

        bodies = [await in_a_loop_of_its_own(partial(round_, number)) for number in range(LOOPS)]
        assert bodies == [b"%d" % number for number in range(LOOPS)]
        await stage.nothing_waits()

    @needs("redelivery")
    @except_with("reply", CALL)
    async def test_what_is_in_hand_when_its_event_loop_ends_comes_again(self, stage: Stage) -> None:
        producer, consumer = stage.new_producer(), stage.new_consumer()
        await in_a_loop_of_its_own(partial(_make, consumer))
        await in_a_loop_of_its_own(partial(producer.send_many, range(3)))
        for _ in range(2):  # what comes more often is handed out one by one
            held = await in_a_loop_of_its_own(partial(_take, consumer, 3))
            assert sorted(delivery.message.body or b"" for delivery in held) == [b"0", b"1", b"2"]

    @except_with("reply", CALL)
    async def test_a_producer_sends_in_several_event_loops_at_once(self, stage: Stage) -> None:
        producer, consumer = stage.new_producer(), await stage.consumer()
        await asyncio.gather(*(in_a_loop_of_its_own(partial(producer.send, number)) for number in range(AT_ONCE)))
        taken = await stage.take(consumer, AT_ONCE)
        await consumer.ack_many(taken)
        assert sorted(int(delivery.message.body or b"-1") for delivery in taken) == [*range(AT_ONCE)]


async def in_a_loop_of_its_own(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine by `asyncio.run`, in a thread."""
    async with asyncio.timeout(3 * TIMEOUT):
        return await asyncio.to_thread(lambda: asyncio.run(work()))


async def _make(consumer: Consumer) -> None:
    """Open and close a consumer, so that the queue and the group exist."""
    await consumer.open()
    await consumer.close()


async def _take(consumer: Consumer, number: int) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(TIMEOUT):
        while len(taken) < number:
            taken += await consumer.receive(number - len(taken), timeout=TIMEOUT)
    return taken
