"""Consumer: receives messages, by a decorated handler, by iteration, or by pulling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Final, Generic, Literal, Self, Unpack, overload

from typing_extensions import ParamSpec, TypeVar  # pydantic's; typing's own have no defaults before Python 3.13

from streamtools.delivery import Delivery, Reads, Settlement
from streamtools.driver import ConsumerHooks
from streamtools.engine.answering import RouteAnswers
from streamtools.engine.dispatch import Answer, Dispatcher, chain, check_middleware
from streamtools.engine.endpoint import Endpoint
from streamtools.engine.functions.calling import Decorated, check_handler, name_of, undecorated
from streamtools.engine.functions.invoke import RESOLVERS, check_decorators, compile_handler
from streamtools.engine.loop import Ack, Loop
from streamtools.engine.messages.failures import error_queue_of
from streamtools.engine.pulling import Puller
from streamtools.engine.replies import ReplyRule
from streamtools.engine.run import ConsumerRun
from streamtools.engine.settler import Finished
from streamtools.engine.settling import Decider
from streamtools.engine.tasks.eventloops import in_its_loop
from streamtools.engine.tasks.threads import Threads
from streamtools.engine.transport import Transport
from streamtools.errors import Closed, ConfigurationError, FeatureError
from streamtools.exchange import Binding
from streamtools.options import AnyConsumerOptions
from streamtools.parameters import OrderedBy as OrderedBy
from streamtools.protocols import targets
from streamtools.registry import Registry
from streamtools.retry import Retry, check_retry
from streamtools.types import ErrorHandler, Handler, Middleware
from streamtools.validation.checks import Declare, Seconds, check_choice, check_count, check_name, check_seconds
from streamtools.verdicts import RELEASE

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

#: The parameters of a handler, and what a call of it returns.
P = ParamSpec("P", default=...)
R = TypeVar("R", default=Any)
Q = ParamSpec("Q")
#: Deliveries in hand at most, when the consumer does not say.
PREFETCH: Final = 100

#: Protocol name to consumer class.
CONSUMER_LOOPS: Registry[Consumer] = Registry("consumer", targets("consumer"))


class Consumer(ConsumerHooks, Endpoint):
    """Receives the messages of one queue.

    `Consumer("orders", url="amqp://...")` picks the protocol by the URL; `CONSUMER_LOOPS["rabbitmq"]("orders")`
    picks it by name. It may be used in one event loop after the other; it is closed when its loop ends.

    Parameters:
        queue: the queue's name.
        url: the address, or a settings object such as `RabbitMQSettings(...)`; see `streamtools.settings`.
        concurrency: how many handlers run at once; 1 keeps first in, first out.
        prefetch: the largest number of messages in hand; 100, or twice the concurrency if that is more, when None.
        retry: the policy for handlers that fail.
        error_queue: where rejected messages go; `{queue}` in it stands for this queue's name.
        max_deliveries: a message that the broker has delivered so often without a verdict is rejected.
        ack: "after" the handler returned (at least once), "on_receive" (at most once), or "manual":
            the handler takes the `Delivery` and settles it, now or later.
        ordered_by: "queue" makes later messages wait while one is retried; "key" only those with the same key;
            "partition" those of the same partition (Kafka; elsewhere it is "queue").
        group: consumers of one group share the queue's messages, and each group has them all.
        offset: where a new group begins: "earliest" or "latest".
        bindings: topics of exchanges whose messages the queue receives, beside those sent to it.
        declare: create the queue and the error queue if they do not exist (True), never (False), or only check that
            they exist ("passive").
        connect_timeout: seconds for which the first connection is tried.
        middleware: functions around the handler, outermost first.
        client_id: this consumer's name, as the broker shows it with its connections.
        host: where to listen, for protocols that do so (HTTP); others ignore it.
        port: the port to listen at, for the same protocols.
        options: options of the protocol; those of another built-in protocol are ignored, with a line in the log.
            RabbitMQ: `arguments`, `auto_delete`, `durable`, `error_arguments`, `error_declare`, `exclusive`,
            `queue_type`. Kafka: `auto_ack`, `consumer_group`, `exactly_once`, `partitions`, `pattern`, `replication`,
            `revoke_timeout`, `start_offset`, `start_time`, `static_id`, `topics`. HTTP: `content_types`, `max_body`,
            `method`.

    Raises:
        ConfigurationError: a name, a URL or an option that cannot work.
        FeatureError: the protocol cannot do what is asked.
        TypeError: an option that no protocol knows.
    """

    _run: ConsumerRun
    _puller: Puller
    _reads: Reads | None

    def __init_subclass__(cls, protocol: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if protocol is not None:
            cls._check_names(Consumer)
            cls.protocol = protocol
            CONSUMER_LOOPS[protocol] = cls

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        kind: Any = CONSUMER_LOOPS.of_url(options.get("url")) if cls is Consumer else cls
        return super().__new__(kind, *arguments, **options)  # type: ignore[no-any-return]

    def __init__(
        self,
        queue: str,
        *,
        url: str | ProtocolSettings | None = None,
        concurrency: int = 1,
        prefetch: int | None = None,
        retry: Retry | None = None,
        error_queue: str = "error",
        max_deliveries: int = 5,
        ack: Ack = "after",
        ordered_by: OrderedBy | None = None,
        group: str | None = None,
        offset: Literal["earliest", "latest"] = "earliest",
        bindings: Iterable[Binding] = (),
        declare: Declare = True,
        connect_timeout: Seconds = 30.0,
        middleware: Iterable[Middleware] = (),
        client_id: str | None = None,
        host: str | None = None,
        port: int | None = None,
        **options: Unpack[AnyConsumerOptions],
    ) -> None:
        self._set_up(queue, url, declare, client_id, host, port)
        self.ordered_by: OrderedBy | None = self._order(ordered_by)
        self.concurrency: int = 1 if self.ordered_by == "queue" else check_count("concurrency", concurrency)
        self.prefetch: int = prefetch if prefetch is not None else max(PREFETCH, 2 * self.concurrency)
        self.retry: Retry = retry if retry is not None else Retry()
        self.error_queue: str = error_queue_of(error_queue, queue)
        self.max_deliveries = max_deliveries
        self.ack = ack
        self.group = group
        self.offset = offset
        self.bindings: list[Binding] = list(bindings)
        self.connect_timeout: float = check_seconds("connect_timeout", connect_timeout)
        self.middleware: list[Middleware] = check_middleware(middleware)
        self._check()
        self._read_options(options, Consumer.__init__)
        self.handler: BoundHandler | None = None  # set here: in the class, type checkers would bind it to self
        self._run, self._puller = ConsumerRun(self), Puller(self, self.make_dispatcher(_no_handler, "by hand"))

    # --- for users ------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect and declare the queue and the error queue. Safe to repeat; opens again after `close()`.

        Raises:
            ConnectError: the broker cannot be reached within `connect_timeout`, or refuses us.
            QueueError: a queue is missing (declare="passive") or has other arguments.
        """
        self._reopen()
        self._run.stopping.clear()
        await self._connect()
        return self

    @overload
    def __call__(self, function: Callable[P, R], /) -> BoundHandler[P, R]: ...
    @overload
    def __call__(
        self,
        /,
        *,
        retry: Retry | None = ...,
        middleware: Iterable[Middleware] = ...,
        **options: Unpack[AnyConsumerOptions],
    ) -> Callable[[Callable[P, R]], BoundHandler[P, R]]: ...
    def __call__(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        retry: Retry | None = None,
        middleware: Iterable[Middleware] = (),
        **options: Unpack[AnyConsumerOptions],
    ) -> Any:
        """Decorate the handler: `@consumer()`; nothing connects yet.

        The decorated name still calls the function plainly with a message; without an argument it
        runs the loop until cancelled.

        Parameters:
            retry: replaces the consumer's policy.
            middleware: goes inside the consumer's own.
            options: the protocol's own, as in the constructor.

        Raises:
            TypeError: an option that no protocol knows.
        """
        if options:
            given = {n: getattr(self.options, n) for n in self.options.model_fields_set}
            self._read_options({**given, **options}, Consumer.__init__)
        if retry is not None:
            check_retry(retry)
            self.retry = retry
        self.middleware = [*self.middleware, *check_middleware(middleware)]

        def decorate(function: Callable[..., Any]) -> BoundHandler:
            if self.handler is not None:
                raise ConfigurationError(
                    f"{self!r} has the handler {self.handler.name} already; make another consumer for "
                    f"{name_of(function)}."
                )
            self.handler = BoundHandler(self, function)
            return self.handler

        return decorate if function is None else decorate(function)

    async def receive(self, max_messages: int = 1, *, timeout: Seconds | None = None) -> list[Delivery]:  # noqa: ASYNC109
        """Receive up to `max_messages`; you must settle each delivery. Messages that have expired are dropped.

        Parameters:
            timeout: seconds, or a timedelta, to wait for the first one; 0 returns what is there as soon as the broker
                has answered, None waits without a limit.

        Returns:
            Deliveries; an empty list when the time is over.
        """
        if max_messages < 1:
            raise ValueError(f"max_messages={max_messages} is out of range: at least 1.")
        self._here()
        return await self._puller.receive(max_messages, timeout)

    async def ack_many(self, deliveries: Iterable[Delivery]) -> None:
        """Acknowledge what `receive` returned, all at once; skips deliveries that are already settled.

        Raises:
            ConnectionLost: the connection ended; those of them that come again are new deliveries.
            RuntimeError: one was not received by this consumer.
        """
        self._here()
        await self._puller.acknowledge(deliveries)

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        """Deliveries one after the other, for ever; each is to be settled by hand."""
        while True:
            batch = await self.receive(self.prefetch)
            try:
                while batch:
                    yield batch.pop(0)
            finally:
                if batch:
                    await self._settle([Settlement(d, RELEASE) for d in batch])

    async def run(self, handler: BoundHandler, *, on_started: Callable[[], None] | None = None) -> None:
        """Handle messages until `stop()` or cancellation, through reconnects.

        Raises:
            ConnectError: the first connection cannot be made, or a later one is refused for good.
            QueueError: about the queue.
            ConfigurationError: it runs a loop already, or is in use in another event loop.
        """
        self._here()
        run = self._run
        if run.has_begun:
            raise ConfigurationError(f"{self!r} runs a loop already; make another consumer for a second one.")
        run.has_begun = True
        self._reopen()
        threads = Threads(self.concurrency, f"streamtools-{self.queue}")
        try:
            await run.handle(handler.make_decider(self, threads), on_started)
        finally:
            threads.shutdown()
            try:
                await self.close()
            finally:
                self._run = ConsumerRun(self, run.loop)

    def stop(self, grace: float = 30.0) -> None:
        """Take no more messages. Running handlers have `grace` seconds, and the rest goes back.

        Safe to repeat, and from any thread.
        """
        self._run.end_within(grace)
        in_its_loop(self._at, self._run.stopping.set)

    @property
    def in_flight(self) -> int:
        """The number of running handlers."""
        return self._loop.running if self._loop is not None else 0

    @property
    def connected(self) -> bool:
        """Whether the connection is up, as far as is known."""
        return self._connected and not self._run.is_lost

    @property
    def progress(self) -> float | None:
        """When a delivery was last settled, on the monotonic clock; None before the loop began."""
        return self._loop.progress if self._loop is not None else None

    # --- for its parts and for drivers ------------------------------------------------------------

    @property
    def _loop(self) -> Loop | None:
        """The loop over the present connection, or over the last one; None before the first."""
        return self._run.loop

    @property
    def _stopping(self) -> asyncio.Event:
        """Set when the run is to end."""
        return self._run.stopping

    @property
    def _transport(self) -> Transport:
        """The driver's hooks, or what stands before them."""
        return self.wrapper or self  # type: ignore[return-value]  # a consumer's wrapper has its hooks

    def _make_loop(self, decider: Decider, finished: Finished) -> Loop:
        return Loop(
            self._transport, decider, concurrency=self.concurrency, prefetch=self.prefetch, ack=self.ack,
            ordering_key=self._ordering_key if self.ordered_by in ("partition", "key") else None, finished=finished,
        )  # fmt: skip

    async def _connect(self, seconds: float | None = None) -> None:
        """Connect, unless that is done; try for so many seconds, `connect_timeout` when None, and at least once."""
        deadline = time.monotonic() + (self.connect_timeout if seconds is None else seconds)
        async with self._opening:
            await self._keep_connecting(deadline, [])

    async def _goes_on_after(self, delay: float) -> bool:
        return await self._run.goes_on_after(delay)

    async def _close_driver(self) -> None:
        try:
            if self._reads is not None:
                await self._reads.end()
        finally:
            await self._close()

    def _in_second_loop(self, loop: asyncio.AbstractEventLoop) -> Self:
        """It may move to a second event loop only while it is idle in the first, where its messages are."""
        if self._run.has_begun or self._connected or self._opening.locked() or self._puller.is_busy:
            raise ConfigurationError(
                f"{self!r} is in use in another event loop: make another consumer for this one, or end it there "
                "first: asyncio.run_coroutine_threadsafe(consumer.close(), its_loop)."
            )
        self._begin_anew()
        self._live_in(loop)
        return self

    def make_dispatcher(
        self,
        handler: Handler,
        name: str,
        *,
        retry: Retry | None = None,
        on_error: ErrorHandler | None = None,
        answer: Answer | None = None,
    ) -> Dispatcher:
        """A compiled handler as a dispatcher, by this consumer's parameters.

        Parameters:
            retry: replaces the consumer's policy.
            on_error: decides about failures instead of the policy.
            answer: answers requests with the handler's result.
        """
        return Dispatcher(
            handler,
            name,
            retry=retry or self.retry,
            error_queue=self.error_queue,
            max_deliveries=self.max_deliveries,
            in_place=self.ordered_by is not None,
            features=self.features,
            on_error=on_error,
            place=self.place,
            together=self.ack == "after",
            atomic=self.features.atomic or getattr(self.options, "exactly_once", False),  # nothing has left either
            answer=answer,
        )

    def _answers(self) -> Answer | None:
        """Answers requests with the result of a routed handler; None if the answer comes on the same call."""
        if self.features.reply or self.ack != "after":
            return None
        return RouteAnswers(self.place, self.reply_rule(), self.client_id)

    def reply_rule(self, patterns: Sequence[str] | None = None) -> ReplyRule:
        """Decides where replies to this queue's messages may go.

        Parameters:
            patterns: one of them must fit the address; None for any queue that takes replies.
        """
        never = [self.error_queue] if self.features.error_queue else []
        return ReplyRule(self.validate_reply, patterns, never)

    def _order(self, ordered_by: OrderedBy | None) -> OrderedBy | None:
        return "queue" if ordered_by == "partition" and not self.features.partitioned else ordered_by

    def _check(self) -> None:
        check_count("prefetch", self.prefetch)
        check_count("max_deliveries", self.max_deliveries)
        check_choice("ack", self.ack, ("after", "on_receive", "manual"))
        check_choice("ordered_by", self.ordered_by, (None, "queue", "partition", "key"))
        check_choice("offset", self.offset, ("earliest", "latest"))
        check_retry(self.retry)
        if self.features.error_queue:
            self.validate_queue(self.error_queue)
        if self.group is not None:
            check_name(self.group, "group")
        if self.group is not None and not self.features.groups:
            raise FeatureError(
                f"{self.protocol!r} has no consumer groups: leave group= away (consumers of one queue share "
                "its messages), and send to one queue for each group."
            )
        if self.bindings and not self.features.topics:
            raise FeatureError(f"{self.protocol!r} has no exchanges: leave bindings= away, and send to the queue.")


