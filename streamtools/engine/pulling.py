"""Puller: what a consumer without a handler does: it receives deliveries, and settles each when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Final, Protocol

from streamtools.delivery import Delivery, Settlement
from streamtools.engine.settling import Decider, OneSettlement
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.engine.transport import Transport
from streamtools.errors import ConnectError
from streamtools.validation.checks import Seconds
from streamtools.verdicts import DROP, RELEASE, Verdict

#: Seconds for a broker to say what is there now.
POLL_TIMEOUT: Final = 5.0


class Owner(Protocol):
    """What the puller needs of its consumer."""

    poll_timeout: ClassVar[float]
    drops_expired: ClassVar[bool]
    _connected: bool

    @property
    def _transport(self) -> Transport: ...
    def _here(self) -> Any: ...
    async def _connect(self) -> None: ...
    async def _disconnect(self, error: ConnectError) -> None: ...
    async def _ack(self, deliveries: Sequence[Delivery]) -> None: ...


class Puller:
    """Receives deliveries that somebody settles manually.

    Parameters:
        owner: the consumer.
        decider: makes the settlement for a verdict.
    """

    def __init__(self, owner: Owner, decider: Decider) -> None:
        self.decider = decider
        self._owner = owner
        self._lock = asyncio.Lock()
        self._settle_manually = self.settle  # one object: deliveries show by it whose they are

    @property
    def is_busy(self) -> bool:
        """Somebody waits for deliveries."""
        return self._lock.locked()

    async def receive(self, limit: int, timeout: Seconds | None) -> list[Delivery]:  # noqa: ASYNC109
        """Up to `limit` deliveries, through reconnects; none when the time is over.

        Parameters:
            timeout: seconds to wait for the first one; 0 asks once what is there, None waits without a limit.

        Raises:
            ConnectError: the connection cannot be made, or is refused for good.
        """
        if isinstance(timeout, timedelta):
            timeout = timeout.total_seconds()
        at_once, deadline = timeout == 0, None
        if timeout is not None:
            seconds = POLL_TIMEOUT if at_once else max(timeout, self._owner.poll_timeout)
            deadline = asyncio.get_running_loop().time() + seconds
        while True:
            if not self._owner._connected:
                await self._owner._connect()
            try:
                batch = await self._pull(limit, deadline, at_once)
                expired = [each for each in batch if each.message.expired] if self._owner.drops_expired else ()
                if not expired:
                    return batch
                if fresh := await self._drop(expired, batch):
                    return fresh
            except ConnectError as error:
                if error.permanent:
                    raise
                await self._owner._disconnect(error)

    async def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Acknowledge deliveries all at once; skip those that are settled already.

        Raises:
            ConnectionLost: the connection ended.
            RuntimeError: one was not received here.
        """
        batch: list[Delivery] = []
        try:
            for delivery in deliveries:
                if delivery.settled:
                    continue
                if delivery.settle_manually is not self._settle_manually:
                    raise RuntimeError(
                        f"{delivery!r} was not given by receive() of {self._owner!r}: await delivery.ack()."
                    )
                delivery.settled = True
                batch.append(delivery)
            if batch:
                await stray_cancellation_as_lost(self._owner._ack(batch))
        except BaseException:
            for delivery in batch:
                delivery.settled = False  # still in hand: another verdict may fare better
            raise

    async def _drop(self, expired: list[Delivery], batch: list[Delivery]) -> list[Delivery]:
        """Drop the deliveries of a batch whose messages have expired; returns the others."""
        fresh = [delivery for delivery in batch if delivery not in expired]
        settle = self._owner._transport._settle
        try:
            await stray_cancellation_as_lost(settle([Settlement(delivery, DROP) for delivery in expired]))
        except asyncio.CancelledError:
            await settle([Settlement(delivery, RELEASE) for delivery in fresh])
            raise
        return fresh

    async def _pull(self, limit: int, deadline: float | None, at_once: bool) -> list[Delivery]:
        if at_once and self._lock.locked():
            return []  # another waits, so there is nothing
        transport = self._owner._transport
        receive = transport._poll if at_once else transport._receive
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                batch = await stray_cancellation_as_lost(receive(limit))
        except TimeoutError:
            return []
        for delivery in batch:
            delivery.settle_manually = self._settle_manually
        return list(batch)

    async def settle(self, delivery: Delivery, verdict: Verdict) -> None:
        """Perform a verdict."""
        self._owner._here()
        settlement = self.decider.settlement(delivery, delivery.message, verdict, None)
        await OneSettlement(self._owner._transport._settle, self.decider, settlement).perform()
