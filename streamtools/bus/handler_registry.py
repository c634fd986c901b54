"""HandlerRegistry: the handlers of a bus, by the type of message that they handle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from streamtools.bus.contracts import Command, Contract, Contracts, Event, contracts_in, payload_for, same_contract
from streamtools.bus.subscriptions import Subscriptions
from streamtools.codec import bare
from streamtools.delivery import Delivery
from streamtools.engine.functions.calling import check_function, check_handler, name_of, undecorated
from streamtools.engine.functions.invoke import asks_for, hints_of, parts_of, payload_type
from streamtools.errors import ConfigurationError, FeatureError
from streamtools.exchange import Exchange
from streamtools.message import Message
from streamtools.retry import Retry

#: Annotations of a handler that takes every message without a handler of its own.
CATCH_ALL: Final = (dict, bytes, Message, Any, object)

#: The builtin `type`, in functions with a parameter of that name.
_Class: Final = type


@dataclass(frozen=True, slots=True)
class Entry:
    """One handler of one type.

    Attributes:
        name: the name of the handler, which copies for its retries carry.
        type: the type of message, as on the wire; None for all that have no other handler.
        payload: what the body is decoded into; None for what the function's annotation says.
        function: the handler, or a class with `handle`, which gets a new instance for each message.
        retry: replaces the bus's policy.
    """

    name: str
    type: str | None
    payload: Any
    function: Callable[..., Any]
    retry: Retry | None


class HandlerRegistry:
    """The handlers of a bus, and the values that they are given.

    Parameters:
        contracts: learns the contracts that are handled.
        subscriptions: learns the topics of the events that are handled, and by which exchanges commands come.
    """

    def __init__(self, contracts: Contracts, subscriptions: Subscriptions) -> None:
        #: Values for parameters of handlers and constructors, by type.
        self.provided: dict[type, Any] = {}
        self._contracts = contracts
        self._subscriptions = subscriptions
        self._by_type: dict[str | None, list[Entry]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_type)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entries in self._by_type.values() for entry in entries)

    def known(self) -> list[str]:
        """The types of messages that have a handler of their own."""
        return sorted(name for name in self._by_type if name is not None)

    def check_shared(self, *, copies: bool, manually: bool) -> None:
        """Check that several handlers of one message can each have their own verdict.

        A retry is then a copy of the message for the one handler that failed.

        Parameters:
            copies: a failed message can be copied; otherwise it stays with its sender.
            manually: handlers acknowledge the message themselves, for all of them.

        Raises:
            FeatureError: a message has several handlers, and cannot be copied.
            ConfigurationError: a message has several handlers, and one of them could settle it for all.
        """
        for type_, entries in self._by_type.items():
            if len(entries) < 2:
                continue
            names = " and ".join(entry.name for entry in entries)
            what = "what has no other handler" if type_ is None else repr(type_)
            if not copies:
                raise FeatureError(
                    f"{names} both handle {what}, and here a message that failed stays with its sender, so "
                    "neither can be retried without the other: write one handler that calls both."
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
            ConfigurationError: nothing says what it handles, or the command has a handler already.
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
            self._contracts.add(each)
            self._add(Entry(name, each.__terms__.name, payload_for(each, annotation), function, retry))
            self._subscriptions.add_contract(each, exchange)

    def _registered(self, contract: object, annotation: Any, name: str) -> tuple[type[Contract]]:
        """The contract that a handler is registered for; its annotation must allow it."""
        if not isinstance(contract, type) or not issubclass(contract, Contract):
            raise ConfigurationError(
                f"{name} is registered for {contract!r}, which is neither a Command nor an Event: "
                "bus.register(PlaceOrder, handler)."
            )
        wanted = contracts_in(annotation)
        if wanted and not any(issubclass(contract, each) or same_contract(contract, each) for each in wanted):
            raise ConfigurationError(
                f"{name} is registered for {contract.__name__} and wants {wanted[0].__name__}: annotate its first "
                "parameter with what it is registered for."
            )
        return (contract,)

    def _add(self, entry: Entry) -> None:
        others = self._by_type.setdefault(entry.type, [])
        if others and issubclass(self._contracts.find(entry.type) or Event, Command):
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
    """A handler function for a class, which makes an instance for each message and calls its `handle`.

    Parameters:
        provided: values for the parameters of the constructor, by type.

    Raises:
        ConfigurationError: it has no `handle`, or nothing provides a parameter of its constructor.
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
    """Give `function` the signature and the name of the class's `handle`, bound to an instance."""
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
