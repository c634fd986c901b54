"""HandlerRegistry: the handlers of a bus, by the name of what they handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from streamtools.bus.contracts import Command, Contract, Event, contracts_in, payload_for
from streamtools.codec import bare
from streamtools.delivery import Delivery
from streamtools.engine.functions.calling import check_function, check_handler, name_of, undecorated
from streamtools.engine.functions.invoke import asks_for, hints_of, parts_of, payload_type
from streamtools.errors import ConfigurationError, FeatureError
from streamtools.exchange import TOPIC, Binding, Exchange
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.validation.checks import check_topic

#: Annotations of a first parameter that takes whatever has no typed handler.
CATCH_ALL: Final = (dict, bytes, Message, Any, object)


#: `type`, where a parameter has that name.
_Class: Final = type

#: What `subscribe` takes: a topic, or an event whose topic it is.
Subscription = str | type[Event]
#: One, or several.
Subscriptions = Subscription | Iterable[Subscription] | Iterable[Subscription | Iterable[Subscription]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One handler of one type.

    Attributes:
        name: its own, which copies for a retry carry.
        type: the name on the wire; None for a catch-all.
        payload: what its body is decoded to; None where the function's annotation says.
        function: the handler; a class with `handle`, of which there is a fresh instance for each message.
        retry: replaces the bus's policy.
    """

    name: str
    type: str | None
    payload: Any
    function: Callable[..., Any]
    retry: Retry | None


