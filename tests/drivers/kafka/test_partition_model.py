"""One partition through anything: settled, refused, cancelled, given back, revoked, lost; against a model.

At each commit all that it passes was finished; nothing is in two hands; nothing that is finished comes again while
its consumer lives; and once the trouble is over, everything is finished.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from streamtools import Message, StreamToolsError
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.kafka.offsets import decode
from streamtools.verdicts import ACK, RELEASE, Verdict
from tests.drivers.kafka.offline import PLACE, Broker, OfflineConsumer, consumer, record

LENGTH = 14
NOW = 1_700_000_000.0
TROUBLES = st.sampled_from([None, None, "lost", "late", "never", "refused"])
KINDS = st.sampled_from(["plain", "plain", "bare", "typed", "soon", "later", "stale"])


def made(offset: int, kind: str) -> Any:
    times = {"soon": {"deliver_at": NOW + 0.2}, "later": {"deliver_at": NOW + 9999}, "stale": {"expires_at": NOW - 9}}
    known: dict[str, Any] = {"body": b"x", "queue": PLACE.topic, "id": str(offset)}
    if kind == "plain":
        return record(offset)
    if kind == "bare":
        return record(offset, headers=())
    return record(offset, Message(**known, **({"type": "t"} if kind == "typed" else times[kind])))


class AuditedBroker(Broker):
    """Says at each commit whether all that it passes was finished."""

    def __init__(self, records: list[Any]) -> None:
        super().__init__(records)
        self.finished: set[int] = set()  # a verdict that sends nothing was given
        self.droppable: set[int] = set()

    def keep(self, offset: int, metadata: str) -> None:
        told = {n for first, end in decode(offset, metadata) for n in range(first, end)}
        passed = {n for n in self.log if n < offset or n in told}
        lost = passed - self.finished - self.droppable - {offset_of(id) for id in self.sent}
        assert not lost, f"committed past {lost}"
        assert offset >= self.kept[0], "committed backwards"
        super().keep(offset, metadata)


def offset_of(id: str) -> int:  # noqa: A002
    return int(id.rsplit("-", 1)[-1])


class Partition(RuleBasedStateMachine):
    """What may happen to a consumer's partition, in any order."""

    exactly_once = False

    @initialize(kinds=st.lists(KINDS | st.none(), min_size=3, max_size=LENGTH))
    def begin(self, kinds: list[str | None]) -> None:
        self.runner = asyncio.Runner()
        self.now = NOW
        self.clock = mock.patch("time.time", lambda: self.now)
        self.clock.start()
        self.broker = AuditedBroker([made(n, kind) for n, kind in enumerate(kinds) if kind is not None])
        self.broker.droppable = {n for n, kind in enumerate(kinds) if kind == "stale"}
        self.held: list[Delivery] = []
        self.old: list[Delivery] = []  # a verdict was given, or the partition is gone
        self.settling: dict[asyncio.Task[None], Delivery] = {}
        self.acked: set[int] = set()  # in this consumer's time
        self.runner.run(self._open())

    async def _open(self) -> None:
        self.consumer: OfflineConsumer = consumer(self.broker, exactly_once=self.exactly_once)
        self.consumer.waits = False
        await self.consumer.open()
        self.generation = self.consumer._member

    def _forget(self) -> None:
        """Another membership: what was in hand is not ours any more."""
        self.old += self.held
        self.held.clear()
        self.acked.clear()
        self.generation = self.consumer._member

    # --- what users do ----------------------------------------------------------------------------

    def _may_commit(self) -> bool:
        """Else it would wait for the transaction before."""
        return not (self.exactly_once and self.settling)

    @precondition(lambda self: self._may_commit())
    @rule(limit=st.integers(1, 5))
    def receive(self, limit: int) -> None:
        self.runner.run(self._receive(limit))

    def _is_something_there(self) -> bool:
        receiver, partition = self.consumer, self.consumer.partition
        due = partition.not_due and partition.not_due.next_due <= self.now
        return bool(receiver._settler.returned or partition.arrived or due or receiver.member.failure)

    async def _receive(self, limit: int) -> int:
        if not self._is_something_there():
            return 0
        batch = await self.consumer.receive(limit, timeout=0)
        if self.consumer._member is not self.generation:  # it has connected anew
            self._forget()
        offsets = [d.offset for d in batch]  # type: ignore[attr-defined]
        ours = [*batch, *self.held, *self.settling.values()]
        mine = [d.offset for d in ours if not d.partition.revoked]  # type: ignore[attr-defined]
        assert max(Counter(mine).values(), default=1) == 1, "in two hands"
        assert not self.acked.intersection(offsets), "finished, and given again"
        self.held += batch
        return len(batch)

    def _take(self, data: st.DataObject) -> Delivery:
        delivery = data.draw(st.sampled_from(self.held))
        self.held.remove(delivery)
        return delivery

    def _finishing(self, delivery: Delivery) -> None:
        self.broker.finished.add(delivery.offset)  # type: ignore[attr-defined]

    @precondition(lambda self: self.held and self._may_commit())
    @rule(data=st.data(), twice=st.booleans())
    def ack(self, data: st.DataObject, twice: bool) -> None:
        delivery = self._take(data)
        self._finishing(delivery)
        self.runner.run(self._give(delivery, delivery.ack))
        if twice and delivery.settled:
            self.runner.run(delivery.ack())

    async def _give(self, delivery: Delivery, verdict: Any) -> None:
        try:
            await verdict()
        except StreamToolsError:
            self.held.append(delivery)
        else:
            self.acked.add(delivery.offset)  # type: ignore[attr-defined]
            self.old.append(delivery)

    @precondition(lambda self: self.held and self._may_commit())
    @rule(data=st.data())
    def ack_many(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(self.held), unique=True))
        for delivery in some:
            self._finishing(delivery)
        self.runner.run(self._ack_many([*some, *some[:2]]))

    async def _ack_many(self, batch: list[Delivery]) -> None:
        try:
            await self.consumer.ack_many(batch)
        except StreamToolsError:
            return
        self.held = [d for d in self.held if d not in batch]
        self.acked |= {d.offset for d in batch}  # type: ignore[attr-defined]
        self.old += batch

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        delivery = self._take(data)
        self.runner.run(self._release(delivery))

    async def _release(self, delivery: Delivery) -> None:
        await delivery.release()
        self.old.append(delivery)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), verdict=st.sampled_from(["retry", "reject", "ack"]), trouble=TROUBLES, commits=TROUBLES)
    def settle(self, data: st.DataObject, verdict: str, trouble: str | None, commits: str | None) -> None:
        """To its retry, or to the error queue: something is sent first, and that may fail in any way."""
        delivery = self._take(data)
        if verdict == "ack":
            self._finishing(delivery)
        troubles: list[Any] = [{delivery.message.id} if trouble == "refused" else trouble]
        if self.exactly_once:
            troubles.append(None if commits == "refused" else commits)
        self.runner.run(self._begin_to_settle(delivery, getattr(delivery, verdict), troubles))

    async def _begin_to_settle(self, delivery: Delivery, verdict: Any, troubles: list[Any]) -> None:
        for _ in range(12):
            await asyncio.sleep(0)  # what is to be moved is, and has no trouble
        self.broker.troubles += troubles
        task = asyncio.create_task(verdict())
        for _ in range(8):
            await asyncio.sleep(0)
        self.broker.troubles.clear()
        self.settling[task] = delivery
        if task.done():
            self._settled(task)

    def _settled(self, task: asyncio.Task[None]) -> None:
        delivery = self.settling.pop(task)
        fine = not task.cancelled() and task.exception() is None
        gone = self.consumer._member is not self.generation or delivery.partition.revoked  # type: ignore[attr-defined]
        if fine and not gone:
            self.acked.add(delivery.offset)  # type: ignore[attr-defined]
        (self.old if fine or gone else self.held).append(delivery)

    @precondition(lambda self: self.settling)
    @rule(cancel=st.booleans())
    def go_on(self, cancel: bool) -> None:
        self.runner.run(self._go_on(cancel))

    async def _go_on(self, cancel: bool) -> None:
        for _ in range(8):
            await asyncio.sleep(0)
        for task in list(self.settling):
            if cancel:
                task.cancel()
                await asyncio.wait({task})
            if task.done():
                self._settled(task)

    @precondition(lambda self: self.old)
    @rule(data=st.data(), kind=st.sampled_from(["ack", "release", "reject", ACK, RELEASE]))
    def too_late(self, data: st.DataObject, kind: Any) -> None:
        """A second verdict, or one about what is not ours any more."""
        delivery = data.draw(st.sampled_from(self.old))
        self.runner.run(self._too_late(delivery, kind))

    async def _too_late(self, delivery: Delivery, kind: Any) -> None:
        if isinstance(kind, Verdict):
            await self.consumer._settle([Settlement(delivery, kind)])
        else:
            await getattr(delivery, kind)()

    # --- what happens -----------------------------------------------------------------------------

    @rule()
    def wait(self) -> None:
        self.now += 0.5

    @rule()
    def commit(self) -> None:
        self.runner.run(self.generation.commits.commit())  # type: ignore[union-attr]

    @rule(cancelled=st.booleans())
    def revoke(self, cancelled: bool) -> None:
        self.runner.run(self._revoke(cancelled))

    async def _revoke(self, cancelled: bool) -> None:
        await self._go_on(cancel=cancelled)
        membership = self.generation
        assert membership is not None
        self.consumer.options.__dict__["revoke_timeout"] = 0.0
        await membership.revoked()
        for task in [task for task in self.settling if task.done()]:
            self._settled(task)
        for delivery in self.settling.values():
            assert delivery.partition.revoked  # type: ignore[attr-defined]
        self.consumer.assign()
        self._forget()

    @rule()
    def crash(self) -> None:
        """Nothing more is committed; another process goes on."""
        self.runner.run(self._crash())

    async def _crash(self) -> None:
        await self._end_all()
        assert self.generation is not None
        self.generation._let_go()
        self.broker.troubles.clear()
        await self.consumer.close()
        await self._open()
        self._forget()

    async def _end_all(self) -> None:
        await self._go_on(cancel=True)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            try:
                self.runner.run(self._finish())
            finally:
                self.clock.stop()
                self.runner.close()

    async def _finish(self) -> None:
        """The trouble is over: everything is finished, and Kafka knows."""
        await self._end_all()
        self.broker.troubles.clear()
        rounds = 300
        while self._unfinished():
            rounds -= 1
            assert rounds, f"stuck: {self.consumer.partition.offsets.pending}"
            for delivery in list(self.held):
                self.held.remove(delivery)
                self._finishing(delivery)
                await self._give(delivery, delivery.ack)
            await self._receive(100)
            await asyncio.sleep(0)  # what is to be moved is
            await self.consumer.member.commits.commit()
            self.now += 0.1
        await self.consumer.close()

    def _unfinished(self) -> bool:
        partition = self.consumer.partition
        return bool(
            partition.arrived
            or partition.offsets.pending
            or (partition.offsets.uncommitted and not self.exactly_once)
        )


class ExactlyOnce(Partition):
    """Offsets are committed by transactions alone."""

    exactly_once = True


TestPartition = Partition.TestCase
TestExactlyOnce = ExactlyOnce.TestCase
TestPartition.settings = TestExactlyOnce.settings = settings(deadline=None, max_examples=100, stateful_step_count=30)
