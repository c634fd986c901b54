"""Subscriptions: the topics whose messages come into the queue of a bus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamtools.bus.contracts import Command, Contract, Event, check_contract
from streamtools.bus.message_factory import MessageFactory
from streamtools.errors import ConfigurationError
from streamtools.exchange import Binding, Exchange
from streamtools.validation.checks import check_topic

#: What `subscribe` takes: a topic, or an event whose topic it is.
Subscription = str | type[Event]
#: One, or several.
Topics = Subscription | Iterable[Subscription] | Iterable[Subscription | Iterable[Subscription]]


class Subscriptions:
    """The bindings of a bus's queue: those that its handlers need, and those that were asked for.

    Parameters:
        factory: says what the queue and the exchange of events are, and whether the protocol has exchanges.
        topics: those that are asked for from the start.

    Raises:
        ConfigurationError: one is neither a topic nor an event.
        FeatureError: the protocol has no exchanges.
    """

    def __init__(self, factory: MessageFactory, topics: Topics = ()) -> None:
        self._factory = factory
        self._bindings: dict[Binding, None] = dict.fromkeys(_bindings(topics, factory.topic))
        if self._bindings:
            factory.need_topics()
        if factory.direct is not None and factory.queue is not None:  # PikaBus sends to a queue by an exchange
            self.add(Binding(factory.queue, factory.direct))

    def __iter__(self) -> Iterator[Binding]:
        return iter(tuple(self._bindings))

    def add(self, binding: Binding) -> None:
        """Note that the queue is to have this binding."""
        self._bindings[binding] = None

    def remove(self, bindings: Iterable[Binding]) -> None:
        """Note that the queue is to have these bindings no longer."""
        for binding in bindings:
            self._bindings.pop(binding, None)

    def add_contract(self, contract: type[Contract], exchange: Exchange | None) -> None:
        """Add the binding that a handler needs: an event's topic, or the way to a command's queue by an exchange.

        Raises:
            FeatureError: the protocol has no exchanges.
        """
        if issubclass(contract, Event):
            binding = Binding(contract.__terms__.topic, exchange or self._factory.topic)
        elif exchange is not None and self._factory.queue is not None:
            binding = Binding(self._factory.queue, exchange)
        else:
            return
        self._factory.need_topics()
        self.add(binding)

    def read(self, topics: Topics, exchange: Exchange | None = None) -> list[Binding]:
        """The bindings that topics stand for, as a user has given them.

        Parameters:
            exchange: the exchange of events when None.

        Raises:
            ConfigurationError: one is neither a topic nor an event.
            FeatureError: the protocol has no exchanges.
        """
        self._factory.need_topics()
        exchange = exchange or self._factory.topic
        if found := _bindings(topics, exchange):
            return found
        if exchange.type == "fanout":
            return [Binding("", exchange)]
        raise ConfigurationError(
            "No topic is given: bus.subscribe('orders.#'), or an event. Only a fanout exchange needs none."
        )


def _bindings(topics: Topics, exchange: Exchange) -> list[Binding]:
    if isinstance(topics, Iterable) and not isinstance(topics, str | type):
        return [binding for topic in topics for binding in _bindings(topic, exchange)]
    return [Binding(_topic(topics), exchange)]


def _topic(topic: object) -> str:
    if isinstance(topic, str):
        return check_topic(topic)
    if isinstance(topic, type) and issubclass(topic, Event):
        check_contract(topic)
        return topic.__terms__.topic
    if isinstance(topic, type) and issubclass(topic, Command):
        raise ConfigurationError(
            f"{topic.__name__} is a command, which nobody subscribes to: send() brings it to its owner's queue."
        )
    raise ConfigurationError(f"{topic!r} is neither a topic nor an Event.")