class HandlerRegistry:
    """The handlers of a bus, and the topics that they need.

    Parameters:
        queue: the bus's.
        topic: the exchange of events.
    """

    def __init__(self, queue: str | None, topic: Exchange = TOPIC) -> None:
        self._queue = queue
        self._topic = topic
        self._by_type: dict[str | None, list[Entry]] = {}
        self._contracts: dict[str, type[Contract]] = {}
        #: Topics of the events that are handled, and where commands come in by an exchange.
        self.bindings: dict[Binding, None] = {}

    def __bool__(self) -> bool:
        return bool(self._by_type)

    def __iter__(self) -> Any:
        return (entry for entries in self._by_type.values() for entry in entries)

    def find(self, type: str | None) -> list[Entry]:  # noqa: A002 - the field's name everywhere
        """The handlers for this type; the catch-alls where there are none."""
        return self._by_type.get(type) or self._by_type.get(None, [])

    def known(self) -> list[str]:
        """The names that have a handler of their own."""
        return sorted(name for name in self._by_type if name is not None)

    def contract(self, name: str | None) -> type[Contract] | None:
        """The contract of this name, where one is known here."""
        return self._contracts.get(name or "")

    def know(self, contract: type[Contract]) -> None:
        """Remember a contract by its name.

        Raises:
            ConfigurationError: another one has it already, or it is the base of all.
        """
        check_contract(contract)
        other = self._contracts.setdefault(contract.__terms__.name, contract)
        if not _same(contract, other):
            raise ConfigurationError(
                f"{_where(contract)} and {_where(other)} are both called {contract.__terms__.name!r} on the wire: "
                f'give one of them another name, class {contract.__name__}(..., name="...").'
            )

    def check_shared(self, *, copies: bool, manually: bool) -> None:
        """Several handlers of one message have a verdict each; their retries are copies that name them.

        Parameters:
            copies: a failed message can be copied; otherwise it stays with its sender, as a whole.
            manually: handlers acknowledge, which is the whole message too.

        Raises:
            ConfigurationError: that cannot be.
        """
        for type_, entries in self._by_type.items():
            if len(entries) < 2:
                continue
            names = " and ".join(entry.name for entry in entries)
            what = "what has no other handler" if type_ is None else repr(type_)
            if not copies:
                raise FeatureError(
                    f"{names} both handle {what}, and here a message that failed stays with its sender, so "
                    "that neither can be retried without the other: have one handler, which calls both."
                )
            if manually or any(asks_for(_as_function(entry.function), Delivery) for entry in entries):
                raise ConfigurationError(
                    f"{names} both handle {what}, so none of them settles it by hand: take Message instead of "
                    "Delivery, leave ack='manual' away, and raise Reject, RetryLater or Drop."
                )

    def add(
        self,
        function: Callable[..., Any],
        *,
        contract: type[Contract] | None = None,
        type: str | None = None,  # noqa: A002
        retry: Retry | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Register a handler: by `contract`, by `type`, or by what its first parameter says.

        Raises:
            ConfigurationError: it says nothing that can be handled, or a command has a handler already.
        """
        function = undecorated(function)
        if not isinstance(function, _Class):
            check_handler(function)
        annotation = payload_type(_as_function(function))
        name = name_of(function)
        contracts = contracts_in(annotation) if contract is None else self._registered(contract, annotation, name)
        if exchange is not None and (type is not None or not contracts):
            raise ConfigurationError(
                f"The handler {name} has an exchange= but no contract that names a topic: bus.subscribe() to it."
            )
        if type is not None:
            return self._add(Entry(name, type, contract, function, retry))
        if not contracts:
            plain = bare(annotation)
            if plain not in CATCH_ALL and getattr(plain, "__origin__", None) is not dict:
                raise ConfigurationError(
                    f"The handler {name} wants {annotation!r}, which is neither a Command nor an Event: annotate its "
                    "first parameter with one, with dict to take what has no handler, or give type='...'."
                )
            return self._add(Entry(name, None, None, function, retry))
        for each in contracts:
            payload = payload_for(each, annotation)
            self._add_contract(each, Entry(name, each.__terms__.name, payload, function, retry), exchange)

    def _registered(self, contract: object, annotation: Any, name: str) -> tuple[type[Contract]]:
        """What a handler is registered for, which its annotation must not contradict."""
        if not isinstance(contract, type) or not issubclass(contract, Contract):
            raise ConfigurationError(
                f"{name} is registered for {contract!r}, which is neither a Command nor an Event: "
                "bus.register(PlaceOrder, handler)."
            )
        wanted = contracts_in(annotation)
        if wanted and not any(issubclass(contract, each) or _same(contract, each) for each in wanted):
            raise ConfigurationError(
                f"{name} is registered for {contract.__name__} and wants {wanted[0].__name__}: annotate its first "
                "parameter with what it is registered for."
            )
        return (contract,)

    def _add_contract(self, contract: type[Contract], entry: Entry, exchange: Exchange | None) -> None:
        self.know(contract)
        self._add(entry)
        if issubclass(contract, Event):
            self.bindings[Binding(contract.__terms__.topic, exchange or self._topic)] = None
        elif exchange is not None and self._queue is not None:
            self.bindings[Binding(self._queue, exchange)] = None

    def _add(self, entry: Entry) -> None:
        others = self._by_type.setdefault(entry.type, [])
        if others and issubclass(self.contract(entry.type) or Event, Command):
            raise ConfigurationError(
                f"The command {entry.type!r} has the handler {others[0].name} already, and a command has one; "
                f"{entry.name} cannot have it too."
            )
        if any(other.name == entry.name for other in others):
            raise ConfigurationError(
                f"Two handlers of {entry.type or 'what has no other handler'} are called {entry.name}: a retry is "
                "addressed by that name, so rename one."
            )
        others.append(entry)


def of_class(handler: type, provided: Mapping[type, Any]) -> Callable[..., Any]:
    """A handler function for a class: a fresh instance for each message, its `handle` called.

    Parameters:
        provided: type -> what a constructor's argument of that type is.

    Raises:
        ConfigurationError: it has no `handle`, or a constructor parameter that nothing provides.
    """
    method = _handle_of(handler)
    arguments = _arguments(handler, provided)

    async def handle(*args: Any, **kwargs: Any) -> Any:
        return await handler(**arguments).handle(*args, **kwargs)

    def handle_in_thread(*args: Any, **kwargs: Any) -> Any:
        return handler(**arguments).handle(*args, **kwargs)

    return _as_method(handler, handle if inspect.iscoroutinefunction(method) else handle_in_thread)


def _as_function(handler: Callable[..., Any]) -> Callable[..., Any]:
    return _as_method(handler, lambda: None) if isinstance(handler, type) else handler


def _handle_of(handler: type) -> Callable[..., Any]:
    method = getattr(handler, "handle", None)
    if not inspect.isfunction(method) or inspect.isabstract(handler):
        raise ConfigurationError(
            f"{handler.__qualname__} has no method to handle with: def handle(self, command): ..."
        )
    check_function(method, "handler", "async def handle(self, command): ..., without yield")
    return method


def _as_method(handler: type, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, looking like the class's `handle` once it is bound."""
    method, looking = _handle_of(handler), cast("Any", function)
    signature = inspect.signature(method)
    looking.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])
    looking.__annotations__ = hints_of(method)
    looking.__qualname__ = handler.__qualname__
    return function


