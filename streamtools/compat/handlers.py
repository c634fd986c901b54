"""HandlerFactory: makes pairs of a producer and a consumer from one configuration object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streamtools.consumer import CONSUMER_LOOPS, BoundHandler, Consumer
from streamtools.errors import ConfigurationError, suggest
from streamtools.producer import PRODUCERS, Producer
from streamtools.protocols import ALIASES, HTTP

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings


class HandleMsgs:
    """A producer and a consumer of one queue; each is made at its first use.

    Parameters:
        queue_name: the queue's name.
        queue_type: the protocol of the consumer, by its name in the registry or by an alias.
        producer_type: the protocol of the producer, if it is another one.
        url: the address; the producer or the consumer uses it only if it is of that one's protocol.

    Raises:
        ConfigurationError: a producer of one protocol cannot send to a consumer of the other.
        UnknownProtocol: no protocol has this name.
    """

    def __init__(
        self,
        queue_name: str,
        queue_type: str,
        *,
        producer_type: str | None = None,
        url: str | ProtocolSettings | None = None,
    ) -> None:
        self.queue_name = queue_name
        self.queue_type: str = _known(CONSUMER_LOOPS, queue_type)
        self.producer_type: str = _known(PRODUCERS, producer_type or queue_type)
        self._url = url
        if self.producer_type not in (self.queue_type, HTTP):
            raise ConfigurationError(
                f"Queue {queue_name!r}: a {self.producer_type!r} producer cannot send to a {self.queue_type!r} "
                f"consumer. Give both the same protocol, or use an HTTP producer (producer: 'HTTPHandler')."
            )

    @cached_property
    def producer(self) -> Producer:
        """The producer."""
        kind = PRODUCERS[self.producer_type]
        return kind(self.queue_name, url=self._url if _belongs(self._url, kind) else None)

    @cached_property
    def consumer(self) -> Consumer:
        """The consumer; its decorator `@pair.consumer()` takes the handler."""
        kind = CONSUMER_LOOPS[self.queue_type]
        return kind(self.queue_name, url=self._url if _belongs(self._url, kind) else None)

    @property
    def consumer_loop(self) -> Consumer:
        """The same as `consumer`."""
        return self.consumer

    async def a_init(self) -> None:
        """Open both. Safe to repeat.

        Raises:
            ConnectError: a broker cannot be reached.
        """
        await self.consumer.open()
        await self.producer.open()

    async def close(self) -> None:
        """Close both. Safe to repeat."""
        try:
            await self.producer.close()
        finally:
            await self.consumer.close()


class HandlerFactory(Mapping[str, HandleMsgs]):
    """Pairs of a producer and a consumer, by name.

    ```python
    handlers = HandlerFactory(
        {"queue_2": {"name": "queue_2", "consumer_loop": "RMQIOHandler", "producer": "RMQIOHandler"}}
    )
    await handlers["queue_2"].producer.send("hello")
    ```

    Parameters:
        queues: pair name -> {"name": queue, "consumer_loop": protocol, "producer": protocol}.
        url: the address, for all producers and consumers of its protocol.

    Raises:
        ConfigurationError: an entry lacks a key, has an unknown key, or its producer cannot send to its consumer.
        UnknownProtocol: no protocol has this name.
    """

    def __init__(self, queues: Mapping[str, Mapping[str, str]], *, url: str | ProtocolSettings | None = None) -> None:
        self.handlers: dict[str, HandleMsgs] = {name: _pair(name, entry, url) for name, entry in queues.items()}

    def __getitem__(self, name: str) -> HandleMsgs:
        try:
            return self.handlers[name]
        except KeyError:
            raise KeyError(f"No pair is named {name!r}. {suggest(name, self.handlers)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.handlers)

    def __len__(self) -> int:
        return len(self.handlers)

    async def a_init(self) -> None:
        """Open every pair. Safe to repeat."""
        for pair in self.handlers.values():
            await pair.a_init()

    async def close(self) -> None:
        """Close every pair. Safe to repeat."""
        for pair in self.handlers.values():
            await pair.close()

    @property
    def resources(self) -> list[Producer]:
        """The producers, which a runner opens before the first message."""
        return [pair.producer for pair in self.handlers.values()]

    @property
    def bound(self) -> list[BoundHandler]:
        """The handlers decorated with the pairs' consumers."""
        return [h for pair in self.handlers.values() if (h := pair.consumer.handler) is not None]


def _pair(name: str, entry: Mapping[str, str], url: str | ProtocolSettings | None) -> HandleMsgs:
    keys = {"name", "consumer_loop", "producer"}
    for key in entry:
        if key not in keys:
            raise ConfigurationError(f"Pair {name!r} has the unknown key {key!r}. {suggest(key, keys)}")
    if "consumer_loop" not in entry:
        raise ConfigurationError(f"Pair {name!r} lacks 'consumer_loop': name the protocol of its consumer.")
    return HandleMsgs(entry.get("name", name), entry["consumer_loop"], producer_type=entry.get("producer"), url=url)


def _known(registry: Any, name: str) -> str:
    if name not in registry:
        registry[name]  # raises an error that suggests similar names
    return ALIASES.get(name, name)


def _belongs(url: str | ProtocolSettings | None, kind: Any) -> bool:
    if url is not None and not isinstance(url, str):
        return isinstance(url, kind.settings_class)
    return url is not None and url.partition(":")[0].lower() in kind.settings_class.schemes