class BoundHandler(Decorated, Generic[P, R]):
    """A decorated handler: called with a message it is the function, without one it runs the loop.

    On a method it is a descriptor: `await obj.handle()` runs the loop, `await obj.handle(msg)` calls it once.

    Attributes:
        function: the function that was decorated.
        stacked: if it was decorated several times, the inner handlers, each with its own queue.
    """

    function: Callable[P, R]
    stacked: tuple[BoundHandler, ...] = ()

    def __init__(self, consumer: Consumer, function: Callable[P, R]) -> None:
        self.consumer = consumer
        self._describe(function)

    def _describe(self, function: Callable[..., Any]) -> None:
        if isinstance(function, BoundHandler):
            self.stacked = function.all
        function = undecorated(function)
        check_handler(function)
        check_decorators(function)
        self.function = function
        self.name: str = name_of(function)
        self.__doc__ = function.__doc__
        self.__name__: str = getattr(function, "__name__", self.name)
        self.__qualname__ = self.name
        self.__module__ = getattr(function, "__module__", None) or type(function).__module__
        self.__wrapped__ = function

    def __set_name__(self, owner: type, name: str) -> None:
        """Called once its class exists: a method can then be bound to it."""
        for each in self.all:
            if isinstance(each.function, classmethod):
                each.function = each.function.__get__(None, owner)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: BoundHandler[Concatenate[Any, Q], R], instance: object, owner: type | None = None
    ) -> BoundHandler[Q, R]: ...
    def __get__(self, instance: object, owner: type | None = None) -> BoundHandler:
        if instance is None:
            return self
        return self._bind(BoundHandler(self.consumer, self.function.__get__(instance, owner)), instance, owner)

    def _bind(self, bound: BoundHandler, instance: object, owner: type | None) -> BoundHandler:
        bound.stacked = tuple(each.__get__(instance, owner) for each in self.stacked)
        return bound

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload  # the second, so that a decorator above this one sees the function's parameters
    def __call__(self) -> Coroutine[Any, Any, None]: ...  # type: ignore[overload-cannot-match]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs) if args or kwargs else self._run()

    @property
    def all(self) -> tuple[BoundHandler, ...]:
        """This handler, and the inner ones of the same function."""
        return self, *self.stacked

    async def _run(self) -> None:
        if not self.stacked:
            return await self.consumer.run(self)
        async with asyncio.TaskGroup() as loops:
            for handler in self.all:
                loops.create_task(handler.consumer.run(handler))
        return None

    def make_decider(self, consumer: Consumer, threads: Threads) -> Decider:
        """What turns the deliveries of `consumer` into settlements, compiled anew for each run.

        Parameters:
            threads: where a `def` handler runs.
        """
        function = compile_handler(self.function, threads, RESOLVERS)
        handler = chain(function, check_middleware(consumer.middleware))
        return consumer.make_dispatcher(handler, self.name, answer=consumer._answers())

    def __repr__(self) -> str:
        return f"<handler {self.name} of {self.consumer!r}>"


async def _no_handler(message: object) -> None:
    raise Closed("This consumer settles by hand and has no handler.")
