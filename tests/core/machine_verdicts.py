"""The state machine's rules for what becomes of messages: verdicts by hand and by handlers, and operators' work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from streamtools import CONSUMER_LOOPS, Consumer, Delivery, Reject, Retry, RetryLater
from streamtools.errors import ConfigurationError, Drop
from streamtools.testing.waiting import TIMEOUT, eventually
from tests.core import strategies
from tests.core.machine import Hold, Queues, Reader, all_of, delays
from tests.core.model import ERROR, ORDERS, QUEUES, STEP, Lane, seen

#: A message delivered this often without a verdict is never run again.
POISON = 5
POISONED = (
    f"delivered {{}} times without a verdict (max_deliveries={POISON}): it seems to end the process that handles it"
)
#: What a handler does, and what becomes of its message if it is the first attempt.
deeds = st.sampled_from(["ack", "ack", "fail", "reject", "drop", "later"])


class Machine(Queues):
    """Every rule; a subclass says where its broker is."""

    # --- verdicts -------------------------------------------------------------------------------

    def _draw_hold(self, data: st.DataObject) -> tuple[Reader, Hold]:
        reader = data.draw(st.sampled_from([reader for reader in self.readers if reader.holds]))
        hold = reader.holds[data.draw(st.integers(0, len(reader.holds) - 1))]
        reader.holds.remove(hold)
        if reader.suspect is hold:
            reader.suspect = None
        return reader, hold

    @rule(data=st.data(), drop=st.booleans())
    @precondition(lambda self: any(reader.holds for reader in self.readers))
    def ack_or_drop(self, data: st.DataObject, drop: bool) -> None:
        """It is gone."""
        _, hold = self._draw_hold(data)
        self.run(hold.delivery.drop() if drop else hold.delivery.ack())

    @rule(data=st.data(), delay=delays)
    @precondition(lambda self: any(reader.holds for reader in self.readers))
    def retry(self, data: st.DataObject, delay: int) -> None:
        """It comes again, behind, one attempt further, for its own group alone."""
        reader, hold = self._draw_hold(data)
        self.run(hold.delivery.retry(delay))
        self.model.retry(reader.lane, hold.entry, delay=delay)

    @rule(data=st.data(), reason=strategies.text)
    @precondition(lambda self: any(reader.holds for reader in self.readers))
    def reject(self, data: st.DataObject, reason: str) -> None:
        """It is in the error queue, saying why."""
        reader, hold = self._draw_hold(data)
        self.run(hold.delivery.reject(reason))
        self.model.reject(reader.lane, hold.entry, reason)

    @rule(data=st.data())
    @precondition(lambda self: any(reader.holds for reader in self.readers))
    def release(self, data: st.DataObject) -> None:
        """It has its place back."""
        reader, hold = self._draw_hold(data)
        self.run(hold.delivery.release())
        self.model.put_back(reader.lane, hold.entry)

    @rule(data=st.data(), number=st.integers(2, 8), twice=st.booleans())
    @precondition(lambda self: sum(len(reader.holds) for reader in self.readers) > 1)
    def settle_at_once(self, data: st.DataObject, number: int, twice: bool) -> None:
        """Many verdicts at the same time, while more is sent; a second verdict changes nothing."""
        work: list[Any] = []
        for _ in range(min(number, sum(len(reader.holds) for reader in self.readers))):
            reader, hold = self._draw_hold(data)
            if data.draw(st.booleans()):
                work.append(hold.delivery.ack())
            else:
                work.append(hold.delivery.release())
                self.model.put_back(reader.lane, hold.entry)
            if twice:
                work.append(hold.delivery.reject("too late"))
        entry = self._entry("meanwhile")
        work.append(self.producers[0].send("meanwhile", id=entry.id))
        self.run(all_of(work))
        self.model.publish(ORDERS, entry)

    @rule(data=st.data(), deed=st.sampled_from(["ack", "retry", "reject", "drop", "release"]))
    @precondition(lambda self: self.stale)
    def settle_what_is_not_in_hand(self, data: st.DataObject, deed: str) -> None:
        """A verdict that comes when the message has gone back does nothing."""
        hold = self.stale.pop(data.draw(st.integers(0, len(self.stale) - 1)))
        self.run(getattr(hold.delivery, deed)())

    # --- a handler ------------------------------------------------------------------------------

    @rule(
        data=st.data(), queue=st.sampled_from(QUEUES), group=st.sampled_from([None, "a"]), prefetch=st.integers(1, 9)
    )
    def handle_all(self, data: st.DataObject, queue: str, group: str | None, prefetch: int) -> None:
        """A consumer's loop runs what waits: each as often as its policy says, with the verdict that it chose."""
        lane = self.model.join(queue, group, latest=False)
        deeds_of = {entry.id: data.draw(deeds) for entry in self.model.ready(lane)}
        expected = self._handle(lane, deeds_of)
        consumer = CONSUMER_LOOPS[self.protocol](
            queue, url=self.address(1), group=group, prefetch=prefetch, retry=Retry(retries=1, delay=0, jitter=0)
        )
        handled = self.run(self._run_loop(consumer, deeds_of, len(expected)))
        assert handled == expected

    def _handle(self, lane: Lane, deeds_of: dict[str, str]) -> list[tuple[str, int]]:
        """The runs that the handler must see."""
        runs: list[tuple[str, int]] = []
        line = self.model.ready(lane)
        while line:
            entry = line.pop(0)
            self.model.take(lane, [entry])
            deed = deeds_of[entry.id]
            if entry.expires is not None and entry.expires <= self.model.now:
                continue
            if entry.count >= POISON:
                self.model.reject(lane, entry, POISONED.format(entry.count))
                continue
            runs.append((entry.id, entry.attempt))
            if deed == "reject" or (deed in ("fail", "later") and entry.attempt > 1):
                self.model.reject(lane, entry, deed)
            elif deed == "fail":
                line.append(self.model.retry(lane, entry, reason=deed))
            elif deed == "later":
                self.model.retry(lane, entry, delay=STEP, reason=deed)
        return runs

    async def _run_loop(self, consumer: Consumer, deeds_of: dict[str, str], number: int) -> list[tuple[str, int]]:
        handled: list[tuple[str, int]] = []

        @consumer()
        async def handler(msg: object, delivery: Delivery) -> None:
            message = delivery.message
            handled.append((message.id, message.attempt))
            match deeds_of[message.id]:
                case "fail":
                    raise ValueError("fail")
                case "reject":
                    raise Reject("reject")
                case "drop":
                    raise Drop
                case "later":
                    raise RetryLater(STEP, "later")

        started = asyncio.Event()  # a consumer that is stopped before has joined no group
        running = asyncio.create_task(consumer.run(handler, on_started=started.set))
        await eventually(lambda: started.is_set() or running.done(), "its start", timeout=TIMEOUT)
        await eventually(lambda: len(handled) >= number or running.done(), f"{number} runs", timeout=TIMEOUT)
        await self._settled(consumer)
        consumer.stop()
        await running
        return handled

    async def _settled(self, consumer: Consumer) -> None:
        # What has been handled is not yet settled; and what is poison is settled without being handled.
        queue = consumer.queue

        async def as_expected() -> bool:
            info = await self.admin.stats(queue)
            return (info.ready, info.in_hand) == (self.model.numbers(queue)[0], self._in_hand(queue))

        await eventually(as_expected, f"what waits in {queue!r} is what the model says", timeout=TIMEOUT)

    # --- operators ------------------------------------------------------------------------------

    @rule(queue=st.sampled_from(QUEUES))
    def purge(self, queue: str) -> None:
        """What waits is gone; what is in hand stays there."""
        assert self.run(self.admin.purge(queue)) == self.model.purge(queue)

    @rule(data=st.data(), queue=st.sampled_from(QUEUES))
    def take_back(self, data: st.DataObject, queue: str) -> None:
        """A message that is not due yet is gone for every group; any other stays."""
        waiting = [entry for lane in self.model.topics[queue] for entry in lane.entries]
        if waiting:
            id = waiting[data.draw(st.integers(0, len(waiting) - 1))].id
            assert self.run(self.admin.cancel(queue, id)) == self.model.take_back(queue, id)

    @rule(queue=st.sampled_from(QUEUES))
    def delete(self, queue: str) -> None:
        """Everything in it is gone, in hand or not; and it can be made anew."""
        self.run(self.admin.delete(queue))
        self.run(self.admin.create(queue))
        self.model.delete(queue)
        for reader in self.readers:
            if reader.lane.queue == queue:
                self.stale += reader.holds
                reader.holds, reader.suspect = [], None
                self.run(reader.consumer.close())
                self.run(reader.consumer.open())
                reader.lane = self.model.join(queue, reader.consumer.group, latest=reader.consumer.offset == "latest")

    @rule(queue=st.sampled_from(QUEUES), limit=st.integers(1, 20))
    def peek(self, queue: str, limit: int) -> None:
        """The first that wait, whole, left where they are."""
        found = self.run(self.admin.peek(queue, limit))
        assert [seen(message) for message in found] == [e.seen for _, e in self.model.all_ready(queue)[:limit]]

    @rule(
        queue=st.sampled_from([ORDERS, ERROR, ERROR]), goal=st.sampled_from([None, None, ORDERS, ERROR]),
        chosen=st.sampled_from(["all", "all", "a", "none"]), limit=st.none() | st.integers(1, 5),
    )  # fmt: skip
    def move(self, queue: str, goal: str | None, chosen: str, limit: int | None) -> None:
        """Back to work, as attempt 1, to the group that failed."""
        which = {"all": lambda key: True, "a": lambda key: key == "a", "none": lambda key: False}[chosen]
        looked_at = self.model.all_ready(queue)[:limit]
        if len(self.model.topics[queue].lanes) > 1 and any(
            (goal or (e.error or ("",))[0]) == queue for _, e in looked_at
        ):
            return  # onto itself: what has been moved is met again in place of what has not
        unknown = goal is None and any(e.error is None and which(e.meta[3]) for _, e in looked_at)
        named = [ORDERS, ERROR] if goal is None and not unknown else None
        if unknown and any(e.error is not None and e.error[0] != queue for _, e in looked_at):
            return  # those are named, and what has no home is left by that
        work = self.admin.move(queue, goal, failed_in=named, where=lambda message: which(message.key), limit=limit)
        if unknown:
            with pytest.raises(ConfigurationError, match="does not say in which queue it failed"):
                self.run(work)
            # Those that say it have gone home all the same.
            self.model.move(queue, None, lambda entry: entry.error is not None and which(entry.meta[3]), limit)
        else:
            assert self.run(work) == self.model.move(queue, goal, lambda entry: which(entry.meta[3]), limit)
