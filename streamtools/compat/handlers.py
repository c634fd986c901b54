"""HandlerFactory: producer and consumer pairs from one configuration object."""

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
    """A producer and a consumer of one queue; each is made when it is first asked for.

    Parameters:
        queue_name: the queue's name.
        queue_type: the consumer's protocol, by registry name or alias.
        producer_type: the producer's, when it is another.
        url: the address for those of the two whose protocol it belongs to.

    Raises:
        ConfigurationError: the two protocols do not meet.
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
                f"Queue {queue_name!r}: a {self.producer_type!r} producer does not reach a {self.queue_type!r} "
                f"consumer. Give both one protocol, or put an HTTP producer in front (producer: 'HTTPHandler')."
            )

    @cached_property
    def producer(self) -> Producer:
        """The producer."""
        kind = PRODUCERS[self.producer_type]
        return kind(self.queue_name, url=self._url if _belongs(self._url, kind) else None)

    @cached_property
    def consumer(self) -> Consumer:
        """The consumer; decorate the handler with it: `@pair.consumer()`."""
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
    """Producer and consumer pairs by name.

    ```python
    handlers = HandlerFactory(
        {"queue_2": {"name": "queue_2", "consumer_loop": "RMQIOHandler", "producer": "RMQIOHandler"}}
    )
    await handlers["queue_2"].producer.send("hello")
    ```

    Parameters:
        queues: pair name -> {"name": queue, "consumer_loop": protocol, "producer": protocol}.
        url: the address for those whose protocol it belongs to.

    Raises:
        ConfigurationError: an entry lacks a key, has one too many, or its protocols do not meet.
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
        """What is to be open before the first message: the producers."""
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
        raise ConfigurationError(f"Pair {name!r} lacks 'consumer_loop': say which protocol its consumer speaks.")
    return HandleMsgs(entry.get("name", name), entry["consumer_loop"], producer_type=entry.get("producer"), url=url)


def _known(registry: Any, name: str) -> str:
    if name not in registry:
        registry[name]  # raises, naming the near ones
    return ALIASES.get(name, name)


def _belongs(url: str | ProtocolSettings | None, kind: Any) -> bool:
    if url is not None and not isinstance(url, str):
        return isinstance(url, kind.settings_class)
    return url is not None and url.partition(":")[0].lower() in kind.settings_class.schemes
