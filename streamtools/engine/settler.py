"""Settler: performs the settlements of a consumer's loop in batches; if a batch is refused, one by one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final

from streamtools.delivery import Delivery, Settlement
from streamtools.engine.batching import SettlementBatcher
from streamtools.engine.held import HeldBack
from streamtools.engine.settling import Decider, OneSettlement, Unsettled
from streamtools.engine.state import LoopState
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.engine.transport import Transport
from streamtools.errors import ConnectError, ConnectionLost, QueueError, SendError
from streamtools.message import Message
from streamtools.verdicts import RELEASE, Verdict

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds before a refused copy is sent again; doubled each time, up to REFUSED_MAX_DELAY.
REFUSED_DELAY: Final = 0.5
REFUSED_MAX_DELAY: Final = 30.0
#: When the loop ends, the last settlements may take this many seconds.
FLUSH_TIMEOUT: Final = 5.0
#: The most settlements that are kept for the next connection.
FINISHED_LIMIT: Final = 10_000

#: Settlements by message id, attempt and handler.
Finished = dict[tuple[str, int, str | None], Settlement]


class Settler:
    """Performs settlements.

    Settlements that send something have a batcher of their own: a blocked publisher must not delay plain
    acknowledgements.

    Parameters:
        source: the driver's hooks.
        decider: decides again if the broker refuses a message that the handler sent.
        state: the state that is shared with the loop.
        left_limit: if this many deliveries cannot be settled in any form, the connection is given up.
        finished: settlements that an earlier connection did not perform, by message id, attempt and handler.

    Attributes:
        alone: the number of settlements that are being tried one by one.
        refused: counts the messages among them that the broker refuses.
        tasks: the tasks that try them.
        finished: the parameter of this name; empty if no connection was lost.
    """

    def __init__(
        self, source: Transport, decider: Decider, state: LoopState, *, left_limit: int, finished: Finished
    ) -> None:
        self.decider = decider
        self.refused: HeldBack = HeldBack()
        self.alone: int = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._source = source
        self._state = state
        self._left = 0
        self._left_limit = left_limit
        self.finished: Finished = finished
        self._plain = SettlementBatcher(self._settle_batch)
        self._moves = SettlementBatcher(self._settle_batch)

    @property
    def batchers(self) -> tuple[SettlementBatcher, SettlementBatcher]:
        """The batchers, which have to run while the loop runs."""
        return self._plain, self._moves

    def add(self, settlement: Settlement) -> None:
        """Perform a settlement with the next batch; if the connection is lost, keep it for the next connection."""
        if self._state.lost is not None:
            self._remember([settlement])
        elif settlement.outgoing:
            self._moves.add(settlement)
        else:
            self._plain.add(settlement)

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Release deliveries to the broker, unchanged."""
        if self._state.lost is not None:
            self._state.in_hand -= len(deliveries)  # the broker takes them back by itself
            return
        for delivery in deliveries:
            delivery.settled = True
            self._plain.add(Settlement(delivery, RELEASE))

    def settle_again(self, delivery: Delivery) -> bool:
        """Settle a delivery that was handled before the connection was lost; return False if it was not."""
        done = self.finished.pop(_name(delivery.message), None)
        # Other programs may use an id twice, so the body must be the same too, and it must be a redelivery.
        if done is None or delivery.redeliveries < 1 or done.delivery.message.body != delivery.message.body:
            return False
        self.add(replace(done, delivery=delivery))
        return True

    async def perform(self, delivery: Delivery, verdict: Verdict) -> None:
        """Perform a verdict that a handler gave itself; return when the broker has it."""
        settlement = self.decider.settlement(delivery, delivery.message, verdict, None)
        await OneSettlement(self._source._settle, self.decider, settlement).perform()

    async def flush(self) -> None:
        """Wait until all finished deliveries are settled, so that they are not handled again."""
        # A delivery that is not settled in time is delivered again.
        await self._state.wait_while(self._is_settling, FLUSH_TIMEOUT)

    def _is_settling(self) -> bool:
        return self._state.lost is None and (self._plain.busy or self._moves.busy)

    # --- in batches -----------------------------------------------------------------------------

    async def _settle_batch(self, batch: list[Settlement]) -> None:
        try:
            await stray_cancellation_as_lost(self._source._settle(batch))
        except ConnectError as error:
            self._fail(error, batch)
        except Exception as error:
            if isinstance(error, SendError | QueueError):
                level = logging.DEBUG if isinstance(error, SendError) and error.early else logging.ERROR
                log.log(level, "The broker refused messages that must be sent before settling: %s", error)
            else:
                log.exception("%d deliveries could not be settled together; each is settled by itself.", len(batch))
            for settlement in batch:
                self._start(self._settle_alone(settlement, error if isinstance(error, SendError) else None))
        else:
            self._state.done(len(batch))

    # --- one by one -----------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self.alone += 1
        self._state.changed()
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(self._state.task_ended)

    async def _settle_alone(self, settlement: Settlement, refusal: SendError | None) -> None:
        """Try one settlement until the broker accepts it or the consumer stops; no other settlement waits for it.

        Parameters:
            refusal: why the batch was refused; it may concern other deliveries only.
        """
        one = OneSettlement(self._source._settle, self.decider, settlement)
        try:
            if refusal is not None:
                await one.change(refusal)
            await self._insist(one, refusal)
        except ConnectError as error:
            self.alone -= 1
            self._fail(error, [one.settlement])
        except asyncio.CancelledError:
            if self._state.lost is not None:  # the next connection performs the verdict without another run
                self._remember([one.settlement])
            raise
        except Unsettled:
            self._leave(one.settlement)

    async def _insist(self, one: OneSettlement, refusal: SendError | None) -> None:
        # If no queue can hold a copy until it is due, send it again only when it is due, and do not log an error.
        early = one.early(refusal)
        delay, said = REFUSED_DELAY, str(refusal) if early else ""
        with self.refused.place(one.settlement.delivery.message) as hold:
            while True:
                if early or said:
                    hold(said)
                    self._state.changed()  # the loop may receive one more message
                    if await is_set_within(self._state.stopping, early or delay):
                        self.alone -= 1
                        return self.give_back([one.settlement.delivery])
                    delay = delay if early else min(delay * 2, REFUSED_MAX_DELAY)
                try:
                    if not early:  # the error queue may have been deleted
                        await self.refused.redeclare(self._source._redeclare)
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
                    self.alone -= 1
                    return self._state.done(1)

    def _leave(self, settlement: Settlement) -> None:
        """Leave a delivery with the broker, which delivers it again after this connection."""
        log.exception("%r cannot be settled in any form; it is left with the broker.", settlement.delivery)
        self.alone -= 1
        self._state.done(1)
        self._left += 1
        if self._left >= self._left_limit:  # they use up the prefetch, so the broker delivers nothing more
            self._fail(ConnectionLost(f"{self._left} deliveries cannot be settled in any form."), [])

    # --- when the connection is lost ------------------------------------------------------------

    def _fail(self, error: ConnectError, batch: Sequence[Settlement]) -> None:
        self._state.lose(error)
        self._remember(batch)

    def _remember(self, batch: Sequence[Settlement]) -> None:
        for settlement in batch:
            if not settlement.verdict.kind.gives_back:
                self.finished[_name(settlement.delivery.message)] = settlement
        while len(self.finished) > FINISHED_LIMIT:  # the oldest messages went to another consumer
            del self.finished[next(iter(self.finished))]
        self._state.in_hand -= len(batch)
        self._state.changed()


def _name(message: Message) -> tuple[str, int, str | None]:
    # The handler is part of the name: retry copies for several handlers of one message differ only in it.
    return message.id, message.attempt, message.handler
