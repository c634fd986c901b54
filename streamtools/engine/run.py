"""ConsumerRun: runs a consumer's handler, over one connection after the other, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from streamtools.engine.backoff import backoff
from streamtools.engine.loop import Loop
from streamtools.engine.settler import Finished
from streamtools.engine.settling import Decider
from streamtools.engine.tasks.cancellation import until
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.engine.tasks.watch import watched
from streamtools.errors import Closed, ConnectError

log: logging.Logger = logging.getLogger("streamtools")


class Owner(Protocol):
    """The part of a consumer that a run uses."""

    def _make_loop(self, decider: Decider, finished: Finished) -> Loop: ...
    async def _connect(self, seconds: float | None = None) -> None: ...
    async def _disconnect(self, error: ConnectError) -> None: ...


class ConsumerRun:
    """One run. The object exists before the run begins, so that it can be stopped earlier.

    Parameters:
        owner: the consumer.
        loop: the last loop of the run before; its counts are shown until this run has a loop.

    Attributes:
        loop: the loop over the present connection, or over the last one.
        has_begun: whether the run has begun and has not ended.
        stopping: set when the run has to end.
    """

    def __init__(self, owner: Owner, loop: Loop | None = None) -> None:
        self.loop: Loop | None = loop
        self.has_begun: bool = False
        self.stopping: asyncio.Event = asyncio.Event()
        self._owner = owner
        self._deadline: float | None = None
        #: Settlements that the last connection did not perform.
        self._finished: Finished = {}

    @property
    def is_lost(self) -> bool:
        """Whether the connection of its loop was lost; handlers may still be running."""
        return self.has_begun and self.loop is not None and self.loop.is_lost

    def end_within(self, seconds: float) -> None:
        """Give the running handlers this many seconds from now; `stopping` ends the run."""
        self._deadline = time.monotonic() + seconds

    async def goes_on_after(self, seconds: float) -> bool:
        """Wait; return False as soon as the run has to end."""
        return not await is_set_within(self.stopping, seconds)

    async def handle(self, decider: Decider, on_started: Callable[[], None] | None) -> None:
        """Connect, and handle messages until the run is stopped; reconnect if necessary.

        Parameters:
            on_started: called when the consumer is connected.

        Raises:
            ConnectError: the first connection cannot be made, or the broker refuses a later one permanently.
        """
        try:
            async with until(self.stopping):
                await self._owner._connect()
            if on_started is not None and not self.stopping.is_set():
                on_started()
            with suppress(Closed):  # close() was called from elsewhere
                await self._handle(decider)
        except ConnectError:
            if not self.stopping.is_set():
                raise

    async def _handle(self, decider: Decider) -> None:
        failures = 0
        while not self.stopping.is_set():
            loop = self.loop = self._owner._make_loop(decider, self._finished)
            await self._run(loop, decider)
            failures = 0 if loop.settled else failures + 1
            if not self.stopping.is_set():
                await self._reconnect(failures)

    async def _run(self, loop: Loop, decider: Decider) -> None:
        """Run a loop until the run is stopped or the connection is lost."""
        watch = asyncio.create_task(self._stop_at_the_end(decider))
        try:
            with watched():
                await loop.run(self.stopping, self._grace)
        except ConnectError as error:
            if error.permanent:
                raise
            await self._owner._disconnect(error)
        finally:
            watch.cancel()

    async def _stop_at_the_end(self, decider: Decider) -> None:
        await self.stopping.wait()
        decider.stop()

    def _grace(self) -> float:
        return max(0.0, (self._deadline or time.monotonic()) - time.monotonic())

    async def _reconnect(self, failures: int) -> None:
        while not failures or await self.goes_on_after(backoff(failures)):
            failures += 1
            try:
                async with until(self.stopping):
                    await self._owner._connect(0.0)
            except ConnectError as error:
                if error.permanent:
                    raise
            else:
                if not self.stopping.is_set():
                    log.info("%r: connected again.", self._owner)
                return
