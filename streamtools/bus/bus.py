"""Bus: commands to their one owner, events to whoever subscribed, replies to who asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from streamtools.admin import ADMINS, QueueAdmin
from streamtools.bus.bound import BusHandler
from streamtools.bus.connections import Connections
from streamtools.bus.context import resolvers
from streamtools.bus.contracts import Command, Contract
from streamtools.bus.fan_out import HandlerFanOut
from streamtools.bus.handler_registry import Entry, HandlerRegistry, Subscription, bindings_given, bindings_of
from streamtools.bus.message_factory import MessageFactory
from streamtools.bus.message_sender import MessageSender
from streamtools.bus.requests import Requests
from streamtools.compat import pikabus
from streamtools.compat.pikabus import PikaBus
from streamtools.consumer import BoundHandler, Consumer
from streamtools.delivery import Delivery
from streamtools.engine.dispatch import Answer, Dispatcher, as_list, check_error_handler, check_middleware
from streamtools.engine.messages.failures import error_queue_of
from streamtools.engine.replies import ReplyRule, check_patterns
from streamtools.engine.tasks.eventloops import PerLoop
from streamtools.engine.tasks.threads import Threads
from streamtools.errors import ConfigurationError
from streamtools.exchange import TOPIC, Binding, Exchange
from streamtools.parameters import BusParameters
from streamtools.producer import Producer
from streamtools.protocols import QUEUE_OPTIONS
from streamtools.receipt import Receipt
from streamtools.retry import Retry, check_retry
from streamtools.runner import ConsumerRunner
from streamtools.types import ErrorHandler, Handler, Middleware
from streamtools.validation.checks import check_choice

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

F = TypeVar("F", bound=Callable[..., Any])


class Bus(MessageSender):
    """Sends and receives commands and events.

    ```python
    bus = Bus("orders", url="amqp://localhost")

    @bus.handler
    async def place(command: PlaceOrder, context: MessageContext):
        await context.publish(OrderPlaced(id=command.id))   # leaves when the handler has succeeded

    ConsumerRunner(bus).run()                                # or: async with bus: ... inside a loop
    ```

    Safe to use from many tasks at once, and in any number of event loops, one after the other or in several threads;
    its handlers run in one of them at a time. In a handler, and in `transaction()`, messages wait and leave together
    at the end; elsewhere they leave at once.

    Parameters:
        queue: this service's own queue; None for a bus that only sends.
        url: the address, or a settings object; see `streamtools.settings`.
        subscriptions: topics, or events, that the queue receives beside those that its handlers are for.
        mandatory: publishing is an error if nobody has subscribed.
        retry: the policy for handlers that fail.
        on_error: decides about failures: async (message, error, attempt) -> verdict, or None to let `retry` decide.
        incoming: middleware around every handler, outermost first.
        outgoing: middleware for everything that is sent, outermost first.
        header_style: "pikabus" shares a broker with services of PikaBus: the bus writes and reads PikaBus's headers,
            and uses its exchanges if no exchange is given.
        header_prefix: the first word of those headers.
        client_id: this service's name, as the source of messages, and as the broker shows it with its connections.
        send_timeout: seconds for which `send` keeps trying if the connection is lost.
        content_type: the format of payloads, for which `register_codec` was called; JSON when None.
        replies: patterns, such as "*.replies.*"; a reply goes only to an address that matches one of them. None
            allows every queue that may get replies.
        failure_texts: a failed request is answered with the text of the error, not only with its class.
        options: further parameters of `Consumer`, for the consumer of the queue.

    Raises:
        ConfigurationError: a name or an option that cannot work.
        FeatureError: the protocol cannot do what is asked.
    """

    def __init__(
        self,
        queue: str | None = None,
        *,
        url: str | ProtocolSettings | None = None,
        subscriptions: Iterable[Subscription] | Subscription = (),
        mandatory: bool = True,
        retry: Retry | None = None,
        on_error: ErrorHandler | None = None,
        incoming: Iterable[Middleware] = (),
        outgoing: Iterable[Middleware] = (),
        header_style: pikabus.HeaderStyle | None = None,
        header_prefix: str = "PikaBus",
        client_id: str | None = None,
        send_timeout: float = 30.0,
        content_type: str | None = None,
        replies: Iterable[str] | None = None,
        failure_texts: bool = False,
        **options: Unpack[BusParameters],
    ) -> None:
        self.queue = queue
        self.mandatory = mandatory
        #: Middleware around every handler, outermost first; add, reorder, replace before it starts.
        self.incoming: list[Middleware] = as_list(incoming, "incoming")
        #: Middleware for everything that is sent, outermost first; likewise.
        self.outgoing: list[Middleware] = as_list(outgoing, "outgoing")
        self.on_error = on_error
        self._url, self._send_timeout = url, send_timeout
        self._options: dict[str, Any] = {**options, "retry": retry, "client_id": client_id}
        check_choice("header_style", header_style, (None, "pikabus"))
        self._style = PikaBus(header_prefix, self._bind_direct) if header_style is not None else None
        self._topic: Exchange = TOPIC if self._style is None else pikabus.TOPIC
        self._handlers = HandlerRegistry(queue, self._topic)
        self._provided: dict[type, Any] = {}
        self._sender = self._make_sender(url)
        self._failure_texts = failure_texts
        self._factory = MessageFactory(
            client_id or queue, queue, self._sender, content_type, replies=self._reply_rule(check_patterns(replies))
        )
        self._subscriptions: dict[Binding, None] = dict.fromkeys(bindings_of(subscriptions, self._topic))
        self._check()
        self._connections = PerLoop(self._make_connections)

    def _check(self) -> None:
        """What cannot work is an error now, and not when it is started."""
        if self._subscriptions:
            self._factory.need_topics()
            self._own()
        if self._style is not None:
            self._share_with_pikabus(self._style)
        if self.queue is not None:
            _ = self.consumer

    # --- handlers -------------------------------------------------------------------------------

    @overload
    def handler(self, function: F, /) -> F: ...
    @overload
    def handler(
        self, /, *, type: str | None = ..., retry: Retry | None = ..., exchange: Exchange | None = ...
    ) -> Callable[[F], F]: ...
    def handler(
        self,
        function: Any = None,
        /,
        *,
        type: str | None = None,  # noqa: A002 - the field's name everywhere
        retry: Retry | None = None,
        exchange: Exchange | None = None,
    ) -> Any:
        """Register a handler: `@bus.handler`. The annotation of its first parameter says what it handles.

        A Command has one handler. An Event has any number, and the queue is subscribed to its topic. `A | B` takes
        both. `dict`, `bytes`, `Message` or no annotation takes everything that has no other handler. Further
        parameters are filled by type: MessageContext, Message, Delivery, Bus, and what `provide` was given.

        Parameters:
            type: the name on the wire, for messages without a contract.
            retry: replaces the bus's policy.
            exchange: the exchange that an event is subscribed to, or to which a command can be sent with the name of
                the queue.

        Raises:
            ConfigurationError: the annotation does not say what it handles, a command already has a handler, or the
                bus runs.
        """

        def decorate(function: Any) -> Any:
            self._add_handler(function, type=type, retry=retry, exchange=exchange)
            return function

        return decorate if function is None else decorate(function)

    def register(
        self,
        contract: type[Contract],
        handler: Callable[..., Any] | type,
        *,
        retry: Retry | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Register a handler for a contract: a function, or a class with `handle(self, command)`.

        Each message gets a new instance of a class; the arguments of its constructor come from `provide`.

        Parameters:
            retry: replaces the bus's policy.
            exchange: the exchange that an event is subscribed to, or to which a command can be sent with the name of
                the queue.

        Raises:
            ConfigurationError: as for `handler`, or a class without `handle`.
        """
        self._add_handler(handler, contract=contract, retry=retry, exchange=exchange)

    def _add_handler(self, function: Callable[..., Any], **terms: Any) -> None:
        known = len(self._handlers.bindings)
        self._own()
        if self.consumer.connected:
            raise ConfigurationError(
                f"{self!r} runs already, with the handlers that it had: register before it starts."
            )
        if terms["retry"] is not None:
            check_retry(terms["retry"])
        self._handlers.add(function, **terms)
        if len(self._handlers.bindings) > known:
            self._factory.need_topics()

    def provide(self, value: Any, type: type | None = None) -> None:  # noqa: A002
        """Give this value to every handler and constructor that has a parameter of its type. Call it before the bus
        starts.

        Parameters:
            type: the type of these parameters, if it is not the value's own.
        """
        self._provided[type or value.__class__] = value

    def route(self, command: type[Command], to: str, *, exchange: Exchange | None = None) -> None:
        """Say where commands of this class go, if neither the call nor the class does.

        Parameters:
            to: a queue; a routing key, with an exchange.

        Raises:
            ConfigurationError: it is not a command, or its destination is impossible.
        """
        given: Any = command
        if not isinstance(given, type) or not issubclass(given, Command):
            raise ConfigurationError(f"route() is for commands; {command!r} is none. An event goes by its topic.")
        self._handlers.know(command)
        self._factory.route(command, to, exchange)

    # --- subscriptions --------------------------------------------------------------------------

    async def subscribe(
        self,
        *topics: Subscription | Iterable[Subscription],
        queue: str | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Have a queue receive these topics from now on; safe to repeat.

        Parameters:
            topics: topics, patterns of them, or events, also in lists; none for a fanout exchange.
            queue: the queue; this bus's own when None, which is created if it does not exist.

        Raises:
            ConfigurationError: a command; this bus has no queue of its own.
            QueueError: there is no such queue.
        """
        self._factory.need_topics()
        bindings = bindings_given(topics, exchange or self._topic)
        if queue in (None, self.queue) and self._connections.here().runner is None:
            await self.declare()
        admin = await self._get_admin()
        for binding in bindings:
            await admin.bind(queue or self._own(), binding.topic, binding.exchange)
            if queue in (None, self.queue):
                self._subscriptions[binding] = None
        self._note_bindings()

    async def unsubscribe(
        self,
        *topics: Subscription | Iterable[Subscription],
        queue: str | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Undo `subscribe`; safe to repeat. Messages that already wait are handled.

        Raises:
            ConfigurationError: as for `subscribe`.
        """
        self._factory.need_topics()
        bindings = bindings_given(topics, exchange or self._topic)
        admin = await self._get_admin()
        for binding in bindings if queue in (None, self.queue) else ():
            self._subscriptions.pop(binding, None)
            self._handlers.bindings.pop(binding, None)
        self._note_bindings()  # first, so that none comes back with a connection
        for binding in bindings:
            await admin.unbind(queue or self._own(), binding.topic, binding.exchange)

    async def declare(self) -> None:
        """Create this bus's queue and its subscriptions, without receiving. Safe to repeat.

        With the option `declare=False` the bus does not create the queue.

        Raises:
            ConfigurationError: this bus has no queue of its own.
            QueueError: the queue exists with other arguments.
        """
        self._own()
        admin = await self._get_admin()
        if self.consumer.declare is True:
            await admin.create(self._own(), **{n: v for n, v in self._options.items() if n in QUEUE_OPTIONS})
        for binding in self._bindings():
            await admin.bind(self._own(), binding.topic, binding.exchange)

    async def cancel(self, receipt: Receipt) -> bool:
        """Cancel a deferred message; returns False if it is already due, or unknown.

        Raises:
            FeatureError: the protocol cannot cancel it.
        """
        return await (await self._get_admin()).cancel(receipt.queue, receipt.id)

    # --- receiving by hand ----------------------------------------------------------------------

    async def receive(
        self,
        queue: str | None = None,
        max_messages: int = 1,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> list[Delivery]:
        """Receive messages by hand, from this bus's own queue or another; see `Consumer.receive`."""
        name, pulling = queue or self._own(), self._connections.here().pulling
        if name not in pulling:
            own = name == self.queue
            pulling[name] = (
                self._make_consumer() if own else self._with_wrapper(Consumer(name, url=self._url, declare=False))
            )
            if own:
                pulling[name].bindings = self._bindings()
        return await pulling[name].receive(max_messages, timeout=timeout)

    # --- lifetime -------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Connect, create the queue, and run the handlers if there are any. Safe to repeat, also after `stop()`.

        Raises:
            ConnectError: the broker cannot be reached, or refuses us.
        """
        here = self._connections.here()
        async with here.turning:
            if here.runner is None:
                here.runner = await self._start()
        return self

    async def _start(self) -> ConsumerRunner | None:
        if not self._handlers:
            await self.open()
            if self.queue is not None and self.consumer.features.admin:
                await self.declare()
            return None
        return await ConsumerRunner(self).__aenter__()

    async def stop(self) -> None:
        """Finish what is in hand and disconnect, in the event loop in which it was started. Safe to repeat.

        Raises:
            ConfigurationError: it runs in another event loop.
        """
        here = self._connections.here()
        if here.runner is None and any(other.runner is not None for other in self._connections.elsewhere()):
            raise ConfigurationError(
                f"{self!r} runs in another event loop: stop it there, as in "
                "asyncio.run_coroutine_threadsafe(bus.stop(), its_loop)."
            )
        async with here.turning:
            runner, here.runner = here.runner, None
            try:
                if runner is not None:
                    await runner.__aexit__(None, None, None)
            finally:
                await self.close()

    async def open(self) -> Self:
        """Connect for sending; handlers are not run. Safe to repeat."""
        check_middleware(self.outgoing, "outgoing")
        await self._sender.open()
        return self

    async def close(self) -> None:
        """Close all connections that this bus has in the running event loop. Safe to repeat."""
        await self._connections.here().close()
        await self._sender.close()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- for the runner -------------------------------------------------------------------------

    @property
    def resources(self) -> list[Bus]:
        """What is to be open before the first message."""
        return [self]

    @property
    def bound(self) -> list[BoundHandler]:
        """The loop of this bus's queue; none of one that only sends."""
        return [BusHandler(self)] if self._handlers else []

    @cached_property
    def consumer(self) -> Consumer:
        """The consumer of this bus's queue."""
        return self._make_consumer()

    def make_decider(self, consumer: Consumer, threads: Threads) -> HandlerFanOut:
        """The handlers, compiled for this consumer."""

        def make(handler: Handler, entry: Entry, answer: Answer | None) -> Dispatcher:
            return consumer.make_dispatcher(
                handler, entry.name, retry=entry.retry, on_error=self.on_error, answer=answer
            )

        check_middleware([*self.incoming, *self.outgoing])
        check_error_handler(self.on_error)
        self._handlers.check_shared(copies=consumer.features.error_queue, manually=consumer.ack == "manual")
        consumer.bindings = self._bindings()
        return HandlerFanOut(
            self._handlers,
            self._factory,
            make,
            incoming=[*self.incoming, *consumer.middleware],
            resolvers=resolvers({**self._provided, Bus: self}, self._factory, self, lambda: self.mandatory),
            provided=self._provided,
            threads=threads,
            sender=self,
            together=consumer.ack == "after",
            calls=consumer.features.reply,
            holds=self._style is not None and consumer.features.delay,
            failure_texts=self._failure_texts,
        )

    # --- small things ---------------------------------------------------------------------------

    def _make_sender(self, url: str | ProtocolSettings | None) -> Producer:
        name, client_id = self.queue or "streamtools", self._options["client_id"]
        sender = Producer(name, url=url, declare=False, client_id=client_id, send_timeout=self._send_timeout)
        sender.declares_exchanges = self._options.get("declare", True) is True
        return sender

    def _reply_rule(self, patterns: tuple[str, ...] | None) -> ReplyRule:
        name = self._options.get("error_queue", "error")
        never = [error_queue_of(name, self.queue)] if self.queue is not None else []
        return ReplyRule(self._sender.validate_reply, patterns, never)

    def _make_connections(self) -> Connections:
        name = self._options["client_id"] or self.queue or "streamtools"
        return Connections(Requests(name, self._url, self._options, self._style))

    def _replies(self) -> Requests:
        return self._connections.here().requests

    def _make_consumer(self) -> Consumer:
        return self._with_wrapper(Consumer(self._own(), url=self._url, **self._options))

    def _with_wrapper(self, consumer: Consumer) -> Consumer:
        if self._style is not None:
            self._style.install(consumer)
        return consumer

    def _share_with_pikabus(self, style: PikaBus) -> None:
        if self._options.get("ack", "after") != "after":
            raise ConfigurationError(
                "header_style='pikabus' goes with ack='after': what comes before its DeferredTime is put back."
            )
        style.install(self._sender)
        self._factory.topic = pikabus.TOPIC
        self._factory.source = self.queue or self._factory.source  # an address, as PikaBus has it
        self._options.update({**pikabus.consumer_options(self._sender.protocol), **self._options})
        if self._sender.features.topics:
            self._factory.direct = pikabus.DIRECT
            if self.queue is not None:
                self._subscriptions[Binding(self.queue, pikabus.DIRECT)] = None

    async def _bind_direct(self, queue: str) -> None:
        await (await self._get_admin()).bind(queue, queue, pikabus.DIRECT)

    def _own(self) -> str:
        if self.queue is None:
            raise ConfigurationError("This bus has no queue of its own: Bus('name', ...).")
        return self.queue

    def _bindings(self) -> list[Binding]:
        return list({**self._handlers.bindings, **self._subscriptions})

    def _note_bindings(self) -> None:
        """Have whoever consumes the queue make the same ones when it connects again."""
        if self.queue is None:
            return
        pulling = [
            here.pulling.get(self.queue) for here in [self._connections.here(), *self._connections.elsewhere()]
        ]
        for consumer in (self.consumer, *pulling):
            if consumer is not None:
                consumer.bindings = self._bindings()

    async def _get_admin(self) -> QueueAdmin:
        here = self._connections.here()
        async with here.opening_admin:
            if here.admin is None:
                here.admin = await ADMINS[self._sender.protocol](url=self._url).open()
            return here.admin

    def __repr__(self) -> str:
        return f"<Bus {self.queue or '(sends only)'} at {self._sender.settings.safe_url}>"
