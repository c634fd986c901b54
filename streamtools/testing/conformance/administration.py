"""Cases of administration: what an operator sees and can do."""

from __future__ import annotations

from typing import Any

import pytest

from streamtools.admin import QueueAdmin
from streamtools.errors import ConfigurationError, FeatureError, QueueError, Reject, SendError
from streamtools.message import Message
from streamtools.testing.conformance.cases import Cases, needs
from streamtools.testing.conformance.payloads import HEADERS
from streamtools.testing.conformance.stage import NEVER, Envelopes, Stage
from streamtools.testing.waiting import eventually


class AdministrationCases(Cases):
    """The promises of a QueueAdmin."""

    @needs("admin")
    async def test_a_queue_is_made_listed_and_deleted(self, stage: Stage) -> None:
        admin = await stage.admin()
        assert stage.queue not in [info.name for info in await admin.list()]
        await admin.create(stage.queue)
        await admin.create(stage.queue)
        await eventually(lambda: _lists(admin, stage.queue), "the queue is listed")
        assert (await admin.stats(stage.queue)).ready == 0
        await admin.delete(stage.queue)
        with pytest.raises(QueueError, match=stage.queue):
            await admin.stats(stage.queue)

    @needs("admin")
    async def test_a_missing_queue_is_an_error_for_each_question(self, stage: Stage) -> None:
        admin = await stage.admin()
        for question in (admin.delete, admin.purge, admin.stats, admin.peek, admin.move, admin.discard):
            with pytest.raises(QueueError, match=stage.queue):
                await question(stage.queue)
        with pytest.raises(ConfigurationError):
            await admin.create("")

    @needs("admin")
    async def test_the_numbers_are_those_of_the_queue(self, stage: Stage) -> None:
        admin, consumer = await stage.admin(), await stage.consumer(prefetch=1)
        await stage.send_many(range(5))
        [delivery] = await stage.take(consumer, 1)
        ready = 4 if self.features.in_hand else 5
        await eventually(lambda: _is_ready(admin, stage.queue, ready), f"{ready} messages wait")
        assert (await admin.stats(stage.queue)).in_hand in (1, None)
        await delivery.ack()

    @needs("admin")
    async def test_purge_forgets_what_waits(self, stage: Stage) -> None:
        admin = await stage.admin()
        await stage.send_many(range(5))
        await eventually(lambda: _is_ready(admin, stage.queue, 5), "5 messages wait")
        assert await admin.purge(stage.queue) == 5
        assert (await admin.stats(stage.queue)).ready == 0
        await stage.nothing_waits()

    @needs("admin")
    async def test_peek_leaves_everything_in_its_place(self, stage: Stage) -> None:
        admin = await stage.admin()
        await stage.send_many(["a", "b", "c"], headers={"x": "y"})
        await eventually(lambda: _is_ready(admin, stage.queue, 3), "3 messages wait")
        first = await admin.peek(stage.queue, 2)
        assert [m.body for m in first] == [b"a", b"b"]
        assert dict(first[0].headers) == {"x": "y"}
        await eventually(lambda: _is_ready(admin, stage.queue, 3), "they are back")
        taken = await stage.take(await stage.consumer(), 3)
        assert [d.message.body for d in taken] == [b"a", b"b", b"c"]
        assert {d.message.attempt for d in taken} == {1}
        for delivery in taken:
            await delivery.ack()

    @needs("admin")
    async def test_looking_thirty_times_changes_nothing(self, stage: Stage) -> None:
        admin = await stage.admin()
        await stage.send_many(range(12), headers={"x": "y"})
        await eventually(lambda: _is_ready(admin, stage.queue, 12), "12 messages wait")
        first = await admin.peek(stage.queue, 12)
        for _ in range(30):
            assert await admin.peek(stage.queue, 5) == first[:5]
            assert (await admin.stats(stage.queue)).ready == 12
        taken = await stage.take(await stage.consumer(prefetch=12), 12)
        assert [delivery.message for delivery in taken] == first
        assert {delivery.message.attempt for delivery in taken} == {1}
        assert all(delivery.redeliveries <= 1 for delivery in taken)
        for delivery in taken:
            await delivery.ack()

    @needs("admin", "error_queue")
    async def test_a_redriven_message_is_as_it_was_and_counts_from_one(self, stage: Stage) -> None:
        admin, errors = await stage.admin(), f"{stage.queue}.error"
        await self._reject(stage, [b"\x00one"], headers=HEADERS, key="k", type="t", id="id-1")
        await eventually(lambda: _is_ready(admin, errors, 1), "the rejected message waits")
        assert await admin.move(errors) == 1
        inbox = Envelopes()
        async with stage.running(inbox):
            [message] = await inbox.holds(1)
        assert (message.body, dict(message.headers)) == (b"\x00one", HEADERS)
        assert (message.id, message.key, message.type) == ("id-1", "k", "t")
        assert (message.queue, message.attempt, message.error) == (stage.queue, 1, None)
        assert (await admin.stats(errors)).ready == 0

    @needs("admin", "error_queue")
    async def test_only_those_chosen_are_redriven(self, stage: Stage) -> None:
        admin, errors = await stage.admin(), f"{stage.queue}.error"
        await self._reject(stage, ["a", "b", "c", "d"])
        await eventually(lambda: _is_ready(admin, errors, 4), "the rejected messages wait")
        told: list[int] = []
        assert await admin.move(errors, where=lambda m: m.body in (b"b", b"d"), progress=told.append) == 2
        assert told[-1] == 2
        inbox = Envelopes()
        async with stage.running(inbox):
            await inbox.holds(2)
        assert sorted(m.body for m in inbox.items) == [b"b", b"d"]
        assert [m.body for m in await stage.errors(2)] == [b"a", b"c"]

    @needs("admin", "error_queue")
    async def test_a_redrive_may_go_elsewhere(self, stage: Stage) -> None:
        admin, errors, other = await stage.admin(), f"{stage.queue}.error", f"{stage.queue}-other"
        await self._reject(stage, ["a"])
        await eventually(lambda: _is_ready(admin, errors, 1), "the rejected message waits")
        await admin.create(other)
        assert await admin.move(errors, other) == 1
        [delivery] = await stage.take(await stage.consumer(other), 1)
        assert (delivery.message.body, delivery.message.queue) == (b"a", other)
        await delivery.ack()

    @needs("admin", "error_queue", "missing_queue")
    async def test_what_its_target_does_not_take_stays(self, stage: Stage) -> None:
        admin, errors = await stage.admin(), f"{stage.queue}.error"
        await self._reject(stage, ["a", "b"])
        await eventually(lambda: _is_ready(admin, errors, 2), "the rejected messages wait")
        with pytest.raises((SendError, QueueError)):
            await admin.move(errors, f"{stage.queue}-missing")
        await eventually(lambda: _is_ready(admin, errors, 2), "they are still there")
        assert sorted(m.body or b"" for m in await stage.errors(2)) == [b"a", b"b"]

    @needs("admin", "error_queue")
    async def test_what_is_put_aside_keeps_why_it_failed_and_goes_home_from_there(self, stage: Stage) -> None:
        admin, errors, aside = await stage.admin(), f"{stage.queue}.error", f"{stage.queue}-aside"
        await self._reject(stage, ["a"])
        await eventually(lambda: _is_ready(admin, errors, 1), "the rejected message waits")
        await admin.create(aside)
        assert await admin.move(errors, aside) == 1
        await eventually(lambda: _is_ready(admin, aside, 1), "it waits there")
        [put] = await admin.peek(aside)
        assert put.error is not None and (put.error.queue, put.attempt) == (stage.queue, 1)
        with pytest.raises(ConfigurationError, match=f"0 moved; 1 stay.*failed_in=\\['{stage.queue}'"):
            await admin.move(aside)  # whoever may write to it may have written where it failed
        await eventually(lambda: _is_ready(admin, aside, 1), "it is still there")
        assert await admin.move(aside, failed_in=["elsewhere"]) == 0
        await eventually(lambda: _is_ready(admin, aside, 1), "it is still there")
        assert await admin.move(aside, failed_in=[stage.queue]) == 1
        inbox = Envelopes()
        async with stage.running(inbox):
            [message] = await inbox.holds(1)
        assert (message.body, message.queue, message.attempt, message.error) == (b"a", stage.queue, 1, None)

    @needs("admin", "error_queue")
    async def test_one_that_cannot_go_stops_no_other(self, stage: Stage) -> None:
        admin, errors = await stage.admin(), f"{stage.queue}.error"
        await self._reject(stage, ["a", "b"])
        await eventually(lambda: _is_ready(admin, errors, 2), "the rejected messages wait")
        await stage.send("from elsewhere", by=await stage.producer(errors))
        await self._reject(stage, ["c"])
        await eventually(lambda: _is_ready(admin, errors, 4), "all of them wait")
        with pytest.raises(ConfigurationError, match="3 moved; 1 stay"):
            await admin.move(errors)
        inbox = Envelopes()
        async with stage.running(inbox):
            await inbox.holds(3)
        assert sorted(m.body or b"" for m in inbox.items) == [b"a", b"b", b"c"]
        assert [m.body for m in await stage.errors(1)] == [b"from elsewhere"]

    @needs("admin", "error_queue")
    async def test_a_choice_that_fails_moves_nothing(self, stage: Stage) -> None:
        admin, errors = await stage.admin(), f"{stage.queue}.error"
        await self._reject(stage, ["a", "b"])
        await eventually(lambda: _is_ready(admin, errors, 2), "the rejected messages wait")
        with pytest.raises(ZeroDivisionError):
            await admin.move(errors, where=lambda m: bool(1 / 0))
        await eventually(lambda: _is_ready(admin, errors, 2), "they are still there")
        assert await admin.move(errors, limit=1) == 1
        assert [m.body for m in await stage.errors(1)] == [b"b"]
        assert [d.message.body for d in await stage.take(await stage.consumer(), 1)] == [b"a"]

    @needs("admin")
    async def test_what_never_failed_cannot_be_redriven_without_a_target(self, stage: Stage) -> None:
        admin = await stage.admin()
        await stage.send("a")
        await eventually(lambda: _is_ready(admin, stage.queue, 1), "the message waits")
        with pytest.raises(ConfigurationError, match="queue"):
            await admin.move(stage.queue)
        await eventually(lambda: _is_ready(admin, stage.queue, 1), "it is still there")

    @needs("admin")
    async def test_chosen_messages_are_discarded(self, stage: Stage) -> None:
        admin = await stage.admin()
        await stage.send_many(["a", "b", "c"])
        await eventually(lambda: _is_ready(admin, stage.queue, 3), "3 messages wait")
        assert await admin.discard(stage.queue, where=lambda m: m.body == b"b") == 1
        taken = await stage.take(await stage.consumer(), 2)
        assert [d.message.body for d in taken] == [b"a", b"c"]
        for delivery in taken:
            await delivery.ack()

    @needs("admin")
    async def test_places_and_retention_are_there_or_refused(self, stage: Stage) -> None:
        admin = await stage.admin()
        await admin.create(stage.queue)
        if self.features.replay:
            assert (await admin.seek(stage.queue, "end")).lag == 0
            assert (await admin.describe(stage.queue)).partitions >= 1
            return
        for question in (admin.describe, admin.groups):
            with pytest.raises(FeatureError, match="kafka://"):
                await question(stage.queue)
        with pytest.raises(FeatureError, match="kafka://"):
            await admin.seek(stage.queue, "beginning")
        with pytest.raises(FeatureError, match="kafka://"):
            await admin.alter(stage.queue, partitions=2)

    async def _reject(self, stage: Stage, payloads: list[Any], **options: Any) -> None:
        async def refuse(msg: Message) -> None:
            raise Reject("not now")

        done = 0

        async def count(message: Message, call_next: Any) -> None:
            nonlocal done
            done += 1
            await call_next(message)

        async with stage.running(refuse, retry=NEVER, middleware=[count]):
            for payload in payloads:
                await stage.send(payload, **options)
            await eventually(lambda: done == len(payloads))


async def _lists(admin: QueueAdmin, queue: str) -> bool:
    return queue in [info.name for info in await admin.list()]


async def _is_ready(admin: QueueAdmin, queue: str, number: int) -> bool:
    return (await admin.stats(queue)).ready == number
