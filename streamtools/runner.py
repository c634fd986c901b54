"""ConsumerRunner: runs every handler in one event loop, until a signal or a failure ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import FrameType, TracebackType
from typing import Any, Final, Protocol, Self, runtime_checkable

from streamtools.calling import NOTHING, awaited, check_function
from streamtools.cancelling import guard
from streamtools.checks import Seconds, check_count, check_place, check_seconds
from streamtools.consumer import BoundHandler, Consumer
from streamtools.errors import ConfigurationError, HandlerError
from streamtools.observability.health import HealthReport, HealthServer, LoopHealth
from streamtools.policy import backoff
from streamtools.producer import Producer
from streamtools.routing import ConsumerFactory

log: logging.Logger = logging.getLogger("streamtools")

#: What runs before the first message or after the last one: a function, `async def` or `def`.
Hook = Callable[[], Awaitable[Any] | Any]


class Resource(Protocol):
    """What is opened before the first message and closed after the last."""

    async def open(self) -> Any: ...
    async def close(self) -> None: ...


@runtime_checkable
class Service(Protocol):
    """What brings handlers and their resources: a HandlerFactory, a bus."""

    @property
    def bound(self) -> Sequence[BoundHandler]: ...
    @property
    def resources(self) -> Sequence[Resource]: ...


#: What a runner takes.
Source = ConsumerFactory | Service | Consumer | BoundHandler | Producer
#: Seconds that closing connections may take beyond the shutdown deadline.
CLOSING: Final = 5.0
#: Seconds within which a repeated signal is the same one.
SAME_SIGNAL: Final = 0.05
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """Runs one handler's loop, and again when it ends by an error, within a budget."""

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
        """Take no more messages in; handlers at work have `grace` seconds."""
        self._stopping = True
        if self.state != "dead":  # what has ended is not to be told: it would end at once when it is run again
            self.state = "draining"
            self.consumer.stop(grace)

    async def run(self) -> None:
        """Until stopped.

        Raises:
            Exception: what ended the loop, when it never started, cannot recover, or the budget is used up.
        """
        try:
            while not self._stopping:
                await self._run_once()
        except BaseException as error:
            self.state = "dead"
            if isinstance(error, Exception):  # beside a host's own work nobody may await it before the end
                log.error("The loop of %s cannot go on, and the runner ends: %s", self.handler.name, error)  # noqa: TRY400
            raise
        self.state = "stopped"

    async def _run_once(self) -> None:
        try:
            await guard(self.consumer.run(self.handler, on_started=self._has_started))
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
        """How the loop is doing."""
        progress = self.consumer.progress
        return LoopHealth(
            queue=self.consumer.queue,
            protocol=self.consumer.protocol,
            state=self.state if self.state != "running" or self.consumer.connected else "reconnecting",
            progress=None if progress is None else time.monotonic() - progress,
            restarts=self.restarts,
            in_flight=self.consumer.in_flight,
        )


