"""Bus: sends commands to their owner, events to all subscribers, and replies to the requester."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from streamtools.bus.context import resolvers
from streamtools.bus.contracts import Command, Contract
from streamtools.bus.fan_out import HandlerFanOut
from streamtools.bus.handler_registry import HandlerRegistry
from streamtools.bus.message_factory import MessageFactory
from streamtools.bus.message_sender import MessageSender
from streamtools.bus.subscriptions import Subscription, Subscriptions
from streamtools.bus.transport import Transport
from streamtools.compat.pikabus import HeaderStyle
from streamtools.consumer import BoundHandler, Consumer
from streamtools.delivery import Delivery
from streamtools.engine.dispatch import as_list, check_error_handler, check_middleware
from streamtools.engine.replies import check_patterns
from streamtools.engine.tasks.threads import Threads
from streamtools.errors import ConfigurationError
from streamtools.exchange import Exchange
from streamtools.parameters import BusParameters
from streamtools.receipt import Receipt
from streamtools.retry import Retry, check_retry
from streamtools.runner import ConsumerRunner
from streamtools.types import ErrorHandler, Middleware
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
        subscriptions: topics or events that the queue receives in addition to those of its handlers.
        mandatory: publishing is an error if nobody has subscribed.
        retry: the policy for handlers that fail.
        on_error: decides about failures: async (message, error, attempt) -> verdict, or None to let `retry` decide.
        incoming: middleware around every handler, outermost first.
        outgoing: middleware for everything that is sent, outermost first.
        header_style: "pikabus" to share a broker with services of PikaBus. The bus then writes and reads the headers
            of PikaBus, and uses its exchanges if no exchange is given.
        header_prefix: the first word of those headers.
        client_id: the name of this service, in its messages and in the broker's list of connections.
        send_timeout: seconds for which `send` keeps trying if the connection is lost.
        content_type: the format of payloads, for which `register_codec` was called; JSON when None.
        replies: patterns, such as "*.replies.*"; a reply goes only to an address that matches one of them. None
            allows every queue that may get replies.
        failure_texts: the reply to a failed request has the text of the error, not only its class.
        options: further parameters of the queue's `Consumer`.

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
        header_style: HeaderStyle | None = None,
        header_prefix: str = "PikaBus",
        client_id: str | None = None,
        send_timeout: float = 30.0,
        content_type: str | None = None,
        replies: Iterable[str] | None = None,
        failure_texts: bool = False,
        **options: Unpack[BusParameters],
    ) -> None:
        check_choice("header_style", header_style, (None, "pikabus"))
        prefix = header_prefix if header_style is not None else None
        settings: dict[str, Any] = {**options, "retry": retry, "client_id": client_id}
        transport = Transport(queue, url, settings, send_timeout=send_timeout, prefix=prefix)
        factory = MessageFactory(transport, client_id, content_type, check_patterns(replies))
        super().__init__(factory, transport, mandatory=mandatory, outgoing=as_list(outgoing, "outgoing"))
        self.queue = queue
        #: Middleware around every handler, outermost first; add, reorder, replace before the bus starts.
        self.incoming: list[Middleware] = as_list(incoming, "incoming")
        self.on_error = on_error
        self._failure_texts = failure_texts
        self._subscriptions = Subscriptions(factory, subscriptions)
        if any(self._subscriptions):
            _ = transport.own_queue  # an error if there is none
        self._handlers = HandlerRegistry(factory.contracts, self._subscriptions)

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
            exchange: for an event, the exchange that the queue is bound to; for a command, an exchange that brings
                it to the queue by the queue's name.

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
            exchange: for an event, the exchange that the queue is bound to; for a command, an exchange that brings
                it to the queue by the queue's name.

        Raises:
            ConfigurationError: as for `handler`, or a class without `handle`.
        """
        self._add_handler(handler, contract=contract, retry=retry, exchange=exchange)

    def _add_handler(self, function: Callable[..., Any], **terms: Any) -> None:
        if self.consumer.connected:
            raise ConfigurationError(
                f"{self!r} runs already, with the handlers that it had: register before it starts."
            )
        if terms["retry"] is not None:
            check_retry(terms["retry"])
        self._handlers.add(function, **terms)

    def provide(self, value: Any, type: type | None = None) -> None:  # noqa: A002
        """Give this value to every parameter of its type, in handlers and in constructors of handler classes.

        Call it before the bus starts.

        Parameters:
            type: the type of these parameters, if it is not the value's own.
        """
        self._handlers.provided[type or value.__class__] = value

    def route(self, command: type[Command], to: str, *, exchange: Exchange | None = None) -> None:
        """Say where commands of this class go, if neither the call nor the class does.

        Parameters:
            to: a queue; a routing key, with an exchange.

        Raises:
            ConfigurationError: it is not a command, or its destination is impossible.
        """
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
        bindings = self._subscriptions.read(topics, exchange)
        own = queue in (None, self.queue)
        if own and self._transport.connections.here().runner is None:
            await self.declare()
        admin = await self._transport.admin()
        for binding in bindings:
            await admin.bind(queue or self._transport.own_queue, binding.topic, binding.exchange)
            if own:
                self._subscriptions.add(binding)
        self._transport.rebind(self._subscriptions)

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
        bindings = self._subscriptions.read(topics, exchange)
        admin = await self._transport.admin()
        if queue in (None, self.queue):
            self._subscriptions.remove(bindings)
        self._transport.rebind(self._subscriptions)  # first: a new connection must not bind them again
        for binding in bindings:
            await admin.unbind(queue or self._transport.own_queue, binding.topic, binding.exchange)

    async def declare(self) -> None:
        """Create this bus's queue and its subscriptions, without receiving. Safe to repeat.

        With the option `declare=False` the bus does not create the queue.

        Raises:
            ConfigurationError: this bus has no queue of its own.
            QueueError: the queue exists with other arguments.
        """
        await self._transport.declare(self._subscriptions)

    async def cancel(self, receipt: Receipt) -> bool:
        """Cancel a deferred message. Returns False if it is already due, or unknown.

        Raises:
            FeatureError: the protocol cannot cancel it.
        """
        return await (await self._transport.admin()).cancel(receipt.queue, receipt.id)

    # --- receiving by hand ----------------------------------------------------------------------

    async def receive(
        self,
        queue: str | None = None,
        max_messages: int = 1,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> list[Delivery]:
        """Receive messages by hand, from this bus's own queue or another; see `Consumer.receive`."""
        consumer = self._transport.pulling(queue or self._transport.own_queue, self._subscriptions)
        return await consumer.receive(max_messages, timeout=timeout)

    # --- lifetime -------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Connect, create the queue, and run the handlers if there are any. Safe to repeat, also after `stop()`.

        Raises:
            ConnectError: the broker cannot be reached, or refuses us.
        """
        here = self._transport.connections.here()
        async with here.starting:
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
        """Finish the messages in hand and disconnect. Call it in the event loop of `start`. Safe to repeat.

        Raises:
            ConfigurationError: it runs in another event loop.
        """
        here = self._transport.connections.here()
        if here.runner is None and any(other.runner is not None for other in self._transport.connections.elsewhere()):
            raise ConfigurationError(
                f"{self!r} runs in another event loop: stop it there, as in "
                "asyncio.run_coroutine_threadsafe(bus.stop(), its_loop)."
            )
        async with here.starting:
            runner, here.runner = here.runner, None
            try:
                if runner is not None:
                    await runner.__aexit__(None, None, None)
            finally:
                await self.close()

    async def open(self) -> Self:
        """Connect for sending, without running the handlers. Safe to repeat."""
        check_middleware(self.outgoing, "outgoing")
        await self._transport.sender.open()
        return self

    async def close(self) -> None:
        """Close all connections that this bus has in the running event loop. Safe to repeat."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- for the runner -------------------------------------------------------------------------

    @property
    def resources(self) -> list[Bus]:
        """What a runner opens before the first message."""
        return [self]

    @property
    def bound(self) -> list[BoundHandler]:
        """All handlers as one handler for a runner; an empty list without handlers."""
        return [BusHandler(self)] if self._handlers else []

    @property
    def consumer(self) -> Consumer:
        """The consumer of this bus's queue."""
        return self._transport.consumer

    def make_decider(self, consumer: Consumer, threads: Threads) -> HandlerFanOut:
        """The handlers, compiled for this consumer."""
        check_middleware([*self.incoming, *self.outgoing])
        check_error_handler(self.on_error)
        self._handlers.check_shared(copies=consumer.features.error_queue, manually=consumer.ack == "manual")
        consumer.bindings = [*self._subscriptions]
        return HandlerFanOut(
            self._handlers,
            self._factory,
            consumer,
            incoming=[*self.incoming, *consumer.middleware],
            on_error=self.on_error,
            resolvers=resolvers({**self._handlers.provided, Bus: self}, self._factory, self),
            threads=threads,
            sender=self,
            holds=self._transport.style is not None,
            failure_texts=self._failure_texts,
        )

    def __repr__(self) -> str:
        return f"<Bus {self.queue or '(sends only)'} at {self._transport.sender.settings.safe_url}>"


class BusHandler(BoundHandler):
    """All handlers of a bus as one handler, for a runner."""

    def __init__(self, bus: Bus) -> None:
        self.bus: Bus = bus
        self.consumer: Consumer = bus.consumer
        self.name: str = f"bus {bus.queue}"

    def make_decider(self, consumer: Consumer, threads: Threads) -> HandlerFanOut:
        """The handlers of the bus, compiled."""
        return self.bus.make_decider(consumer, threads)

    def __repr__(self) -> str:
        return f"<loop of {self.bus!r}>"
