"""The consumer loop: receive, dispatch, settle, in batches, until told to stop.

One task receives and fills `ready`; `concurrency` workers take from it and run the handler; two batchers settle what
is finished. A batcher settles together all that was added while its last batch was under way, so acknowledgements
gather without any timer. Settlements that send something first have a batcher of their own: a publisher that is
blocked must not hold up plain acknowledgements.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Literal, Protocol

from streamtools.delivery import Delivery, Settlement
from streamtools.engine.batching import SettlementBatcher
from streamtools.engine.held import HeldBack
from streamtools.engine.settling import Decider, OneSettlement, Unsettled, acknowledge
from streamtools.engine.tasks.cancellation import (
    WorkerScope,
    clear_cancellation,
    end,
    stray_cancellation_as_lost,
    worker_scope,
)
from streamtools.errors import ConnectError, ConnectionLost, QueueError, SendError
from streamtools.message import Message
from streamtools.verdicts import ACK, RELEASE, Verdict, VerdictKind

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds that a worker may run handlers that never wait, before others have their turn.
SLICE: Final = 0.005
#: A message delivered this often without a verdict is run alone: it may be what ends the process.
SUSPECT: Final = 2
#: Seconds before a refused copy is tried again, and the most of it; doubled each time.
REFUSED_DELAY: Final = 0.5
REFUSED_MAX_DELAY: Final = 30.0

#: Once the connection is lost: seconds without the end of a handler before it is told that those at work are waited
#: for, and then before they are cancelled: one that never ends must not keep all others from their messages.
OUTLAST: Final = (10.0, 300.0)
#: Seconds for the last settlements when the loop ends.
FLUSH_TIMEOUT: Final = 5.0
#: Seconds for which tasks that ignore their cancellation are cancelled again; less than a runner waits for a loop.
CANCEL_TIMEOUT: Final = 3.0
#: Verdicts kept over a reconnect, at most.
FINISHED_LIMIT: Final = 10_000

Ack = Literal["after", "on_receive", "manual"]


#: Settlements by message id, attempt and handler.
Finished = dict[tuple[str, int, str | None], Settlement]


class Source(Protocol):
    """What the loop needs of a driver."""

    async def _receive(self, limit: int) -> Sequence[Delivery]: ...
    async def _settle(self, settlements: Sequence[Settlement]) -> None: ...
    async def _redeclare(self) -> None: ...
    async def _stop(self) -> None: ...


class Loop:
    """One consumer's loop over one connection; made anew after each reconnect.

    Parameters:
        source: the driver's hooks.
        decider: delivery -> settlement.
        concurrency: handlers at once.
        prefetch: deliveries in hand at most.
        ordering_key: deliveries with the same key are handled one after the other; those whose key is None, at once.
        ack: "after" the handler, "on_receive", or "manual".
        finished: settlements that an earlier connection took with it, by message id, attempt and handler.
    """

    def __init__(
        self,
        source: Source,
        decider: Decider,
        *,
        concurrency: int,
        prefetch: int,
        ordering_key: Callable[[Delivery], Hashable] | None,
        ack: Ack,
        finished: Finished,
    ) -> None:
        self._source = source
        self._decider = decider
        self._concurrency = concurrency
        self._prefetch = prefetch
        self._ordering_key = ordering_key
        self._ack = ack
        self._finished = finished
        self._ready: deque[Delivery] = deque()
        #: Ordering key of a delivery at work -> those that wait behind it.
        self._behind: dict[Hashable, deque[Delivery]] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._changed = asyncio.Event()
        self._lost: ConnectError | None = None
        self._home = WorkerScope(None)
        #: Taking in waits until there is room for half a prefetch.
        self._pausing = False
        #: Settlements that the broker refuses, and the tasks that try them again.
        self._held = 0
        #: Deliveries that could not be settled in any form.
        self._left = 0
        self._refused = HeldBack()
        self._held_back: set[asyncio.Task[None]] = set()
        self._plain = SettlementBatcher(self._settle_batch)
        self._moves = SettlementBatcher(self._settle_batch)
        #: Deliveries received and not yet settled.
        self.in_hand: int = 0
        #: Handlers at work.
        self.running: int = 0
        #: Deliveries settled so far.
        self.settled: int = 0
        #: When a delivery was last settled, on the monotonic clock.
        self.progress: float = time.monotonic()

    @property
    def is_lost(self) -> bool:
        """The connection has ended; handlers may be at work still."""
        return self._lost is not None

    async def run(self, stopping: asyncio.Event, grace: Callable[[], float]) -> None:
        """Until `stopping` is set and all in hand is settled, or the connection is lost.

        Parameters:
            stopping: set it to stop taking messages in.
            grace: the seconds that handlers at work are then given.

        Raises:
            ConnectionLost: once the handlers at work have ended; what was not settled comes back.
        """
        self._home = WorkerScope(asyncio.current_task())
        token = worker_scope.set(self._home)
        workers = [self._start(self._work(), "worker") for _ in range(self._concurrency)]
        batchers = [self._start(batcher.run(), "settle") for batcher in (self._plain, self._moves)]
        worker_scope.reset(token)
        self._stopping = stopping
        stop = asyncio.create_task(stopping.wait())
        stop.add_done_callback(lambda _: self._changed.set())
        try:
            await self._take_in(stopping)
            self._release_ready()
            await self._drain(stopping, grace)
        finally:
            stop.cancel()
            self._home.ending = True
            await _end(workers)
            await self._flush()
            await _end([*batchers, *self._held_back])
        for task in (*workers, *batchers):
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if self._lost is not None:
            raise self._lost

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"streamtools-{name}")
        task.add_done_callback(self._task_ended)
        return task

    # --- taking in ------------------------------------------------------------------------------

    async def _take_in(self, stopping: asyncio.Event) -> None:
        receive: asyncio.Task[Sequence[Delivery]] | None = None
        try:
            while not stopping.is_set() and self._lost is None:
                if not self._has_room():
                    self._pausing = True
                    await self._change()
                    self._pausing = False
                    continue
                receive = asyncio.create_task(self._receive(self._room), name="streamtools-receive")
                receive.add_done_callback(lambda _: self._changed.set())
                while not receive.done() and not stopping.is_set() and self._lost is None:
                    await self._change()
                if receive.cancelled():
                    raise _stray()
                if receive.done():
                    await self._accept_all(receive.result(), stopping)
        except ConnectError as error:
            self._lost = error
        finally:
            if receive is not None and not receive.done():
                await self._cancel_receive(receive)
            if self._lost is None:
                await self._stop_source()

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        return await stray_cancellation_as_lost(self._source._receive(limit))

    async def _cancel_receive(self, receive: asyncio.Task[Sequence[Delivery]]) -> None:
        receive.cancel()
        await asyncio.gather(receive, return_exceptions=True)
        if not receive.cancelled() and receive.exception() is None:
            batch = receive.result()  # it was just about to return these
            self.in_hand += len(batch)
            self._give_back(batch)

    async def _stop_source(self) -> None:
        try:
            await stray_cancellation_as_lost(self._source._stop())
        except ConnectError as error:
            self._lost = error

    def _has_room(self) -> bool:
        # Half a prefetch at a time, so that intake stays in batches; at once when workers would idle.
        room = self._room
        return room > 0 and (2 * room >= self._prefetch or not self._ready) and self._refused.has_room()

    @property
    def _room(self) -> int:
        """What may be taken in besides; what the broker refuses takes nobody's place."""
        return self._prefetch - self.in_hand + self._refused.number

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def _accept_all(self, batch: Sequence[Delivery], stopping: asyncio.Event) -> None:
        self.in_hand += len(batch)
        if self._ack == "on_receive":
            await acknowledge(self._source._settle, batch)
            for delivery in batch:
                delivery.settled = True  # a verdict by hand is the second
        for position, delivery in enumerate(batch):
            # By hand a handler may hold deliveries for as long as it likes: waiting for them could last for ever.
            # On receive they are acknowledged already, so that none comes again.
            alone = delivery.redeliveries >= SUSPECT and self._ack == "after"
            if alone and not await self._idle(len(batch) - position, stopping):
                self._give_back(batch[position:])
                return
            self._accept(delivery)
            if alone and not await self._idle(len(batch) - position - 1, stopping):
                self._give_back(batch[position + 1 :])
                return

    async def _idle(self, held: int, stopping: asyncio.Event) -> bool:
        """Wait until `held` deliveries are in hand, beside what the broker refuses; False if it cannot be."""
        while self.in_hand - self._held > held:
            if stopping.is_set() or self._lost is not None:
                return False
            await self._change()
        return True

    def _accept(self, delivery: Delivery) -> None:
        delivery.settle_manually = self.settle_manually
        if self._finished and self._settle_again(delivery):
            return
        if self._ordering_key is not None and (key := self._ordering_key(delivery)) is not None:
            if (waiting := self._behind.get(key)) is not None:
                waiting.append(delivery)
                return
            self._behind[key] = deque()
        self._make_ready(delivery)

    def _make_ready(self, delivery: Delivery) -> None:
        self._ready.append(delivery)
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _settle_again(self, delivery: Delivery) -> bool:
        """Settle what had been handled when the last connection went, without handling it again."""
        done = self._finished.pop(_name(delivery.message), None)
        # The same id is not enough: a foreign sender may repeat ids. Same body, and delivered before.
        if done is None or delivery.redeliveries < 1 or done.delivery.message.body != delivery.message.body:
            return False
        self._add_to_batch(replace(done, delivery=delivery))
        return True

    # --- handling -------------------------------------------------------------------------------

    async def _work(self) -> None:
        clock, task = time.monotonic, asyncio.current_task()
        assert task is not None
        turn = clock()
        while not self._home.ending:
            while not self._ready:
                await self._wait()
                turn = clock()
            delivery = self._ready.popleft()
            if self._pausing and not self._ready:
                self._changed.set()  # a worker may be idle
            self.running += 1
            try:
                settlement = await self._handle(delivery, task)
            finally:
                self.running -= 1
            self._finish(settlement)
            if self._lost is not None:
                self._changed.set()
            if clock() - turn > SLICE:
                await asyncio.sleep(0)
                turn = clock()

    async def _handle(self, delivery: Delivery, task: asyncio.Task[Any]) -> Settlement:
        delivery.task = task
        try:
            return await self._decider(delivery)
        except asyncio.CancelledError:  # by `abandon()`, or by our end
            return Settlement(delivery, RELEASE)
        except Exception as error:  # before or after its handler; the handler's own errors have a verdict
            log.exception("%r could not be handled; it is rejected.", delivery)
            return next(self._decider.lesser(Settlement(delivery, ACK), error))
        finally:
            if task.cancelling():
                await clear_cancellation()
            delivery.task = None

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _finish(self, settlement: Settlement) -> None:
        delivery = settlement.delivery
        if self._ordering_key is not None and (key := self._ordering_key(delivery)) is not None:
            self._next_of_key(key)
        if self._ack == "manual" and (delivery.settled or settlement.verdict.kind is VerdictKind.ACK):
            return  # the handler's own hands settle it, when they are ready
        if self._ack == "on_receive" or delivery.settled:
            self._done(1)
        else:
            delivery.settled = True
            self._add_to_batch(settlement)

    def _next_of_key(self, key: Hashable) -> None:
        waiting = self._behind.get(key)
        if waiting:
            self._make_ready(waiting.popleft())
        else:
            self._behind.pop(key, None)

    # --- settling -------------------------------------------------------------------------------

    @property
    def decider(self) -> Decider:
        """What turns each delivery into a settlement."""
        return self._decider

    async def settle_manually(self, delivery: Delivery, verdict: Verdict) -> None:
        """Perform a verdict that the handler gave itself; returns when it is given to the broker."""
        settlement = self._decider.settlement(delivery, delivery.message, verdict, None)
        await OneSettlement(self._source._settle, self._decider, settlement).perform()
        if self._ack == "manual":
            self._done(1)

    def _add_to_batch(self, settlement: Settlement) -> None:
        if self._lost is not None:
            self._remember([settlement])
        elif settlement.outgoing:
            self._moves.add(settlement)
        else:
            self._plain.add(settlement)

    async def _settle_batch(self, batch: list[Settlement]) -> None:
        try:
            await stray_cancellation_as_lost(self._source._settle(batch))
        except ConnectError as error:
            self._fail(error, batch)
        except Exception as error:
            if isinstance(error, SendError | QueueError):
                level = logging.DEBUG if isinstance(error, SendError) and error.early else logging.ERROR
                log.log(level, "The broker refused what is to be sent before settling: %s", error)
            else:
                log.exception("%d deliveries could not be settled together; each is settled by itself.", len(batch))
            for settlement in batch:
                self._keep(self._settle_alone(settlement, error if isinstance(error, SendError) else None))
        else:
            self._done(len(batch))

    async def _settle_alone(self, settlement: Settlement, refusal: SendError | None) -> None:
        """Try again until the broker accepts it, or we stop: the message is not given up, and none waits behind it.

        Parameters:
            refusal: why the batch was refused; it may concern other deliveries only.
        """
        one = OneSettlement(self._source._settle, self._decider, settlement)
        try:
            if refusal is not None:
                await one.change(refusal)
            await self._insist(one, refusal)
        except ConnectError as error:
            self._held -= 1
            self._fail(error, [one.settlement])
        except asyncio.CancelledError:
            if self._lost is not None:  # what was decided holds over a reconnect: the handler is not run again
                self._remember([one.settlement])
            raise
        except Unsettled:
            # It stays with the broker, which gives it to whoever comes next.
            log.exception("%r cannot be settled in any form; it is left with the broker.", settlement.delivery)
            self._held -= 1
            self._done(1)
            self._left += 1
            if self._left >= self._prefetch:  # the broker gives no more while it holds so many
                self._fail(ConnectionLost(f"{self._left} deliveries cannot be settled in any form."), [])

    async def _insist(self, one: OneSettlement, refusal: SendError | None) -> None:
        # What nothing can hold until it is due needs no other try before that, and is no error.
        early = one.early(refusal)
        delay, said = REFUSED_DELAY, str(refusal) if early else ""
        with self._refused.place(one.settlement.delivery.message) as place:
            while True:
                if early or said:
                    place.take(said)
                    self._changed.set()  # there is room for one more
                    if await self._stops_within(early or delay):
                        self._held -= 1
                        return self._give_back([one.settlement.delivery])
                    delay = delay if early else min(delay * 2, REFUSED_MAX_DELAY)
                try:
                    if not early:  # else the error queue may have been deleted
                        await self._refused.redeclare(self._source._redeclare)
                    await one.perform()
                except (ConnectError, Unsettled):
                    raise
                except (SendError, QueueError) as error:
                    message = one.settlement.delivery.message
                    early = one.early(error)
                    level = logging.DEBUG if early or str(error) == said else logging.ERROR
                    log.log(level, "Message %s of %r is held back: %s", message.id, message.queue, error)
                    said = str(error)
                else:
                    self._held -= 1
                    return self._done(1)

    async def _stops_within(self, delay: float) -> bool:
        try:
            async with asyncio.timeout(delay):
                return await self._stopping.wait()
        except TimeoutError:
            return False

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        self._held += 1
        self._changed.set()
        task = asyncio.create_task(work)
        self._held_back.add(task)
        task.add_done_callback(self._held_back.discard)
        task.add_done_callback(self._task_ended)

    def _done(self, number: int) -> None:
        self.in_hand -= number
        self.settled += number
        self.progress = time.monotonic()
        self._changed.set()

    def _fail(self, error: ConnectError, batch: Sequence[Settlement]) -> None:
        self._lost = self._lost or error
        self._remember(batch)
        self._changed.set()

    def _remember(self, batch: Sequence[Settlement]) -> None:
        for settlement in batch:
            if not settlement.verdict.kind.gives_back:
                self._finished[_name(settlement.delivery.message)] = settlement
        while len(self._finished) > FINISHED_LIMIT:  # the oldest went to another consumer
            del self._finished[next(iter(self._finished))]
        self.in_hand -= len(batch)
        self._changed.set()

    # --- stopping -------------------------------------------------------------------------------

    def _release_ready(self) -> None:
        if self._ack == "on_receive":
            return  # the broker has them no more: handled within the grace, or never
        waiting = [*self._ready, *(d for behind in self._behind.values() for d in behind)]
        self._ready.clear()
        for behind in self._behind.values():
            behind.clear()
        self._give_back(waiting)

    def _give_back(self, deliveries: Sequence[Delivery]) -> None:
        if self._lost is not None:
            self.in_hand -= len(deliveries)  # the broker takes them back by itself
            return
        for delivery in deliveries:
            delivery.settled = True
            self._plain.add(Settlement(delivery, RELEASE))

    async def _drain(self, stopping: asyncio.Event, grace: Callable[[], float]) -> None:
        if self._lost is not None and not await self._outlast(stopping, OUTLAST[0]):
            log.warning(
                "%s It is made anew once the handlers at work have ended (%d), or when none has for %g s.",
                self._lost, self.running, OUTLAST[1],
            )  # fmt: skip
            await self._outlast(stopping, OUTLAST[1])
        try:
            async with asyncio.timeout(grace()):
                while self._at_work() if self._lost is not None else self.in_hand > 0:
                    await self._change()
        except TimeoutError:
            log.warning("%d deliveries not finished in time; they go back to the broker.", self.in_hand)

    async def _outlast(self, stopping: asyncio.Event, seconds: float) -> bool:
        """Wait for the handlers at work: what they do would be done twice if their messages came again meanwhile."""
        with suppress(TimeoutError):  # none of them has ended for so long
            while self._at_work() and not stopping.is_set():
                async with asyncio.timeout(seconds):
                    await self._change()
        return stopping.is_set() or not self._at_work()

    def _at_work(self) -> bool:
        return self.running > 0 or (self._ack == "on_receive" and bool(self._ready))

    async def _flush(self) -> None:
        """Settle what is finished, even when the loop itself was cancelled, so that it is not repeated."""
        with suppress(TimeoutError):  # what is not settled in time is delivered again
            async with asyncio.timeout(FLUSH_TIMEOUT):
                while self._lost is None and (self._plain.busy or self._moves.busy):
                    await self._change()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and self._home.ending:
            return
        error = _stray() if task.cancelled() else task.exception()
        if error is None:
            return
        # A worker or a batcher that ended by itself is our own fault: end the loop, loudly.
        self._lost = self._lost or (
            error if isinstance(error, ConnectError) else ConnectionLost(f"the loop ended by {error!r}")
        )
        self._changed.set()


def _name(message: Message) -> tuple[str, int, str | None]:
    # With the handler: copies for a retry by several handlers of one message differ in nothing else.
    return message.id, message.attempt, message.handler


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    if left := await end(tasks, CANCEL_TIMEOUT):
        log.error("%d handlers ignore that they are cancelled; they are left behind.", left)


def _stray() -> ConnectionLost:
    return ConnectionLost("Someone has cancelled a task of the consumer's loop, which is not theirs.")
