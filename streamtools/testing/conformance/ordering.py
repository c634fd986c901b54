"""Cases of order, of groups, and of connections that are cut."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from streamtools.admin import QueueAdmin
from streamtools.errors import FeatureError, Reject
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.testing.conformance.cases import Cases, needs
from streamtools.testing.conformance.stage import QUICK, Gate, Inbox, Stage, gather
from streamtools.testing.waiting import eventually, reaches

#: Messages of each key.
EACH = 12


class OrderingCases(Cases):
    """The promises of `ordered_by`."""

    @needs("ordered")
    async def test_messages_of_one_key_stay_in_order_though_some_are_retried(self, stage: Stage) -> None:
        seen: dict[str | bytes | None, list[int]] = {"a": [], "b": [], "c": []}

        async def handler(msg: int, message: Message) -> None:
            await asyncio.sleep(0)
            if msg % 5 == 0 and message.attempt < 3:
                raise ValueError("not yet")
            seen[message.key].append(msg)

        async with stage.running(handler, concurrency=8, ordered_by="key", retry=Retry(delay=0.01, jitter=0)):
            await gather(*(self._send_key(stage, key) for key in ("a", "b", "c")))
            await eventually(lambda: sum(map(len, seen.values())) == 3 * EACH)
        assert seen == dict.fromkeys("abc", list(range(EACH)))

    async def _send_key(self, stage: Stage, key: str) -> None:
        await stage.send_many(range(EACH), by=await stage.producer(), key=key)

    @needs("ordered")
    async def test_keys_run_at_once(self, stage: Stage) -> None:
        gate = Gate()

        async def handler(msg: int | str) -> None:
            if msg != "first":
                await gate(msg)

        async with stage.running(handler, concurrency=3, ordered_by="key"):
            await stage.send("first", key="z")  # a cautious driver hands the first one over alone
            await gather(*(self._send_key(stage, key) for key in ("a", "b", "c")))
            await gate.holds(3)
            for _ in range(20):  # a second one of some key would have started by now
                await asyncio.sleep(0)
            assert gate.entered == [0, 0, 0]
            gate.opened.set()
            await eventually(lambda: len(gate.left) == 3 * EACH)

    @needs("ordered")
    async def test_ordered_by_queue_a_retry_holds_its_place(self, stage: Stage) -> None:
        seen: list[int] = []
        failed: set[int] = set()

        async def handler(msg: int) -> None:
            if msg % 4 == 0 and msg not in failed:
                failed.add(msg)
                raise ValueError("not yet")
            seen.append(msg)

        async with stage.running(handler, ordered_by="queue", retry=Retry(delay=0.01, jitter=0)):
            await stage.send_many(range(EACH))
            await eventually(lambda: len(seen) == EACH)
        assert seen == list(range(EACH))

    @needs("ordered")
    async def test_ordered_a_message_is_given_up_after_its_retries_and_the_next_has_its_turn(
        self, stage: Stage
    ) -> None:
        attempts: Counter[str] = Counter()

        async def handler(msg: str) -> None:
            attempts[msg] += 1
            if msg == "bad":
                raise ValueError("never")

        async with stage.running(handler, ordered_by="queue", retry=QUICK):
            sent = await stage.send("bad")
            await stage.send("good")
            message = await stage.rejected(sent)
            await eventually(lambda: attempts["good"])
        assert attempts == {"bad": 3, "good": 1}
        assert message is None or (message.error is not None and message.error.attempts == 3)

    @needs("ordered")
    async def test_ordered_stopping_gives_a_waiting_retry_back(self, stage: Stage) -> None:
        failed: list[str] = []

        async def handler(msg: str) -> None:
            failed.append(msg)
            raise ValueError("not yet")

        async with stage.running(handler, ordered_by="queue", retry=Retry(delay=3600)):
            await stage.send("x")
            await eventually(lambda: failed)
        inbox = Inbox()
        async with stage.running(inbox, ordered_by="queue"):
            assert await inbox.holds(1) == ["x"]


class GroupCases(Cases):
    """Each group gets every message, and the consumers of a group share them."""

    async def test_a_group_that_the_protocol_does_not_have_is_refused_at_once(self, stage: Stage) -> None:
        if self.features.groups:
            pytest.skip(f"{self.protocol!r} says groups=True")
        with pytest.raises(FeatureError, match="group"):
            stage.new_consumer(group="billing")

    @needs("groups")
    async def test_each_group_has_every_message_and_its_consumers_share_them(self, stage: Stage) -> None:
        one, two, other = Inbox(), Inbox(), Inbox()
        async with (
            stage.running(one, group="billing"),
            stage.running(two, group="billing"),
            stage.running(other, group="shipping"),
        ):
            await stage.send_many(range(40))
            await other.holds(40)
            await eventually(lambda: len(one.items) + len(two.items) >= 40)
        assert other.items == list(range(40))
        assert sorted(one.items + two.items) == list(range(40))

    @needs("groups")
    async def test_the_first_group_has_what_was_sent_before_it_came(self, stage: Stage) -> None:
        await stage.send_many(range(5))
        inbox = Inbox()
        async with stage.running(inbox, group="billing"):
            assert await inbox.holds(5) == list(range(5))

    @needs("groups")
    async def test_a_group_that_begins_with_the_latest_has_only_what_is_sent_from_then_on(self, stage: Stage) -> None:
        await stage.send_many(["old", "older"])
        inbox = Inbox()
        async with stage.running(inbox, group="billing", offset="latest"):
            await stage.send("new")
            assert await inbox.holds(1) == ["new"]

    @needs("groups")
    async def test_a_group_keeps_its_messages_while_its_consumers_are_away(self, stage: Stage) -> None:
        inbox = Inbox()
        async with stage.running(Inbox(), group="billing"), stage.running(inbox, group="shipping"):
            pass
        await stage.send_many(range(5))
        async with stage.running(inbox, group="shipping"):
            assert await inbox.holds(5) == list(range(5))

    @needs("groups")
    async def test_a_retry_is_for_the_group_whose_handler_failed(self, stage: Stage) -> None:
        fine, attempts = Inbox(), list[int]()

        async def failing(msg: Message) -> None:
            attempts.append(msg.attempt)
            if msg.attempt < 3:
                raise ValueError("not yet")

        async with stage.running(fine, group="billing"), stage.running(failing, group="shipping"):
            await stage.send("x")
            await eventually(lambda: len(attempts) == 3)
            await fine.holds(1)
            await stage.send("fence")
            await fine.holds(2)
        assert (fine.items, attempts[:3]) == (["x", "fence"], [1, 2, 3])

    @needs("groups", "error_queue")
    async def test_a_rejected_message_is_in_the_error_queue_once(self, stage: Stage) -> None:
        fine = Inbox()

        async def failing(msg: str) -> None:
            raise Reject("not by us")

        async with stage.running(fine, group="billing"), stage.running(failing, group="shipping"):
            await stage.send("x")
            await fine.holds(1)
            [message] = await stage.errors(1)
        assert message.body == b"x"
        await stage.nothing_waits(f"{stage.queue}.error")

    @needs("groups", "error_queue", "admin")
    async def test_a_redrive_is_for_the_group_whose_handler_failed(self, stage: Stage) -> None:
        errors = f"{stage.queue}.error"
        billing, shipping = await stage.consumer(group="billing"), await stage.consumer(group="shipping")
        await stage.send("x")
        await (await stage.take(billing, 1))[0].ack()
        await (await stage.take(shipping, 1))[0].reject("no stock")
        # Someone looks at it, cannot mend it yet, and puts it back in both ways.
        curious = await stage.consumer(errors, error_queue=errors, retry=Retry(max_delay=0))
        await (await stage.take(curious, 1))[0].retry()
        await (await stage.take(curious, 1))[0].reject("not by me")
        await curious.close()
        admin = await stage.admin()
        await eventually(lambda: _holds(admin, errors, 1))
        assert await admin.move(errors) == 1
        [again] = await stage.take(shipping, 1)
        assert (again.message.body, again.message.attempt) == (b"x", 1)
        await again.ack()
        assert await billing.receive(timeout=0) == []


async def _holds(admin: QueueAdmin, queue: str, number: int) -> bool:
    return len(await admin.peek(queue)) == number


class ConnectionCases(Cases):
    """Connections that are cut while messages are sent and received."""

    @pytest.fixture
    def cut(self) -> Callable[[], Awaitable[None]] | None:
        """A function that cuts every connection to the broker; the broker must be reachable again at once.

        Write this fixture if your test can do so.
        """
        return None

    async def test_both_sides_resume_when_their_connections_are_cut(
        self, stage: Stage, cut: Callable[[], Awaitable[None]] | None
    ) -> None:
        if cut is None:
            pytest.skip("the class has no fixture named cut, which would cut the connections")
        seen: set[int] = set()  # some may be handled twice; none is lost

        async def handler(msg: int) -> None:
            seen.add(msg)

        producer = await stage.producer()
        async with stage.running(handler, concurrency=2):
            for start in (0, 100, 200):
                sending = asyncio.create_task(producer.send_many(range(start, start + 100)))
                await reaches(seen, start + 1)
                await cut()
                await gather(sending)
                await reaches(seen, start + 100)
        assert seen == set(range(300))

    async def test_receiving_by_hand_goes_on_after_a_cut(
        self, stage: Stage, cut: Callable[[], Awaitable[None]] | None
    ) -> None:
        if cut is None:
            pytest.skip("the class has no fixture named cut, which would cut the connections")
        consumer = await stage.consumer()
        receiving = asyncio.create_task(consumer.receive(timeout=None))
        await eventually(lambda: consumer._puller.is_busy)
        await cut()
        await stage.send("after")
        [[delivery]] = await gather(receiving)
        assert delivery.message.body == b"after"
        await delivery.ack()
