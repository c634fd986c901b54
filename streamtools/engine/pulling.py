"""Puller: receives deliveries for a consumer without a handler, and settles each when the user says so."""

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

#: The most seconds to wait for a broker to say which messages are there now.
POLL_TIMEOUT: Final = 5.0


class Owner(Protocol):
    """The part of a consumer that its puller uses."""

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
    """Receives deliveries that the user settles.

    Parameters:
        owner: the consumer.
        decider: makes the settlement for a verdict.
    """

    def __init__(self, owner: Owner, decider: Decider) -> None:
        self.decider = decider
        self._owner = owner
        self._lock = asyncio.Lock()
        self._settle_manually = self.settle  # always the same object, by which we recognize our deliveries

    @property
    def is_busy(self) -> bool:
        """Whether a caller waits for deliveries."""
        return self._lock.locked()

    async def receive(self, limit: int, timeout: Seconds | None) -> list[Delivery]:  # noqa: ASYNC109
        """Receive up to `limit` deliveries, and reconnect if necessary; return none if the time is over.

        Parameters:
            timeout: the seconds to wait for the first delivery; 0 returns only what is there now, None waits without
                a limit.

        Raises:
            ConnectError: the connection cannot be made, or the broker refuses it permanently.
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
        """Acknowledge deliveries all together; skip those that are settled already.

        Raises:
            ConnectionLost: the connection was lost.
            RuntimeError: a delivery was not received by this consumer.
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
                delivery.settled = False  # it is still in hand, and may get another verdict
            raise

    async def _drop(self, expired: list[Delivery], batch: list[Delivery]) -> list[Delivery]:
        """Drop the deliveries whose messages have expired, and return the others of the batch."""
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
            return []  # another caller waits for a message, so there is none
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
