"""Settles one delivery by itself; if it cannot be settled as it is, its copy is sent with less metadata."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

from streamtools.delivery import Delivery, Settlement
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.errors import ConnectError, QueueError, SendError, safe_str
from streamtools.message import Message
from streamtools.verdicts import ACK, Verdict

log: logging.Logger = logging.getLogger("streamtools")

#: A driver's `_settle`.
Settle = Callable[[Sequence[Settlement]], Awaitable[None]]


class Decider(Protocol):
    """Makes a settlement of a delivery: runs its handler, or takes a verdict that was given manually."""

    def stop(self) -> None: ...
    async def __call__(self, delivery: Delivery) -> Settlement: ...
    def settlement(
        self, delivery: Delivery, message: Message, verdict: Verdict, error: BaseException | None
    ) -> Settlement: ...
    async def refused(self, settlement: Settlement, error: SendError) -> Settlement: ...
    def fallbacks(self, settlement: Settlement, error: BaseException) -> Iterator[Settlement]: ...


class Unsettled(SendError):
    """No form of a settlement could be performed, and trying again cannot help; the cause says why."""


async def acknowledge(settle: Settle, batch: Sequence[Delivery]) -> None:
    """Acknowledge deliveries before their handlers run: all together, or one by one if that fails.

    Raises:
        ConnectError: the connection was lost.
    """
    settlements = [Settlement(delivery, ACK) for delivery in batch]
    try:
        return await stray_cancellation_as_lost(settle(settlements))
    except ConnectError:
        raise
    except Exception:
        log.exception("%d deliveries could not be acknowledged together; each is acknowledged by itself.", len(batch))
    for settlement in settlements:
        try:
            await stray_cancellation_as_lost(settle([settlement]))
        except ConnectError:
            raise
        except Exception:
            log.exception("%r could not be acknowledged; it is handled all the same.", settlement.delivery)


class OneSettlement:
    """The settlement of one delivery, in the form to try next.

    Parameters:
        settle: the driver's hook.
        decider: decides again if outgoing messages are refused.
        settlement: the first form.
    """

    def __init__(self, settle: Settle, decider: Decider, settlement: Settlement) -> None:
        self._settle = settle
        self._decider = decider
        self._forms: Iterator[Settlement] | None = None
        self._whole: Settlement = settlement
        self.settlement: Settlement = settlement

    async def perform(self) -> None:
        """Settle the delivery; if the broker cannot take this form, settle it in a smaller form.

        Raises:
            ConnectError: the connection was lost.
            SendError: the broker refuses outgoing messages; the cause may be temporary, or an operator can fix it.
            QueueError: a queue is missing, or was changed.
            Unsettled: the delivery cannot be settled in any form; it is a subclass of SendError.
        """
        while True:
            try:
                await stray_cancellation_as_lost(self._settle([self.settlement]))
            except (ConnectError, QueueError):
                raise
            except Exception as error:
                if not await self.change(error):
                    raise
            else:
                return

    def early(self, error: Exception | None) -> float:
        """Return the seconds until all messages are due that no queue can hold so long; 0 for another refusal."""
        if not isinstance(error, SendError) or not error.early:
            return 0.0
        now = time.time()
        early = error.among(self.settlement.outgoing, error.early)
        return max([0.0, *(message.deliver_at - now for message in early if message.deliver_at is not None)])

    async def change(self, error: Exception) -> bool:
        """Choose the form to try next; return False if it stays the same, because only waiting can help.

        Raises:
            Unsettled: there is no other form, and the error is not a refusal of the broker.
        """
        if isinstance(error, SendError):
            if await self._decide_anew(error):
                return True
            if not error.among(self.settlement.outgoing, error.unfit):
                return False
        elif isinstance(error, QueueError):
            return False
        return self._take_less(error)

    async def _decide_anew(self, error: SendError) -> bool:
        """Ask the decider for another settlement, in case a message of the handler was refused."""
        try:
            instead = await self._decider.refused(self.settlement, error)
        except Exception:  # a bug, or the error of a middleware: the message keeps its verdict
            log.exception("No new verdict could be decided for %r; it keeps its first one.", self.settlement.delivery)
            return False
        changed = instead is not self.settlement
        if changed:
            self.settlement, self._forms = instead, None
        return changed

    def _take_less(self, error: Exception) -> bool:
        if self._forms is None:
            self._whole, self._forms = self.settlement, self._decider.fallbacks(self.settlement, error)
            self._log(error)
        smaller = next(self._forms, None)
        if smaller is not None:
            self.settlement = smaller
            return True
        if not isinstance(error, SendError):
            raise Unsettled(safe_str(error)) from error
        # The body itself is too large. When an operator has raised the limit, the whole message must be sent.
        self.settlement, self._forms = self._whole, None
        return False

    def _log(self, error: Exception) -> None:
        delivery = self.settlement.delivery
        trace = None if isinstance(error, SendError) else error
        log.error(
            "%r cannot be settled as it is, so its copy is sent with less metadata: %s: %s",
            delivery, type(error).__name__, safe_str(error), exc_info=trace,
        )  # fmt: skip