def _arguments(handler: type, provided: Mapping[type, Any]) -> dict[str, Any]:
    if handler.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    hints = hints_of(handler.__init__, provided)  # type: ignore[misc]
    arguments = {}
    for parameter in inspect.signature(handler).parameters.values():
        kind: Any = hints.get(parameter.name)
        given = [provided[part] for part in parts_of(kind) if part in provided]
        if given:
            arguments[parameter.name] = given[0]
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in _VARIABLE:
            raise ConfigurationError(
                f"{handler.__qualname__} wants {parameter.name}: {getattr(kind, '__name__', kind) or 'something'}, "
                "which nothing provides: bus.provide(...)."
            )
    return arguments


_VARIABLE: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_contract(contract: type[Contract]) -> None:
    """A contract, not the base of all.

    Raises:
        ConfigurationError: it is that.
    """
    if not contract.__terms__.name:
        raise ConfigurationError(
            f"{contract.__name__} is the base of contracts, and none itself: name a class of yours; dict takes what "
            "has no handler, and '#' is every topic."
        )


def _same(one: type[Contract], other: type[Contract]) -> bool:
    """One contract, or one that is imported from two packages."""
    if one is other:
        return True
    if (one.__qualname__, one.__terms__) != (other.__qualname__, other.__terms__):
        return False
    return one.model_json_schema() == other.model_json_schema()


def _where(contract: type) -> str:
    return f"{contract.__module__}.{contract.__qualname__}"


def bindings_of(topics: Subscriptions, exchange: Exchange) -> list[Binding]:
    """The bindings of these topics.

    Raises:
        ConfigurationError: neither a topic nor an event.
    """
    if isinstance(topics, Iterable) and not isinstance(topics, str | type):
        return [binding for topic in topics for binding in bindings_of(topic, exchange)]
    return [Binding(_topic(topics), exchange)]


def bindings_given(topics: Subscriptions, exchange: Exchange) -> list[Binding]:
    """As `bindings_of`; a fanout exchange needs no topic.

    Raises:
        ConfigurationError: no topic, or something that is none.
    """
    if found := bindings_of(topics, exchange):
        return found
    if exchange.type == "fanout":
        return [Binding("", exchange)]
    raise ConfigurationError(
        "No topic is given: bus.subscribe('orders.#'), or an event; only a fanout exchange needs none."
    )


def _topic(topic: object) -> str:
    if isinstance(topic, str):
        return check_topic(topic)
    if isinstance(topic, type) and issubclass(topic, Event):
        check_contract(topic)
        return topic.__terms__.topic
    if isinstance(topic, type) and issubclass(topic, Command):
        raise ConfigurationError(
            f"{topic.__name__} is a command, which is not subscribed to: send() brings it to its owner's queue."
        )
    raise ConfigurationError(f"{topic!r} is neither a topic nor an Event.")
