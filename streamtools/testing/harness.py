"""Harness: a service's real handlers in a test, on the in-process protocol."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import fields
from itertools import count
from types import TracebackType
from typing import Any, Final, Self, TypeVar, assert_never, overload
from unittest.mock import patch

from streamtools import codec
from streamtools.admin import QueueAdmin
from streamtools.bus import Bus
from streamtools.consumer import Consumer
from streamtools.delivery import Settlement, current
from streamtools.engine.dispatch import Dispatcher
from streamtools.errors import Closed, ConfigurationError, DecodeError, suggest
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.retry import Retry
from streamtools.routing import ConsumerFactory, Route
from streamtools.testing.buses import BusProbe, is_of, moved, parts_of, type_of
from streamtools.testing.waiting import eventually
from streamtools.types import Handler
from streamtools.verdicts import Copy, Verdict, VerdictKind

T = TypeVar("T")
#: Seconds that `settled` waits.
TIMEOUT: Final = 10.0
#: Times in a chain that what handlers defer comes at once; what a handler defers for ever is only kept after that.
DEFERRALS: Final = 10
#: Attempts that come at once; further ones keep to their delay, so that what is retried for ever does not spin.
AT_ONCE: Final = 100
_names = count()
#: Held by the harness whose block lasts: what any Producer of the process sends goes to that one.
_turn = threading.Lock()


class Harness:
    """Runs the handlers of factories and buses in a test, without a broker, and records what happened to each
    message.

    ```python
    async with Harness(consumers) as service:
        await service.send("orders", {"id": 1})
        await service.settled()
        assert service.handled("orders") == [{"id": 1}]
        assert service.sent("payments") == [{"order": 1}]
    ```

    The handlers run with their own concurrency, retries, middleware and order; the address and the protocol are
    replaced. Inside the block no Producer connects to a broker, whatever its URL is. Its messages to a queue with a
    handler are handled here, and all its messages are recorded in `sent`. Receipts have no answers, also over HTTP.
    Only one harness can be used at a time, in all threads together.

    A bus publishes to the buses in the same harness, and can send requests to them. Their messages are recorded in
    `sent`, `deferred`, `published` and `replied`, whoever receives them. It is not an error here if nobody has
    subscribed, or if a queue is missing. Starting or stopping the bus does nothing inside the block.

    Parameters:
        sources: factories, single routed handlers, buses.
        delays: whether to wait for the delays of retries and of `send(delay=)`. If not, messages are delivered at
            once: up to a hundred attempts, and up to ten deferred messages in a chain. Messages that a handler defers
            after that are only recorded in `deferred`.
        timeout: the seconds that `settled` waits.

    Raises:
        ConfigurationError: two handlers would have to share a queue; or, when the block begins, another harness is in
            use.
    """

    def __init__(
        self, *sources: ConsumerFactory | Route | Bus, delays: bool = False, timeout: float = TIMEOUT
    ) -> None:
        self._routes = _distinct(route for source in sources for route in _routes(source))
        self._buses = [source for source in sources if isinstance(source, Bus)]
        self._url = f"asyncio://harness-{next(_names)}"
        self._delays = delays
        self._timeout = timeout
        self._consumers: list[_Watched] = []
        self._producers: dict[str, Producer] = {}
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._handled: list[tuple[Message, Any]] = []
        self._sent: list[Message] = []
        #: Id of a message -> how often it and the messages that caused it were deferred.
        self._deferrals: dict[str, int] = {}
        #: The messages of all attempts after the first, in order; `.attempt` is their number, `.error` says why.
        self.retried: list[Message] = []
        #: The messages in the error queue; `.error` says why they were rejected.
        self.rejected: list[Message] = []
        #: Messages that were dropped, or had expired.
        self.dropped: list[Message] = []

    # --- for tests ------------------------------------------------------------------------------

    async def send(
        self,
        queue: str,
        payload: object,
        *,
        headers: Mapping[str, str] | None = None,
        key: str | bytes | None = None,
        type: str | None = None,  # noqa: A002 - the field's name everywhere
        delay: float | None = None,
        ttl: float | None = None,
        id: str | None = None,  # noqa: A002
        correlation_id: str | None = None,
        reply_to: str | None = None,
    ) -> Receipt:
        """Send one message to a handler. The parameters are those of `Producer.send`.

        Raises:
            ConfigurationError: no handler is routed from this queue.
        """
        if queue not in self._queues:
            raise ConfigurationError(f"No handler is routed from {queue!r}. {suggest(queue, self._queues)}")
        producer = self._producer(queue)
        common = producer._common(
            headers, key=key, type=type or type_of(payload), delay=delay, ttl=ttl, correlation_id=correlation_id,
            reply_to=reply_to,
        )  # fmt: skip
        return (await self._put([producer._encode(payload, id, common)]))[0]

    async def settled(self) -> None:
        """Wait until all messages are settled, with their retries and the messages that they caused.

        Raises:
            TimeoutError: some messages are not settled in time; the error names them.
            Exception: the error that ended a consumer.
        """
        try:
            await eventually(self._is_settled, timeout=self._timeout)
        except TimeoutError:
            hanging = "; ".join(text for watched in self._consumers if (text := watched.hanging()))
            raise TimeoutError(f"Not settled after {self._timeout:g} s: {hanging}.") from None

    @overload
    def handled(self, what: type[T]) -> list[T]: ...
    @overload
    def handled(self, what: str | None = None) -> list[Any]: ...
    def handled(self, what: str | type | None = None) -> list[Any]:
        """Return the payloads whose handlers have returned, in order, as they were sent.

        Parameters:
            what: a queue, for its payloads only; or a Command or Event, for its messages as objects of that class.
        """
        return [_payload(message, what) for message, _ in self._handled if is_of(message, what)]

    def results(self, what: str | type | None = None) -> list[Any]:
        """Return the results of the handlers, in the order of `handled`."""
        return [result for message, result in self._handled if is_of(message, what)]

    @overload
    def sent(self, what: type[T]) -> list[T]: ...
    @overload
    def sent(self, what: str | None = None) -> list[Any]: ...
    def sent(self, what: str | type | None = None) -> list[Any]:
        """Return the payloads that Producers and buses have sent in the block; `what` is the same as in `handled`."""
        return [_payload(message, what) for message in self.sent_messages(what)]

    def sent_messages(self, what: str | type | None = None) -> list[Message]:
        """Return the same as `sent`, but as whole messages, with headers and metadata."""
        return self._gone(what, lambda message: message.intent not in ("event", "reply"))

    @overload
    def deferred(self, what: type[T]) -> list[T]: ...
    @overload
    def deferred(self, what: str | None = None) -> list[Any]: ...
    def deferred(self, what: str | type | None = None) -> list[Any]:
        """Return the payloads in `sent` that were deferred."""
        return [_payload(message, what) for message in self.sent_messages(what) if message.deliver_at is not None]

    @overload
    def published(self, what: type[T]) -> list[T]: ...
    @overload
    def published(self, what: str | None = None) -> list[Any]: ...
    def published(self, what: str | type | None = None) -> list[Any]:
        """Return the events that buses have published in the block, whoever has subscribed.

        Parameters:
            what: a topic, for its events only; or an Event, for objects of that class.
        """
        return [_payload(message, what) for message in self._gone(what, lambda m: m.intent == "event")]

    @overload
    def replied(self, what: type[T]) -> list[T]: ...
    @overload
    def replied(self, what: str | None = None) -> list[Any]: ...
    def replied(self, what: str | type | None = None) -> list[Any]:
        """Return the replies of handlers; `what` is the same as in `handled`, but queues are those of requesters."""
        return [_payload(message, what) for message in self._gone(what, lambda m: m.intent == "reply")]

    def _gone(self, what: str | type | None, chosen: Callable[[Message], bool]) -> list[Message]:
        return [message for message in self._sent if is_of(message, what) and chosen(message)]

    async def __aenter__(self) -> Self:
        try:
            self._stack.enter_context(_alone())
            for bus in self._buses:
                await self._stack.enter_async_context(moved(bus, self._url))
            self._stack.enter_context(_redirected(self._take))
            self._consumers = [_Watched(self, route) for route in self._routes]
            for watched in self._consumers:
                self._tasks.append(await watched.start())
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    # --- running --------------------------------------------------------------------------------

    @property
    def _queues(self) -> set[str]:
        return {route.queue for route in self._routes}

    def _is_settled(self) -> bool:
        for task in self._tasks:
            if task.done():
                task.result()  # raises the error that ended the loop
        return not any(watched.busy for watched in self._consumers)

    def _producer(self, queue: str) -> Producer:
        if queue not in self._producers:
            self._producers[queue] = Producer(queue, url=self._url)
        return self._producers[queue]

    async def _take(self, batch: Sequence[Message]) -> list[Receipt]:
        self._sent += batch
        return await self._put(batch)

    async def _put(self, batch: Sequence[Message]) -> list[Receipt]:
        """Send messages to handlers and requesters in this harness; messages to others are only recorded."""
        if self._consumers:
            producer = self._producer(self._consumers[0].consumer.queue)
            await producer._open()
            delivery = current.get()
            for message in self._leaving(batch, delivery.message if delivery is not None else None):
                await producer._send([message], None)
        return [Receipt(message.id, message.queue) for message in batch]

    def _leaving(self, batch: Iterable[Message], cause: Message | None) -> list[Message]:
        """Return the messages to send in this harness, and let their consumers expect them."""
        going = [m for m in batch if self._delays or self._deferred(m, cause) <= DEFERRALS]
        leaving = [m.replace(mandatory=False, deliver_at=m.deliver_at if self._delays else None) for m in going]
        for message in leaving:
            self._expect(message)
        return leaving

    def _deferred(self, message: Message, cause: Message | None) -> int:
        times = self._deferrals.get(cause.id, 0) if cause is not None else 0
        if message.deliver_at is not None:
            times += 1
        if times:
            self._deferrals[message.id] = times
        return times

    def _expect(self, message: Message) -> None:
        for watched in self._consumers:
            if watched.has(message):
                watched.pending[message.id] += 1

    async def _end(self) -> None:
        for watched in self._consumers:
            watched.consumer.stop(0)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()
        async with QueueAdmin(url=self._url) as admin:  # in-process queues would exist until the process ends
            for queue in await admin.list():
                await admin.delete(queue.name)


class _Watched:
    """The consumer of one route, and the messages that it has not settled yet."""

    def __init__(self, harness: Harness, route: Route | BusProbe) -> None:
        self.pending: Counter[str] = Counter()
        self.consumer: Consumer = route.build(harness._url)
        self._harness = harness
        self._route = route
        self._settle = self.consumer._settle
        self.consumer.middleware.insert(0, self._see)
        if not harness._delays:
            self.consumer.retry = _at_once(self.consumer.retry)
            self._dispatcher = self.consumer.make_dispatcher
            self.consumer.make_dispatcher = self._make_dispatcher  # type: ignore[method-assign]

    def has(self, message: Message) -> bool:
        """Whether this consumer receives a message."""
        if message.exchange is None:
            return message.queue == self.consumer.queue
        bindings = self._route.bindings if isinstance(self._route, BusProbe) else self.consumer.bindings
        return any(b.exchange == message.exchange and b.exchange.matches(b.topic, message.queue) for b in bindings)

    def _make_dispatcher(self, *handler: Any, retry: Retry | None = None, **options: Any) -> Dispatcher:
        return self._dispatcher(*handler, retry=None if retry is None else _at_once(retry), **options)

    @property
    def busy(self) -> bool:
        """Whether a message is not settled yet, or is being handled."""
        loop = self.consumer._loop
        return self.pending.total() > 0 or (loop is not None and loop.in_hand > 0)

    def hanging(self) -> str:
        """Return the messages that are not settled, for an error text."""
        if not self.busy:
            return ""
        ids = ", ".join(self.pending) or "none that waits"
        return f"{self._route.name} of {self.consumer.queue!r}: {ids} ({self.consumer.in_flight} at work)"

    async def start(self) -> asyncio.Task[None]:
        """Run the consumer's loop, and return its task when the loop receives."""
        self.consumer._settle = self._record  # type: ignore[method-assign]
        started = asyncio.Event()
        handler = self._route.loop if isinstance(self._route, BusProbe) else self._route
        task = asyncio.create_task(self.consumer.run(handler, on_started=started.set))
        task.add_done_callback(lambda _: started.set())
        await started.wait()
        if task.done():
            task.result()
        return task

    async def _see(self, message: Message, call_next: Handler) -> Any:
        if message.attempt > 1:
            self._harness.retried.append(message)
        result = await call_next(message)
        if self.consumer.ack == "on_receive":
            self._harness._handled.append((message, result))
        return result

    async def _record(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            copies, sent = _apart(settlement)
            self._harness._sent += sent
            if not self._harness._delays:
                copies = [m if m.attempt > AT_ONCE else m.replace(deliver_at=None) for m in copies]
            settlement.outgoing = (*copies, *self._harness._leaving(sent, settlement.delivery.message))
        await self._settle(settlements)
        for settlement in settlements:
            self._note(settlement)

    def _note(self, settlement: Settlement) -> None:
        message, kind, harness = settlement.delivery.message, settlement.verdict.kind, self._harness
        if kind.gives_back or kind.copy is Copy.RETRY or not self.pending[message.id]:
            return  # the message is delivered again, or this is a second verdict on it
        self.pending -= Counter([message.id])
        for copy in _apart(settlement)[0]:
            harness._expect(copy)
        for part in parts_of(settlement):
            self._note_part(part)

    def _note_part(self, part: Settlement) -> None:
        message, kind = part.delivery.message, part.verdict.kind
        match kind:
            case VerdictKind.ACK:
                if self.consumer.ack != "on_receive":  # with "on_receive" its handler has not begun yet
                    self._harness._handled.append((message, part.result))
            case VerdictKind.REJECT:
                self._harness.rejected += _apart(part)[0]
            case VerdictKind.DROP:
                self._harness.dropped.append(message)
            case VerdictKind.RETRY | VerdictKind.RELEASE:  # one of several handlers: the message is delivered again
                pass
            case _:
                assert_never(kind)


class _AtOnce(Retry):
    """The same policy without its delays."""

    def decide(self, error: BaseException, attempt: int) -> Verdict:
        verdict = super().decide(error, attempt)
        return Verdict.retry(0) if verdict.kind.copy is Copy.RETRY and attempt <= AT_ONCE else verdict


def _at_once(retry: Retry) -> Retry:
    return _AtOnce(**{f.name: getattr(retry, f.name) for f in fields(Retry)})


def _apart(settlement: Settlement) -> tuple[list[Message], list[Message]]:
    """Return the copies of the message itself, and the messages that its handlers sent."""
    own = settlement.delivery.message.id
    copies = [m for m in settlement.outgoing if m.id == own]
    return copies, [m for m in settlement.outgoing if m.id != own]


def _routes(source: object) -> Sequence[Route | BusProbe]:
    if isinstance(source, ConsumerFactory):
        return source.handlers
    if isinstance(source, Route):
        return [each for each in source.all if isinstance(each, Route)]
    if isinstance(source, Bus):
        return [BusProbe(source)] if source.bound else []
    raise ConfigurationError(f"A harness runs factories, routed handlers and buses, but not {source!r}.")


def _distinct(routes: Iterable[Route | BusProbe]) -> list[Route | BusProbe]:
    found: dict[tuple[str, Any], Route | BusProbe] = {}
    for route in routes:
        other = found.setdefault((route.queue, route.options.get("group")), route)
        if other is not route:
            raise ConfigurationError(
                f"{other.name} and {route.name} are both routed from {route.queue!r}, which works by HTTP method "
                "only; give the harness one of them: Harness(handler)."
            )
    return list(found.values())


@contextmanager
def _alone() -> Iterator[None]:
    if not _turn.acquire(blocking=False):
        raise ConfigurationError(
            "Another harness is in use, and records what every Producer of this process sends. End its block first, "
            "or give one harness all sources: Harness(consumers, bus). Tests in threads need a threading.Lock."
        )
    try:
        yield
    finally:
        _turn.release()


def _redirected(take: Callable[[Sequence[Message]], Awaitable[list[Receipt]]]) -> ExitStack:
    """Let every Producer send to `take`, without connecting, until the returned stack is closed."""
    touched: list[Producer] = []

    async def connect(self: Producer, deadline: float) -> None:
        if self._closed:
            raise Closed(f"{self!r} was closed; call open() to use it again.")
        if not self._connected:
            self._connected = True
            touched.append(self)

    async def deliver(self: Producer, batch: Sequence[Message], options: Any) -> list[Receipt]:
        await connect(self, 0)
        return await take(batch)

    def forget() -> None:
        for producer in touched:
            producer._connected = False  # it was never connected to a broker

    stack = ExitStack()
    stack.callback(forget)
    stack.enter_context(patch.object(Producer, "_connect", connect))
    stack.enter_context(patch.object(Producer, "_deliver", deliver))
    return stack


def _payload(message: Message, what: str | type | None = None) -> Any:
    try:
        return codec.decoder(what)(message) if isinstance(what, type) else codec.decode(message)
    except DecodeError:
        return message.body
