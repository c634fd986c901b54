"""ConsumerFactory: handlers by queue, with a decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Concatenate, Self, Unpack, overload

from streamtools.consumer import CONSUMER_LOOPS, BoundHandler, Consumer, P, Q, R
from streamtools.engine.dispatch import check_middleware
from streamtools.engine.functions.calling import name_of
from streamtools.errors import ConfigurationError
from streamtools.parameters import FactoryParameters, RouteParameters

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings


class Route(BoundHandler[P, R]):
    """A handler routed from a queue; its consumer is made when it is first asked for.

    Attributes:
        queue: the queue.
        options: the consumer's parameters.
    """

    def __init__(self, factory: ConsumerFactory, queue: str, function: Callable[P, R], options: dict[str, Any]):
        self.factory = factory
        self.queue = queue
        self.options = options
        self._describe(function)

    @cached_property
    def consumer(self) -> Consumer:  # type: ignore[override]
        """The consumer of this route."""
        return self.build()

    def build(self, url: str | ProtocolSettings | None = None) -> Consumer:
        """A consumer for this route; at `url` instead of the factory's address, if given."""
        consumer = self.factory.make(self.queue, self.options, url)
        consumer.handler = self
        return consumer

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self: Route[Concatenate[Any, Q], R], instance: object, owner: type | None = None) -> Route[Q, R]: ...
    def __get__(self, instance: object, owner: type | None = None) -> BoundHandler:
        if instance is None:
            return self
        bound = Route(self.factory, self.queue, self.function.__get__(instance, owner), self.options)
        return self._bind(bound, instance, owner)


class ConsumerFactory:
    """Makes a consumer for each routed handler.

    ```python
    consumers = ConsumerFactory(url="amqp://localhost")

    @consumers.route("orders", concurrency=8)
    async def order(msg: Order): ...

    ConsumerRunner(consumers).run()
    ```

    Parameters:
        queue_type: the protocol by name, such as `HTTP`; by the URL when None.
        url: the address, or a settings object; see `streamtools.settings`.
        port: the port to listen at, for protocols that do so (HTTP); others ignore it.
        host: the host to listen at, for the same protocols.
        options: parameters for every consumer, as for `Consumer`.

    Raises:
        UnknownProtocol: no protocol has this name.
    """

    def __init__(
        self,
        queue_type: str | None = None,
        *,
        url: str | ProtocolSettings | None = None,
        port: int | None = None,
        host: str | None = None,
        **options: Unpack[FactoryParameters],
    ) -> None:
        if queue_type is not None and queue_type not in CONSUMER_LOOPS:
            CONSUMER_LOOPS[queue_type]  # raises, naming the near ones
        self.queue_type = queue_type
        self.url = url
        self.options: dict[str, Any] = {"port": port, "host": host, **options}
        if "middleware" in options:
            self.options["middleware"] = check_middleware(options["middleware"])  # for each consumer anew
        #: One for each decorated handler, in the order of decoration.
        self.handlers: list[Route] = []

    def route(self, queue: str, **options: Unpack[RouteParameters]) -> Callable[[Callable[P, R]], Route[P, R]]:
        """Register a handler for a queue; nothing connects yet.

        Parameters:
            queue: the queue's name. A queue has one handler (over HTTP: one for each method).
            options: parameters for this consumer, as for `Consumer`; they win over the factory's, and
                `middleware` goes inside the factory's.

        Raises:
            ConfigurationError: this is not a queue's name, or the queue has a handler already.
        """
        if not isinstance(queue, str):
            # `@consumers.route` alone would take the handler for the queue, and nobody would ever run it.
            raise ConfigurationError(
                f"route() wants the queue's name, not {queue!r}: write @consumers.route('orders')."
            )
        key = (queue, options.get("method"), options.get("group"))

        def decorate(function: Any) -> Any:
            for other in self.handlers:
                if (other.queue, other.options.get("method"), other.options.get("group")) == key:
                    raise ConfigurationError(
                        f"The queue {queue!r} has the handler {other.name} already, so {name_of(function)} cannot "
                        "have it too; route it from another queue."
                    )
            handler = Route(self, queue, function, self._with(options))
            self.handlers.append(handler)
            return handler

        return decorate

    def _with(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The factory's options, with those of one route."""
        if "middleware" not in options:
            return {**self.options, **options}
        middleware = [*self.options.get("middleware", ()), *check_middleware(options["middleware"])]
        return {**self.options, **options, "middleware": middleware}

    @property
    def instances(self) -> list[Consumer]:
        """The consumers, one for each handler; made when first asked for."""
        return [handler.consumer for handler in self.handlers]

    def make(self, queue: str, options: dict[str, Any], url: str | ProtocolSettings | None = None) -> Consumer:
        """A consumer of this factory's protocol and address, or of `url`'s."""
        if url is None and self.queue_type is not None:
            return CONSUMER_LOOPS[self.queue_type](queue, url=self.url, **options)
        return Consumer(queue, url=url or self.url, **options)
