"""Decorators with functools.wraps, which show the parameters of the function inside."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial, update_wrapper, wraps
from typing import Any

import pytest
from pydantic import BaseModel

from streamtools import Bus, Command, ConfigurationError, Consumer, ConsumerFactory, Delivery, Message
from streamtools.testing import Harness

Function = Callable[..., Any]


class Order(BaseModel):
    id: int


class Session:
    """What decorators bring."""


def then(made: Any, line: str, **names: Any) -> Any:
    """Run the line that an error has told to write, if any, before the decorator returns."""
    exec(line, {"inspect": inspect, **names})  # noqa: S102
    return made


def message_alone(function: Function, line: str = "") -> Function:
    @wraps(function)
    async def inner(msg: Any) -> Any:
        return await function(msg, Session())

    return then(inner, line, inner=inner)  # type: ignore[no-any-return]


def all_arguments(function: Function, line: str = "") -> Function:
    @wraps(function)
    async def inner(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, db=Session(), **kwargs)

    return then(inner, line, inner=inner)  # type: ignore[no-any-return]


def in_front(function: Function, line: str = "") -> Function:
    @wraps(function)
    async def inner(msg: Any) -> Any:
        return await function(Session(), msg)

    return then(inner, line, inner=inner)  # type: ignore[no-any-return]


def in_a_thread(function: Function, line: str = "") -> Function:
    @wraps(function)
    def inner(msg: Any) -> Any:
        return function(msg, db=Session())

    return then(inner, line, inner=inner)  # type: ignore[no-any-return]


class WithSession:
    """A decorator that is a class."""

    def __init__(self, function: Function, line: str = "") -> None:
        self.function = function
        update_wrapper(self, function)
        then(self, line, self=self)

    async def __call__(self, msg: Any) -> Any:
        return await self.function(msg, Session())


async def charge(msg: Order, db: Session) -> None:
    assert type(msg) is Order and type(db) is Session


async def charge_by_name(msg: Order, *, db: Session) -> None:
    assert type(msg) is Order and type(db) is Session


async def charge_last(db: Session, msg: Order) -> None:
    assert type(msg) is Order and type(db) is Session


SHAPES: list[tuple[Any, Function]] = [
    (message_alone, charge),
    (all_arguments, charge),
    (all_arguments, charge_by_name),
    (in_front, charge_last),
    (in_a_thread, charge),
    (WithSession, charge),
    (lambda f, line="": message_alone(all_arguments(f), line), charge),
]


@pytest.mark.parametrize(("decorate", "function"), SHAPES)
async def test_one_that_fills_a_parameter_is_refused_at_once_with_the_line_that_mends_it(
    decorate: Any, function: Function
) -> None:
    factory = ConsumerFactory(url="asyncio://")
    with pytest.raises(ConfigurationError, match="decorator with functools.wraps") as caught:
        factory.route("orders")(decorate(function))
    assert "If the decorator fills 'db'" in str(caught.value)
    line = re.search(r"\w+\.__signature__ = .*$", str(caught.value))
    assert line is not None
    if decorate is SHAPES[-1][0]:  # two decorators that fill it at once: only the line is of interest
        return
    factory.route("orders")(decorate(function, line[0]))
    async with Harness(factory) as service:
        await service.send("orders", {"id": 1})
        await service.settled()
        assert (len(service.handled()), service.rejected) == (1, [])


async def test_one_that_fills_a_parameter_of_a_bus_handler_is_told_as_well() -> None:
    class Place(Command, name="decorators.Place"):
        id: int

    async def place(command: Place, db: Session) -> None: ...

    bus = Bus("orders", url="asyncio://")
    place.__annotations__ = {"command": Place, "db": Session}
    bus.handler(message_alone(place))
    with pytest.raises(ConfigurationError, match=r"lambda command: None"):
        await bus.start()


@pytest.mark.parametrize("wanted", [Message, Delivery])
def test_one_that_does_not_pass_on_what_the_handler_wants_is_refused_at_once(wanted: type) -> None:
    async def handle(msg: Order, further: Any) -> None: ...

    handle.__annotations__ = {"msg": Order, "further": wanted}
    with pytest.raises(ConfigurationError, match=r"called with msg and further, but .*message_alone.*inner\(msg"):
        Consumer("orders", url="asyncio://")(message_alone(handle))


def test_one_that_wants_more_than_the_message_is_refused_at_once() -> None:
    def wants_more(function: Function) -> Function:
        @wraps(function)
        async def inner(request: Any, msg: Any) -> Any:
            return await function(msg)

        return inner

    async def handle(msg: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"to be called with msg, but .*inner\(request"):
        Consumer("orders", url="asyncio://")(wants_more(handle))


async def test_those_that_work_are_left_alone() -> None:
    def passes_on(function: Function) -> Function:
        @wraps(function)
        async def inner(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return inner

    async def handle(msg: Order, message: Message) -> None:
        assert type(msg) is Order and type(message) is Message

    async def defaults(msg: Order, db: Session | None = None) -> None:
        assert type(msg) is Order and type(db) is Session

    factory = ConsumerFactory(url="asyncio://")
    factory.route("passed")(passes_on(passes_on(handle)))
    factory.route("default")(message_alone(defaults))
    factory.route("partial")(partial(charge, db=Session()))
    factory.route("method")(partial(passes_on(charge), db=Session()))
    async with Harness(factory) as service:
        for queue in ("passed", "default", "partial", "method"):
            await service.send(queue, {"id": 1})
        await service.settled()
        assert (len(service.handled()), service.rejected) == (4, [])


def test_names_that_are_defined_later_are_looked_for_at_the_start() -> None:
    async def handle(msg: Order, later: Any) -> None: ...

    handle.__annotations__ = {"msg": "Order", "later": "DefinedLater"}
    Consumer("orders", url="asyncio://")(message_alone(handle))


def test_decorating_does_not_ask_yet_where_the_broker_is() -> None:
    factory = ConsumerFactory(url="asyncio://", no_such_option=1)
    factory.route("orders")(message_alone(unannotated))
    with pytest.raises(ConfigurationError, match="no_such_option"):
        _ = factory.handlers[0].consumer


async def unannotated(msg):  # type: ignore[no-untyped-def]
    return msg
