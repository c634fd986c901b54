"""ConsumerRunner: runs every handler in one event loop, until a signal or a failure ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol, Self, runtime_checkable

from streamtools.consumer import BoundHandler, Consumer
from streamtools.engine.functions.calling import NOTHING, awaited, check_function, name_of, within
from streamtools.engine.tasks.cancellation import end, until
from streamtools.engine.tasks.eventloops import PerLoop, in_its_loop
from streamtools.engine.tasks.signals import Interrupted, Interruptible, heeded, stopped_by_signals
from streamtools.engine.tasks.threads import DefaultThreads
from streamtools.errors import ConfigurationError
from streamtools.observability.health import HealthReport, HealthServer
from streamtools.producer import Producer
from streamtools.routing import ConsumerFactory
from streamtools.runner.cleanup import CleanupStack, raise_all
from streamtools.runner.supervisor import Supervisor
from streamtools.validation.checks import Seconds, check_count, check_place, check_seconds

log: logging.Logger = logging.getLogger("streamtools")

#: A function, `async def` or `def`, that runs before the first message or after the last one.
Hook = Callable[[], Awaitable[Any] | Any]


class Resource(Protocol):
    """An object that is opened before the first message and closed after the last."""

    async def open(self) -> Any: ...
    async def close(self) -> None: ...


@runtime_checkable
class Service(Protocol):
    """A source of handlers and their resources: a HandlerFactory, a bus."""

    @property
    def bound(self) -> Sequence[BoundHandler]: ...
    @property
    def resources(self) -> Sequence[Resource]: ...


class Endpoint(Protocol):
    """The place at which others ask for the health of a runner."""

    host: str
    port: int

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


#: The sources that a runner takes.
Source = ConsumerFactory | Service | Consumer | BoundHandler | Producer
#: The most threads for `asyncio.to_thread`.
THREADS: Final = 32
#: Seconds that closing connections may take after the shutdown deadline.
CLOSE_TIMEOUT: Final = 5.0
#: Seconds from the cancellation of a hook to its interruption.
INTERRUPT_DELAY: Final = 1.0


class _InLoop:
    """The state of a runner in one event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.stop: asyncio.Event = asyncio.Event()
        self.ready: asyncio.Event = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.serving = False
        #: Whether signals end the runner.
        self.signals = False
        self._deadline: float | None = None

    def begin(self, *, signals: bool) -> None:
        """Note that the runner serves from now on."""
        self.serving, self.signals, self._deadline = True, signals, None
        self.stop.clear()

    def rest(self, shutdown_timeout: float) -> float:
        """Return the seconds that are left for the shutdown; the first call begins the shutdown."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + shutdown_timeout
        return self._deadline - now


class ConsumerRunner:
    """Runs every handler of its sources in one event loop.

    `ConsumerRunner(consumers, more_consumers).run()` in a script, `await runner.serve()` inside a loop, or
    `async with runner:` beside a web framework, which keeps its own signal handlers.

    Parameters:
        sources: factories, buses, decorated handlers, and producers (opened first, closed last).
        consumers: the factory's `instances`; together with `handlers`, the long form of one source.
        handlers: the factory's `handlers`, or a mapping of queue to handler.
        port: the port of consumers that listen (HTTP) and name none themselves.
        host: the host of the same consumers.
        on_startup: functions that run, in order, before the first message.
        on_shutdown: functions that run, in order, after the last message.
        shutdown_timeout: seconds that running handlers have to finish; then their messages go back to the broker.
        restarts: how often a consumer that ended by an error is started again within `restart_window`.
        restart_window: seconds in which `restarts` are counted.
        health_port: the port that serves `/health/live`, `/health/ready` and `/health`; none when None.
        health_host: the address that it listens at.

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
        self._health: Endpoint | None = None
        if health_port is not None:
            self._health = HealthServer(health_host, health_port, self.health)
        self._supervisors: list[Supervisor] = []
        self._in = PerLoop(_InLoop)

    # --- for users ------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until SIGTERM or SIGINT; use uvloop if it is installed.

        Raises:
            Exception: the error that ended the runner, if no signal did; the process then exits with 1.
        """
        with heeded(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.get_loop().set_default_executor(DefaultThreads(THREADS, CLOSE_TIMEOUT))
            runner.run(self._serve_alone())

    async def serve(self, *, signals: bool = True) -> None:
        """Run inside a running loop, until a signal, `stop()`, or a failure.

        Parameters:
            signals: whether SIGTERM and SIGINT end the runner (in the main thread). At the end the signal handlers of
                before are restored. A second signal ends the process at once. A signal ends all runners of an event
                loop together.

        Raises:
            ConfigurationError: the runner runs already, here or in another event loop, or there is nothing to run.
            Exception: the error that ended the runner.
            ExceptionGroup: several loops, or several hooks, failed.
        """
        if not self._handlers:
            raise ConfigurationError(
                "There is no handler to run: decorate one with @consumers.route('queue') or @bus.handler."
            )
        here = self._in.here()
        if here.serving or any(other.serving for other in self._in.elsewhere()):
            raise ConfigurationError("This runner runs already: end it first by runner.stop(), or make another one.")
        here.begin(signals=signals)
        try:
            limit = self.shutdown_timeout + CLOSE_TIMEOUT
            with stopped_by_signals(here.stop.set, limit) if here.signals else nullcontext():
                await self._serve(here)
        finally:
            here.serving = False

    def stop(self) -> None:
        """End `serve()` gracefully. Safe to repeat, from any thread, and from a signal handler."""
        for here in self._in.everywhere():
            in_its_loop(here.loop, here.stop.set)

    async def ready(self) -> None:
        """Wait until every loop is connected and running.

        Raises:
            Exception: the error that ended the runner before that.
        """
        here = self._in.here()
        waiting = asyncio.create_task(here.ready.wait())
        try:
            await asyncio.wait({waiting, *([here.task] if here.task else [])}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if here.task is not None and here.task.done():
            here.task.result()

    def report_to(self, make: Callable[[str, int, Callable[[], HealthReport]], Endpoint]) -> None:
        """Report the health to another place instead of a port of this process; only if `health_port` was given.

        Parameters:
            make: makes the object that is started and stopped instead of the health server, from host, port and
                report.
        """
        if self._health is not None:
            self._health = make(self._health.host, self._health.port, self.health)

    @property
    def consumers(self) -> list[Consumer]:
        """The consumers that it runs."""
        return [handler.consumer for handler in self._handlers]

    def health(self) -> HealthReport:
        """Return the health of every loop."""
        return HealthReport(loops=[supervisor.health() for supervisor in self._supervisors])

    async def __aenter__(self) -> Self:
        here = self._in.here()
        here.task = asyncio.create_task(self.serve(signals=False), name="streamtools-runner")
        try:
            await self.ready()
        except BaseException:  # `__aexit__` is not called after this
            here.task.cancel()
            await asyncio.wait({here.task})
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        here = self._in.here()
        task, here.task = here.task, None
        if task is not None:
            await task

    # --- running --------------------------------------------------------------------------------

    async def _serve_alone(self) -> None:
        try:
            await self.serve()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if left := await end(others, CLOSE_TIMEOUT):
                log.error("%d tasks ignore their cancellation; they are left behind.", left)

    async def _serve(self, here: _InLoop) -> None:
        ends, failure = CleanupStack(), None
        try:
            async with until(here.stop):
                if not here.stop.is_set():  # if it is set, a signal has come already
                    await self._enter(here, ends)
            if not here.stop.is_set():
                await self._supervise(here)
        except Interrupted:  # a signal came while a hook blocked the event loop
            pass
        except BaseException as error:
            failure = error
        here.rest(self.shutdown_timeout)
        errors = await ends.run()
        if failure is not None:
            for further in errors:
                log.error("While the runner ended: %s", further, exc_info=further)
            raise failure
        raise_all(errors, "several things failed while the runner ended")

    async def _enter(self, here: _InLoop, ends: CleanupStack) -> None:
        for hook in [*self.on_startup, *self.on_shutdown]:
            check_function(hook, "hook", "async def prepare(): ..., without yield", NOTHING)
        for resource in self._resources:
            ends.add(f"Closing {resource!r}", resource.close, lambda: CLOSE_TIMEOUT)
            await resource.open()
        for hook in reversed(self.on_shutdown):
            name = f"The on_shutdown hook {name_of(hook)}"
            ends.add(name, partial(self._end, hook, name, here), partial(self._limit, here))
        for hook in self.on_startup:
            await _call(hook, Interruptible(by_signal=here.signals))
        self._supervisors = [
            Supervisor(handler, restarts=self._restarts, window=self._window) for handler in self._handlers
        ]
        for supervisor in self._supervisors:
            self._place(supervisor.consumer)
        if self._health is not None:
            ends.add("Closing the health endpoints", self._health.stop, lambda: CLOSE_TIMEOUT)
            await self._health.start()

    def _limit(self, here: _InLoop) -> float:
        return max(here.rest(self.shutdown_timeout), CLOSE_TIMEOUT)

    async def _end(self, hook: Hook, name: str, here: _InLoop) -> None:
        """Call a hook of `on_shutdown`; if it blocks the event loop, interrupt it when its time is over."""
        seconds = self._limit(here)
        try:
            # A hook that does not block is cancelled before that.
            with Interruptible(seconds=seconds + INTERRUPT_DELAY) as limited:
                await _call(hook, limited)
        except Interrupted:
            raise TimeoutError(
                f"{name} blocked the event loop for more than {seconds:.3g} s, and was interrupted."
            ) from None

    async def _supervise(self, here: _InLoop) -> None:
        loops = [asyncio.create_task(s.run(), name=f"streamtools-{s.consumer.queue}") for s in self._supervisors]
        stop = asyncio.create_task(here.stop.wait())
        started = asyncio.create_task(self._announce(here))
        try:
            await asyncio.wait({stop, *loops}, return_when=asyncio.FIRST_COMPLETED)
            here.rest(self.shutdown_timeout)
            await self._drain(loops)
        finally:
            await end([stop, started, *loops], CLOSE_TIMEOUT)
            here.ready.clear()
        raise_all([e for task in loops if (e := _failure(task)) is not None], "several loops ended")

    async def _announce(self, here: _InLoop) -> None:
        for supervisor in self._supervisors:
            await supervisor.started.wait()
        log.info("Running: %s.", ", ".join(s.consumer.queue for s in self._supervisors))
        here.ready.set()

    async def _drain(self, loops: Sequence[asyncio.Task[None]]) -> None:
        for supervisor in self._supervisors:
            supervisor.stop(self.shutdown_timeout)
        running = [task for task in loops if not task.done()]
        if running:
            await asyncio.wait(running, timeout=self.shutdown_timeout + CLOSE_TIMEOUT)

    def _place(self, consumer: Consumer) -> None:
        consumer.port = consumer.port if consumer.port is not None else self.port
        consumer.host = consumer.host if consumer.host is not None else self.host

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


async def _call(hook: Hook, where: Interruptible) -> None:
    await within(where, _result(hook))


async def _result(hook: Hook) -> None:
    await awaited(hook(), ConfigurationError)


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return None if not task.done() or task.cancelled() else task.exception()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - optional, and only a script's own loop uses it
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
