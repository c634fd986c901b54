"""Supervisor: runs the loop of one handler, and restarts it after an error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from streamtools.consumer import BoundHandler, Consumer
from streamtools.engine.backoff import backoff
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.errors import ConfigurationError, HandlerError
from streamtools.observability.health import LoopHealth

log: logging.Logger = logging.getLogger("streamtools")


class Supervisor:
    """Runs the loop of one handler, and restarts it after an error, up to a number of times."""

    def __init__(self, handler: BoundHandler, *, restarts: int, window: float) -> None:
        self.handler = handler
        self.consumer: Consumer = handler.consumer
        self.started: asyncio.Event = asyncio.Event()
        self.restarts: int = 0
        self.state: str = "starting"
        self._budget = restarts
        self._window = window
        self._recent: deque[float] = deque()
        self._stopping = False

    def stop(self, grace: float) -> None:
        """Stop receiving; running handlers have `grace` seconds to finish."""
        self._stopping = True
        if self.state != "dead":  # a consumer that has ended must not be stopped: its next run would end at once
            self.state = "draining"
            self.consumer.stop(grace)

    async def run(self) -> None:
        """Run until stopped.

        Raises:
            Exception: the error that ended the loop, if the loop never started, cannot recover, or has ended too
                often.
        """
        try:
            while not self._stopping:
                await self._run_once()
        except BaseException as error:
            self.state = "dead"
            if isinstance(error, Exception):  # log it now: perhaps nobody awaits this task before the end
                log.error("The loop of %s cannot go on, and the runner ends: %s", self.handler.name, error)  # noqa: TRY400
            raise
        self.state = "stopped"

    async def _run_once(self) -> None:
        try:
            await stray_cancellation_as_lost(self.consumer.run(self.handler, on_started=self._has_started))
        except ConfigurationError:
            raise
        except Exception as error:
            if self._stopping or not self.started.is_set() or not self._may_restart():
                raise
            self.restarts += 1
            self.state = "restarting"
            log.exception("The loop of %s ended: %s. Restarting it.", self.handler.name, error)
            await asyncio.sleep(backoff(len(self._recent)))
        else:
            if not self._stopping:
                raise HandlerError(f"{self.consumer!r} was closed while the runner was running it.")

    def _has_started(self) -> None:
        self.state = "running"
        self.started.set()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._recent.append(now)
        while self._recent[0] < now - self._window:
            self._recent.popleft()
        return len(self._recent) <= self._budget

    def health(self) -> LoopHealth:
        """Return the health of the loop."""
        progress = self.consumer.progress
        return LoopHealth(
            queue=self.consumer.queue,
            protocol=self.consumer.protocol,
            state=self.state if self.state != "running" or self.consumer.connected else "reconnecting",
            progress=None if progress is None else time.monotonic() - progress,
            restarts=self.restarts,
            in_flight=self.consumer.in_flight,
        )
