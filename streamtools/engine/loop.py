"""The consumer loop: receives, dispatches and settles messages, in batches, until it is stopped.

One task receives messages and fills `ready`. As many workers as `concurrency` says take messages from there and run
the handler. Two batchers settle what is finished: each settles together all that was added while its last batch was
being settled. One of them is for settlements that send something: a blocked publisher must not delay plain
acknowledgements.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, Literal

from streamtools.delivery import Delivery, Settlement
from streamtools.engine.ready import ReadyQueue
from streamtools.engine.settler import Finished, Settler
from streamtools.engine.settling import Decider, acknowledge
from streamtools.engine.state import LoopState, stray
from streamtools.engine.tasks.cancellation import (
    WorkerScope,
    clear_cancellation,
    end,
    stray_cancellation_as_lost,
    worker_scope,
)
from streamtools.engine.transport import Transport
from streamtools.errors import ConnectError
from streamtools.verdicts import ACK, RELEASE, Verdict, VerdictKind

log: logging.Logger = logging.getLogger("streamtools")

#: After a worker has run handlers that never wait for this many seconds, other tasks have their turn.
SLICE: Final = 0.005
#: A message that was delivered this often without a verdict is handled alone: it may be the one that ends the
#: process.
SUSPECT: Final = 2
#: When the connection is lost, running handlers may go on. If none of them ends for the first number of seconds, the
#: log says that the consumer waits for them. If none ends for the second number, they are cancelled, so that a
#: handler that hangs does not block the queue.
OUTLAST: Final = (10.0, 300.0)
#: Tasks that ignore their cancellation are cancelled again for this many seconds; a runner waits longer for a loop.
CANCEL_TIMEOUT: Final = 3.0

Ack = Literal["after", "on_receive", "manual"]


class Loop:
    """The loop of one consumer over one connection; after each reconnect there is a new one.

    Parameters:
        source: the driver's hooks.
        decider: makes a settlement of each delivery.
        concurrency: how many handlers run at the same time.
        prefetch: the most deliveries in hand.
        ordering_key: deliveries with the same key are handled one after the other; those with the key None in any
            order.
        ack: "after" the handler, "on_receive", or "manual".
        finished: settlements that an earlier connection did not perform, by message id, attempt and handler.
    """

    def __init__(
        self,
        source: Transport,
        decider: Decider,
        *,
        concurrency: int,
        prefetch: int,
        ordering_key: Callable[[Delivery], Hashable] | None,
        ack: Ack,
        finished: Finished,
    ) -> None:
        self._source = source
        self._concurrency = concurrency
        self._prefetch = prefetch
        self._ack = ack
        self._ready = ReadyQueue(ordering_key)
        self._state = LoopState()
        self._settler = Settler(source, decider, self._state, left_limit=prefetch, finished=finished)
        #: Whether receiving waits until half of the prefetch is free.
        self._pausing = False

    @property
    def decider(self) -> Decider:
        """The decider, which makes a settlement of each delivery."""
        return self._settler.decider

    @property
    def in_hand(self) -> int:
        """The number of deliveries that are received and not settled."""
        return self._state.in_hand

    @property
    def running(self) -> int:
        """The number of handlers that are running."""
        return self._state.running

    @property
    def settled(self) -> int:
        """The number of deliveries settled so far."""
        return self._state.settled

    @property
    def progress(self) -> float:
        """When a delivery was last settled, on the monotonic clock."""
        return self._state.progress

    @property
    def is_lost(self) -> bool:
        """Whether the connection was lost; handlers may still be running."""
        return self._state.lost is not None

    async def run(self, stopping: asyncio.Event, grace: Callable[[], float]) -> None:
        """Run until `stopping` is set and all deliveries in hand are settled, or until the connection is lost.

        Parameters:
            stopping: set it to stop receiving.
            grace: returns the seconds that running handlers get after that.

        Raises:
            ConnectionLost: the connection was lost, and all running handlers have ended; messages that are not
                settled will be delivered again.
        """
        state = self._state
        state.stopping, state.scope = stopping, WorkerScope(asyncio.current_task())
        token = worker_scope.set(state.scope)
        workers = [self._start(self._work(), "worker") for _ in range(self._concurrency)]
        batchers = [self._start(batcher.run(), "settle") for batcher in self._settler.batchers]
        worker_scope.reset(token)
        stop = asyncio.create_task(stopping.wait())
        stop.add_done_callback(lambda _: state.changed())
        try:
            await self._take_in()
            self._release_ready()
            await self._drain(grace)
        finally:
            stop.cancel()
            state.scope.ending = True
            await _end(workers)
            await self._settler.flush()
            await _end([*batchers, *self._settler.tasks])
        for task in (*workers, *batchers):
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if state.lost is not None:
            raise state.lost

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"streamtools-{name}")
        task.add_done_callback(self._state.task_ended)
        return task

    async def settle_manually(self, delivery: Delivery, verdict: Verdict) -> None:
        """Perform a verdict that the handler gave itself; return when the broker has it."""
        await self._settler.perform(delivery, verdict)
        if self._ack == "manual":
            self._state.done(1)

    def hold(self) -> None:
        """Begin no delivery until `resume()`; running handlers go on."""
        self._ready.hold()

    def resume(self) -> None:
        """Begin deliveries again, in the same order."""
        self._ready.resume()

    # --- receiving ------------------------------------------------------------------------------

    async def _take_in(self) -> None:
        state, receive = self._state, None
        try:
            while self._goes_on():
                if not self._has_room():
                    self._pausing = True
                    await state.wait()
                    self._pausing = False
                    continue
                receive = asyncio.create_task(self._receive(self._room), name="streamtools-receive")
                receive.add_done_callback(lambda _: state.changed())
                while not receive.done() and self._goes_on():
                    await state.wait()
                if receive.cancelled():
                    raise stray()
                if receive.done():
                    await self._accept_all(receive.result())
        except ConnectError as error:
            state.lost = error
        finally:
            if receive is not None and not receive.done():
                await self._cancel_receive(receive)
            if state.lost is None:
                await self._stop_source()

    def _goes_on(self) -> bool:
        return self._state.lost is None and not self._state.stopping.is_set()

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        return await stray_cancellation_as_lost(self._source._receive(limit))

    async def _cancel_receive(self, receive: asyncio.Task[Sequence[Delivery]]) -> None:
        receive.cancel()
        await asyncio.gather(receive, return_exceptions=True)
        if not receive.cancelled() and receive.exception() is None:
            batch = receive.result()  # it returned these at the moment of the cancellation
            self._state.in_hand += len(batch)
            self._settler.give_back(batch)

    async def _stop_source(self) -> None:
        try:
            await stray_cancellation_as_lost(self._source._stop())
        except ConnectError as error:
            self._state.lost = error

    def _has_room(self) -> bool:
        # Receive when half of the prefetch is free, so that messages come in batches; at once if workers would idle.
        room = self._room
        if room <= 0 or (2 * room < self._prefetch and self._ready.deliveries):
            return False
        return self._settler.refused.has_room()

    @property
    def _room(self) -> int:
        """How many more deliveries may be received; those held back by `HeldBack` do not count."""
        return self._prefetch - self._state.in_hand + self._settler.refused.number

    async def _accept_all(self, batch: Sequence[Delivery]) -> None:
        self._state.in_hand += len(batch)
        if self._ack == "on_receive":
            await acknowledge(self._source._settle, batch)
            for delivery in batch:
                delivery.settled = True  # so a verdict that the handler gives itself is ignored
        for position, delivery in enumerate(batch):
            # A suspect runs alone only with ack="after". With "manual" a handler may keep deliveries for ever, so we
            # could wait for ever. With "on_receive" they are acknowledged already, and never come again.
            alone = delivery.redeliveries >= SUSPECT and self._ack == "after"
            if alone and not await self._idle(len(batch) - position):
                self._settler.give_back(batch[position:])
                return
            delivery.settle_manually = self.settle_manually
            if not self._settler.finished or not self._settler.settle_again(delivery):
                self._ready.add(delivery)
            if alone and not await self._idle(len(batch) - position - 1):
                self._settler.give_back(batch[position + 1 :])
                return

    async def _idle(self, held: int) -> bool:
        """Wait until only `held` deliveries are in hand, not counting refused ones; False if the loop ends first."""
        while self._state.in_hand - self._settler.alone > held:
            if not self._goes_on():
                return False
            await self._state.wait()
        return True

    # --- handling -------------------------------------------------------------------------------

    async def _work(self) -> None:
        clock, task, state, ready = time.monotonic, asyncio.current_task(), self._state, self._ready.deliveries
        assert task is not None
        turn = clock()
        while not state.scope.ending:
            while not ready:
                await self._ready.wait()
                turn = clock()
            delivery = ready.popleft()
            if self._pausing and not ready:
                state.changed()  # receive now: a worker may soon be idle
            state.running += 1
            try:
                settlement = await self._handle(delivery, task)
            finally:
                state.running -= 1
            self._finish(settlement)
            if state.lost is not None:
                state.changed()
            if clock() - turn > SLICE:
                await asyncio.sleep(0)
                turn = clock()

    async def _handle(self, delivery: Delivery, task: asyncio.Task[Any]) -> Settlement:
        delivery.task, decider = task, self._settler.decider
        try:
            return await decider(delivery)
        except asyncio.CancelledError:  # `abandon()` was called, or the loop ends
            return Settlement(delivery, RELEASE)
        except Exception as error:  # an error of this library: the dispatcher turns handlers' errors into verdicts
            log.exception("%r could not be handled; it is rejected.", delivery)
            return next(decider.fallbacks(Settlement(delivery, ACK), error))
        finally:
            if task.cancelling():
                await clear_cancellation()
            delivery.task = None

    def _finish(self, settlement: Settlement) -> None:
        delivery = settlement.delivery
        if self._ready.is_ordered:
            self._ready.decided(delivery)
        if self._ack == "manual" and (delivery.settled or settlement.verdict.kind is VerdictKind.ACK):
            return  # the handler settles it itself, at any time
        if self._ack == "on_receive" or delivery.settled:
            self._state.done(1)
        else:
            delivery.settled = True
            self._settler.add(settlement)

    # --- stopping -------------------------------------------------------------------------------

    def _release_ready(self) -> None:
        if self._ack != "on_receive":  # those are acknowledged already: they are handled in the grace time, or never
            self._settler.give_back(self._ready.clear())

    async def _drain(self, grace: Callable[[], float]) -> None:
        state = self._state
        if state.lost is not None and not await self._outlast(OUTLAST[0]):
            log.warning(
                "%s The consumer reconnects when its %d running handlers have ended, or when none ends for %g s.",
                state.lost, state.running, OUTLAST[1],
            )  # fmt: skip
            await self._outlast(OUTLAST[1])
        if not await state.wait_while(self._is_busy, grace()):
            log.warning("%d deliveries were not finished in time; they go back to the broker.", state.in_hand)

    async def _outlast(self, seconds: float) -> bool:
        """Wait for running handlers; return False if none of them ends for this many seconds.

        The next connection delivers their messages again. If a handler still ran then, it would run twice at once.
        """
        stopping = self._state.stopping
        with suppress(TimeoutError):  # none of them has ended in that time
            while self._at_work() and not stopping.is_set():
                async with asyncio.timeout(seconds):
                    await self._state.wait()
        return stopping.is_set() or not self._at_work()

    def _is_busy(self) -> bool:
        return self._at_work() if self._state.lost is not None else self._state.in_hand > 0

    def _at_work(self) -> bool:
        return self._state.running > 0 or (self._ack == "on_receive" and bool(self._ready.deliveries))


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    if left := await end(tasks, CANCEL_TIMEOUT):
        log.error("%d handlers ignore their cancellation; they are left behind.", left)