class ConsumerRunner:
    """Runs every handler of its sources in one event loop.

    `ConsumerRunner(consumers, more_consumers).run()` in a script, `await runner.serve()` inside a loop, or
    `async with runner:` beside a web framework, which keeps its own signal handlers.

    Parameters:
        sources: factories, buses, decorated handlers, and producers (opened first, closed last).
        consumers: the factory's `instances`; together with `handlers`, the long form of one source.
        handlers: the factory's `handlers`, or a mapping of queue to handler.
        port: where consumers that listen do so, if they do not say themselves.
        host: likewise.
        on_startup: run in order before the first message.
        on_shutdown: run in order after the last message.
        shutdown_timeout: seconds for handlers at work to finish; what does not goes back to the broker.
        restarts: how often a loop that ended by an error is started again within `restart_window`.
        restart_window: seconds.
        health_port: serve `/health/live`, `/health/ready` and `/health` there; none when None.
        health_host: likewise.

    Raises:
        ConfigurationError: there is nothing to run, or a source is not one.
    """

    def __init__(
        self,
        *sources: Source,
        consumers: Sequence[Consumer] | None = None,
        handlers: Iterable[BoundHandler] | Mapping[str, BoundHandler] | None = None,
        port: int | None = None,
        host: str | None = None,
        on_startup: Iterable[Hook] = (),
        on_shutdown: Iterable[Hook] = (),
        shutdown_timeout: Seconds = 30.0,
        restarts: int = 5,
        restart_window: Seconds = 60.0,
        health_port: int | None = None,
        health_host: str = "127.0.0.1",
    ) -> None:
        self._resources: list[Resource] = []
        self._handlers: list[BoundHandler] = []
        for source in sources:
            self._add(source)
        self._add_long_form(consumers or (), handlers or ())
        self.port = port
        self.host = host
        self.on_startup: list[Hook] = list(on_startup)
        self.on_shutdown: list[Hook] = list(on_shutdown)
        self.shutdown_timeout: float = check_seconds("shutdown_timeout", shutdown_timeout)
        check_place(host, port)
        check_place(health_host, health_port)
        self._restarts: int = check_count("restarts", restarts, 0)
        self._window: float = check_seconds("restart_window", restart_window)
        self._health = None if health_port is None else HealthServer(health_host, health_port, self.health)
        self._supervisors: list[Supervisor] = []
        self._stop = asyncio.Event()
        self._signalled: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    # --- for users ------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until SIGTERM or SIGINT; on uvloop where it is installed.

        Raises:
            Exception: what ended the runner, when it was not a signal; the process then exits with 1.
        """
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self.serve())

    async def serve(self, *, signals: bool = True) -> None:
        """Run inside a running loop, until a signal, `stop()`, or a failure.

        Parameters:
            signals: end on SIGTERM and SIGINT (in the main thread); the handlers of before are put
                back. A second signal ends the process at once.

        Raises:
            Exception: what ended the runner, when it was not stopped.
        """
        if not self._handlers:
            raise ConfigurationError(
                "There is no handler to run: decorate one with @consumers.route('queue') or @bus.handler."
            )
        self._stop.clear()
        self._signalled = None
        async with AsyncExitStack() as stack:
            if signals and threading.current_thread() is threading.main_thread():
                restore = self._catch_signals()
                stack.callback(restore)
            await self._enter(stack)
            await self._supervise()

    def stop(self) -> None:
        """End `serve()` gracefully. Safe to repeat, and from a signal handler."""
        self._stop.set()

    async def ready(self) -> None:
        """Wait until every loop is connected and running.

        Raises:
            Exception: what ended the runner before that.
        """
        waiting = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({waiting, *([self._task] if self._task else [])}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._task is not None and self._task.done():
            self._task.result()

    @property
    def consumers(self) -> list[Consumer]:
        """The consumers that it runs."""
        return [handler.consumer for handler in self._handlers]

    def health(self) -> HealthReport:
        """How every loop is doing."""
        return HealthReport(loops=[supervisor.health() for supervisor in self._supervisors])

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.serve(signals=False), name="streamtools-runner")
        try:
            await self.ready()
        except BaseException:  # nobody will leave a block that was never entered
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        task, self._task = self._task, None
        if task is not None:
            await task

    # --- how it runs ----------------------------------------------------------------------------

    async def _enter(self, stack: AsyncExitStack) -> None:
        for resource in self._resources:
            stack.push_async_callback(resource.close)
            await resource.open()
        stack.push_async_callback(_call_all, self.on_shutdown)
        await _call_all(self.on_startup)
        self._supervisors = [
            Supervisor(handler, restarts=self._restarts, window=self._window) for handler in self._handlers
        ]
        for supervisor in self._supervisors:
            self._place(supervisor.consumer)
        if self._health is not None:
            stack.push_async_callback(self._health.stop)
            await self._health.start()

    async def _supervise(self) -> None:
        loops = [asyncio.create_task(s.run(), name=f"streamtools-{s.consumer.queue}") for s in self._supervisors]
        stop = asyncio.create_task(self._stop.wait())
        started = asyncio.create_task(self._announce())
        try:
            await asyncio.wait({stop, *loops}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(loops)
        finally:
            for task in (stop, started, *loops):
                task.cancel()
            await asyncio.gather(stop, started, *loops, return_exceptions=True)
            self._ready.clear()
        _raise_failures(loops)

    async def _announce(self) -> None:
        for supervisor in self._supervisors:
            await supervisor.started.wait()
        log.info("Running: %s.", ", ".join(s.consumer.queue for s in self._supervisors))
        self._ready.set()

    async def _drain(self, loops: Sequence[asyncio.Task[None]]) -> None:
        for supervisor in self._supervisors:
            supervisor.stop(self.shutdown_timeout)
        running = [task for task in loops if not task.done()]
        if running:
            await asyncio.wait(running, timeout=self.shutdown_timeout + CLOSING)

    def _place(self, consumer: Consumer) -> None:
        consumer.port = consumer.port if consumer.port is not None else self.port
        consumer.host = consumer.host if consumer.host is not None else self.host

    def _catch_signals(self) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)

        def restore() -> None:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                _set_signal(number, handler)

        return restore

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._signalled is not None and now - self._signalled < SAME_SIGNAL:
            return  # one wish to stop, told twice: timeout(1) signals the process and then its group
        if self._signalled is not None:
            log.warning("A second signal: ending at once.")
            os._exit(128 + number)
        log.info("%s: finishing what is in hand.", signal.Signals(number).name)
        self._signalled = now
        self._stop.set()

    # --- sources --------------------------------------------------------------------------------

    def _add(self, source: object) -> None:
        match source:
            case Producer():
                self._resources.append(source)
            case BoundHandler():
                self._handlers.extend(source.all)
            case ConsumerFactory():
                self._handlers.extend(source.handlers)
            case Service():
                self._resources.extend(source.resources)
                self._handlers.extend(source.bound)
            case Consumer(handler=BoundHandler() as handler):
                self._handlers.append(handler)
            case _:
                raise ConfigurationError(
                    f"A runner cannot run {source!r}: give it ConsumerFactory, HandlerFactory, a Bus, a decorated "
                    "handler, a Consumer with a handler, or a Producer."
                )

    def _add_long_form(
        self, consumers: Sequence[Consumer], handlers: Iterable[BoundHandler] | Mapping[str, BoundHandler]
    ) -> None:
        given = list(handlers.values() if isinstance(handlers, Mapping) else handlers)
        for handler in given:
            self._add(handler)
        known = {id(handler.consumer) for handler in given}
        for consumer in consumers:
            if id(consumer) not in known:
                self._add(consumer)


async def _call_all(hooks: Iterable[Hook]) -> None:
    hooks = list(hooks)
    for hook in hooks:
        check_function(hook, "hook", "async def prepare(): ..., without yield", NOTHING)
    for hook in hooks:
        await awaited(hook(), ConfigurationError)


def _raise_failures(loops: Sequence[asyncio.Task[None]]) -> None:
    errors = [e for task in loops if not task.cancelled() and (e := task.exception()) is not None]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BaseExceptionGroup("several loops ended", errors)


def _set_signal(number: int, handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    if handler is not None:  # None: it was not set from Python, and cannot be set from here
        signal.signal(number, handler)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - optional, and only a script's own loop uses it
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
