"""Cases of receiving without a handler: pulling, iterating, settling, closing."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from streamtools.delivery import Delivery, Settlement
from streamtools.errors import Closed, SendError, StreamToolsError
from streamtools.message import Message
from streamtools.testing.conformance.cases import Cases, except_with, needs
from streamtools.testing.conformance.stage import Inbox, Stage, gather
from streamtools.testing.waiting import TIMEOUT, eventually
from streamtools.verdicts import ACK, VerdictKind

SETTLING = tuple(kind.value for kind in VerdictKind)


class ReceivingCases(Cases):
    """The promises of a consumer without a handler."""

    async def test_what_is_sent_is_received_and_once_acknowledged_gone(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send("hello")
        [delivery] = await stage.take(consumer, 1)
        assert (delivery.message.body, delivery.message.queue, delivery.redeliveries) == (b"hello", stage.queue, 0)
        await delivery.ack()
        await consumer.close()
        await stage.nothing_waits()

    async def test_a_batch_is_acknowledged_in_one_go(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        for number in range(10):
            await stage.send(number)
        batch = await stage.take(consumer, 10)
        await batch[3].ack()
        with pytest.raises(RuntimeError, match="await delivery.ack"):
            await consumer.ack_many([*batch, Delivery(batch[0].message)])
        assert [d.settled for d in batch].count(True) == 1
        await consumer.ack_many([*batch, *batch])  # each once
        await consumer.ack_many(batch)  # nothing is left to do
        assert all(d.settled for d in batch)
        await consumer.close()
        await stage.nothing_waits()

    async def test_what_was_sent_before_any_consumer_came_is_there(self, stage: Stage) -> None:
        await stage.send_many(range(20))
        inbox = Inbox()
        async with stage.running(inbox):
            assert await inbox.holds(20) == list(range(20))

    async def test_queues_are_apart(self, stage: Stage) -> None:
        other = await stage.producer(f"{stage.queue}-other")
        mine, theirs = Inbox(), Inbox()
        async with stage.running(mine), stage.running(theirs, other.queue):
            await gather(stage.send_many(["a", "b"]), stage.send_many(["x", "y"], by=other))
            await mine.holds(2)
            await theirs.holds(2)
        assert (mine.items, theirs.items) == (["a", "b"], ["x", "y"])

    # --- waiting --------------------------------------------------------------------------------

    async def test_timeout_0_returns_with_what_is_there(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        assert await consumer.receive(5, timeout=0) == []
        await stage.send("there")
        found: list[Delivery] = []

        async def look() -> bool:
            found.extend(await consumer.receive(5, timeout=0))
            return bool(found)

        await eventually(look)
        assert [d.message.body for d in found] == [b"there"]
        await found[0].ack()

    async def test_a_timeout_ends_the_wait_and_not_before(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        start = time.monotonic()
        assert await consumer.receive(timeout=0.1) == []
        assert time.monotonic() - start >= 0.1

    async def test_without_a_timeout_it_waits_until_a_message_comes(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        receiving = asyncio.create_task(consumer.receive(timeout=None))
        await asyncio.sleep(0)
        await stage.send("at last")
        async with asyncio.timeout(TIMEOUT):
            [delivery] = await receiving
        assert delivery.message.body == b"at last"
        await delivery.ack()

    async def test_no_more_than_asked_for_is_handed_over(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send_many(range(9))
        bodies: list[bytes] = []
        while len(bodies) < 9:
            batch = await consumer.receive(4, timeout=TIMEOUT)
            assert 1 <= len(batch) <= 4
            bodies += [delivery.message.body or b"" for delivery in batch]
            for delivery in batch:
                await delivery.ack()
        assert bodies == [str(n).encode() for n in range(9)]
        with pytest.raises(ValueError, match="at least 1"):
            await consumer.receive(0)

    async def test_iterating_hands_over_one_after_the_other(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send_many(range(10))
        bodies = []
        async with asyncio.timeout(TIMEOUT):
            async for delivery in consumer:
                bodies.append(delivery.message.body)
                await delivery.ack()
                if len(bodies) == 10:
                    break
        assert bodies == [str(n).encode() for n in range(10)]

    async def test_leaving_the_iteration_gives_the_rest_back(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        for number in range(10):
            await stage.send(number)
        bodies = []
        async with asyncio.timeout(TIMEOUT):
            async for delivery in consumer:
                bodies.append(int(delivery.message.body or b""))
                await delivery.ack()
                if len(bodies) == 3:
                    break
        rest = await stage.take(consumer, 7)
        assert sorted([*bodies, *(int(d.message.body or b"") for d in rest)]) == list(range(10))
        for delivery in rest:
            await delivery.ack()

    async def test_many_may_receive_at_once(self, stage: Stage) -> None:
        consumer, bodies = await stage.consumer(), list[int]()

        async def work() -> None:
            while len(bodies) < 60:
                for delivery in await consumer.receive(4, timeout=0.1):
                    bodies.append(int(delivery.message.body or b""))
                    await delivery.ack()

        sending = await stage.send_many(range(60))
        await gather(*(work() for _ in range(5)))
        await sending
        assert sorted(bodies) == list(range(60))

    async def test_cancelling_receive_loses_nothing(self, stage: Stage) -> None:
        consumer, number = await stage.consumer(), 60
        sending = await stage.send_many(range(number))
        bodies: set[bytes] = set()
        cancelled = 0
        async with asyncio.timeout(TIMEOUT):
            while len(bodies) < number:
                receiving = asyncio.create_task(consumer.receive(3, timeout=TIMEOUT))
                if cancelled < 2 * number:
                    cancelled += 1
                    for _ in range(cancelled % 7):
                        await asyncio.sleep(0)
                    receiving.cancel()
                for delivery in await _outcome(receiving):
                    assert delivery.message.body not in bodies, "received twice"
                    bodies.add(delivery.message.body or b"")
                    await delivery.ack()
        await sending

    # --- settling -------------------------------------------------------------------------------

    @pytest.mark.parametrize("second", SETTLING)
    @pytest.mark.parametrize("first", ["ack", "reject"])
    async def test_a_second_verdict_is_ignored(self, stage: Stage, first: str, second: str) -> None:
        consumer = await stage.consumer()
        await stage.send("one")
        [delivery] = await stage.take(consumer, 1)
        await getattr(delivery, first)()
        await gather(*(getattr(delivery, second)() for _ in range(2)))
        await consumer.close()
        await stage.nothing_waits()
        if first == "reject" and self.features.error_queue:
            assert len(await stage.errors(1)) == 1

    @needs("missing_queue")
    @except_with("reply", "what a handler sends leaves before its message is answered")
    async def test_of_settlements_refused_in_part_the_others_are_settled(self, stage: Stage) -> None:
        consumer, there = await stage.consumer(), f"{stage.queue}-there"
        await (await stage.consumer(there, error_queue="unused")).close()
        await stage.send_many(["kept", "settled"])
        kept, settled = await stage.take(consumer, 2)
        outgoing = [
            Message(body=b"1", queue=queue, id=queue, content_type="application/json")
            for queue in (f"{stage.queue}-missing", there)
        ]
        settlements = [Settlement(each, ACK, (sent,)) for each, sent in zip((kept, settled), outgoing, strict=True)]
        with pytest.raises(SendError) as caught:
            await consumer._settle(settlements)
        refused = {*caught.value.refused, *caught.value.unknown}
        assert outgoing[0].id in refused
        await consumer.close()
        second = await stage.consumer()
        [again] = await stage.take(second, 1)
        assert again.message.id == kept.message.id
        await again.ack()
        await second.close()
        if outgoing[1].id not in refused and not self.features.atomic:  # it need not name those of other deliveries
            await stage.take(await stage.consumer(there, error_queue="unused"), 1)
            await stage.nothing_waits()

    async def test_what_is_released_comes_back_as_it_was(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send("again", headers={"a": "b"})
        [delivery] = await stage.take(consumer, 1)
        await delivery.release()
        [again] = await stage.take(consumer, 1)
        assert (again.message.id, again.message.attempt) == (delivery.message.id, 1)
        assert dict(again.message.headers) == {"a": "b"}
        await again.ack()

    async def test_what_is_retried_by_hand_comes_back_as_the_next_attempt(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send("again", headers={"a": "b"})
        [delivery] = await stage.take(consumer, 1)
        await delivery.retry()
        [again] = await stage.take(consumer, 1)
        assert (again.message.id, again.message.attempt) == (delivery.message.id, 2)
        assert (again.message.body, dict(again.message.headers)) == (b"again", {"a": "b"})
        await again.ack()

    async def test_what_is_rejected_by_hand_says_why(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        sent = await stage.send("bad")
        [delivery] = await stage.take(consumer, 1)
        await delivery.reject("not for us")
        message = await stage.rejected(sent)
        if message is not None:
            assert message.error is not None
            assert (message.error.reason, message.error.queue) == ("not for us", stage.queue)
        await consumer.close()
        await stage.nothing_waits()

    async def test_what_is_not_settled_comes_back_when_its_consumer_has_gone(self, stage: Stage) -> None:
        first = await stage.consumer()
        await stage.send_many(["a", "b", "c"])
        [taken] = await stage.take(first, 1)
        await first.close()
        second = await stage.consumer()
        bodies: set[bytes] = set()
        while len(bodies) < 3:
            [delivery] = await stage.take(second, 1)
            bodies.add(delivery.message.body or b"")
            await delivery.ack()
        assert taken.message.body == b"a" and bodies == {b"a", b"b", b"c"}

    async def test_a_verdict_that_comes_after_the_close_loses_nothing(self, stage: Stage) -> None:
        first = await stage.consumer()
        await stage.send("kept")
        [delivery] = await stage.take(first, 1)
        await first.close()
        with suppress(StreamToolsError):  # it may say so, or say nothing
            await delivery.ack()
        second = await stage.consumer()
        [again] = await stage.take(second, 1)
        assert again.message.id == delivery.message.id
        await again.ack()

    async def test_a_verdict_of_before_a_reopen_settles_nothing_else(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send("kept")
        [before] = await stage.take(consumer, 1)
        await consumer.close()
        await consumer.open()
        [again] = await stage.take(consumer, 1)
        with suppress(StreamToolsError):  # it may say so, or say nothing
            await before.ack()
        await consumer.close()
        second = await stage.consumer()
        [kept] = await stage.take(second, 1)
        assert kept.message.id == again.message.id == before.message.id
        await kept.ack()

    # --- closing --------------------------------------------------------------------------------

    async def test_close_wakes_who_waits_and_may_be_repeated(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        receiving = asyncio.create_task(consumer.receive(timeout=None))
        await eventually(lambda: consumer._puller.is_busy)
        await consumer.close()
        await consumer.close()
        with pytest.raises(Closed):
            await gather(receiving)
        with pytest.raises(Closed):
            await consumer.receive(timeout=0)

    async def test_it_goes_on_after_it_was_closed_and_opened_again(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await consumer.close()
        await consumer.open()
        await consumer.open()
        await stage.send("hello")
        [delivery] = await stage.take(consumer, 1)
        await delivery.ack()

    @except_with("listens", "two consumers of one queue cannot listen on one port")
    async def test_consumers_share_a_queue_and_none_is_given_twice(self, stage: Stage) -> None:
        inboxes = [Inbox(), Inbox(), Inbox()]
        one, two, three = inboxes
        async with stage.running(one), stage.running(two), stage.running(three):
            await stage.send_many(range(150))
            await eventually(lambda: sum(len(inbox.items) for inbox in inboxes) >= 150)
        assert sorted(item for inbox in inboxes for item in inbox.items) == list(range(150))

    @except_with("listens", "two consumers of one queue cannot listen on one port")
    @except_with("partitioned", "what a consumer has in hand keeps its whole partition from the others")
    async def test_prefetch_bounds_what_a_consumer_takes(self, stage: Stage) -> None:
        greedy = await stage.consumer(prefetch=2)
        await stage.send("first")
        await (await stage.take(greedy, 1))[0].ack()
        await stage.send_many(range(10))
        held = await stage.take(greedy, 2)
        other = await stage.consumer()
        rest = await stage.take(other, 8)
        assert sorted(int(d.message.body or b"") for d in held + rest) == list(range(10))
        for delivery in held + rest:
            await delivery.ack()


async def _outcome(receiving: asyncio.Task[list[Delivery]]) -> list[Delivery]:
    try:
        return await receiving
    except asyncio.CancelledError:
        return []
