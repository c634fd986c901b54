"""Transport: the producer, the consumers, the administrator and the reply queue of a bus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streamtools.admin import ADMINS, QueueAdmin
from streamtools.bus.connections import Connections
from streamtools.bus.requests import Requests
from streamtools.compat import pikabus
from streamtools.compat.pikabus import PikaBus
from streamtools.consumer import Consumer
from streamtools.engine.tasks.eventloops import PerLoop
from streamtools.errors import ConfigurationError
from streamtools.exchange import Binding
from streamtools.producer import Producer
from streamtools.protocols import QUEUE_OPTIONS

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings


class Transport:
    """What a bus sends and receives by, at one address.

    Parameters:
        queue: the bus's own queue; None for a bus that only sends.
        url: the address, or a settings object.
        options: of the consumer of the queue. The producer and the reply queue take some of them.
        send_timeout: seconds for which the producer keeps trying if the connection is lost.
        prefix: the first word of PikaBus's headers, for a bus that writes them; None for our own headers.

    Attributes:
        sender: the producer of everything that is sent.
        style: writes and reads PikaBus's headers; None for our own headers.
        connections: what is open in each event loop.
    """

    def __init__(
        self,
        queue: str | None,
        url: str | ProtocolSettings | None,
        options: Mapping[str, Any],
        *,
        send_timeout: float,
        prefix: str | None,
    ) -> None:
        self.queue = queue
        self.url = url
        name, client_id = queue or "streamtools", options["client_id"]
        self.sender: Producer = Producer(name, url=url, declare=False, client_id=client_id, send_timeout=send_timeout)
        self.sender.declares_exchanges = options.get("declare", True) is True
        self.options: dict[str, Any] = {**options}
        self._prefix = prefix
        self.style: PikaBus | None = None if prefix is None else self._use_pikabus(prefix)
        self.connections: PerLoop[Connections] = PerLoop(
            lambda: Connections(Requests(client_id or name, url, self.options, self.style))
        )
        if queue is not None:
            _ = self.consumer  # an option that cannot work is an error now

    def _use_pikabus(self, prefix: str) -> PikaBus:
        if self.options.get("ack", "after") != "after":
            raise ConfigurationError(
                "header_style='pikabus' goes with ack='after': what comes before its DeferredTime is put back."
            )
        style = PikaBus(prefix, self._bind_direct)
        style.install(self.sender)
        self.options = {**pikabus.consumer_options(self.sender.protocol), **self.options}
        return style

    async def _bind_direct(self, queue: str) -> None:
        await (await self.admin()).bind(queue, queue, pikabus.DIRECT)

    def moved(self, url: str) -> Transport:
        """The same at another address, where messages are sent without PikaBus's headers: for tests."""
        there = Transport(self.queue, url, self.options, send_timeout=self.sender.send_timeout, prefix=self._prefix)
        there.sender.wrapper = None
        return there

    @property
    def own_queue(self) -> str:
        """The bus's own queue.

        Raises:
            ConfigurationError: it has none.
        """
        if self.queue is None:
            raise ConfigurationError("This bus has no queue of its own: Bus('name', ...).")
        return self.queue

    # --- consumers ------------------------------------------------------------------------------

    @cached_property
    def consumer(self) -> Consumer:
        """The consumer of the bus's own queue, which the handlers belong to."""
        return self._make_consumer(self.own_queue, self.options)

    def pulling(self, queue: str, bindings: Iterable[Binding]) -> Consumer:
        """The consumer to receive from a queue by hand, in the running event loop.

        Parameters:
            bindings: of the bus's own queue.
        """
        pulling = self.connections.here().pulling
        if queue not in pulling:
            own = queue == self.queue
            pulling[queue] = self._make_consumer(queue, self.options if own else {"declare": False})
            if own:
                pulling[queue].bindings = list(bindings)
        return pulling[queue]

    def _make_consumer(self, queue: str, options: Mapping[str, Any]) -> Consumer:
        consumer = Consumer(queue, url=self.url, **options)
        if self.style is not None:
            self.style.install(consumer)
        return consumer

    # --- the queue at the broker ----------------------------------------------------------------

    async def admin(self) -> QueueAdmin:
        """The administrator of the running event loop, open."""
        here = self.connections.here()
        async with here.opening_admin:
            if here.admin is None:
                here.admin = await ADMINS[self.sender.protocol](url=self.url).open()
            return here.admin

    async def declare(self, bindings: Iterable[Binding]) -> None:
        """Create the bus's own queue, unless `declare` says not to, and bind it.

        Raises:
            ConfigurationError: the bus has no queue of its own.
            QueueError: the queue exists with other arguments.
        """
        queue, admin = self.own_queue, await self.admin()
        if self.consumer.declare is True:
            await admin.create(queue, **{n: v for n, v in self.options.items() if n in QUEUE_OPTIONS})
        for binding in bindings:
            await admin.bind(queue, binding.topic, binding.exchange)

    def rebind(self, bindings: Iterable[Binding]) -> None:
        """Have every consumer of the bus's own queue bind it like this when it connects again."""
        if self.queue is None:
            return
        wanted = list(bindings)
        pulling = (here.pulling.get(self.queue) for here in self.connections.everywhere())
        for consumer in (self.consumer, *pulling):
            if consumer is not None:
                consumer.bindings = wanted

    async def close(self) -> None:
        """Close what is open in the running event loop. Safe to repeat."""
        await self.connections.here().close()
        await self.sender.close()
