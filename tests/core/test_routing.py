"""ConsumerFactory."""

from __future__ import annotations

from typing import Any

import pytest

from streamtools import ConfigurationError, ConsumerFactory, Handler, Message, OptionError


async def outer(message: Message, call_next: Handler) -> Any:
    return await call_next(message)


async def inner(message: Message, call_next: Handler) -> Any:
    return await call_next(message)


async def handle(msg: object) -> None:
    pass


def test_a_routes_middleware_goes_inside_the_factorys() -> None:
    consumers = ConsumerFactory(url="asyncio://", middleware=iter([outer]))
    consumers.route("plain")(handle)
    consumers.route("orders", middleware=[inner])(handle)

    plain, orders = consumers.instances
    assert plain.middleware == [outer]
    assert orders.middleware == [outer, inner]


def test_route_without_a_queue_is_an_error_where_it_stands() -> None:
    consumers = ConsumerFactory(url="asyncio://")

    with pytest.raises(ConfigurationError, match=r"wants the queue's name.* write @consumers\.route\('orders'\)"):
        consumers.route(handle)  # type: ignore[arg-type]  # `@consumers.route`, without parentheses


def test_a_misspelt_option_of_one_route_among_many_names_its_queue() -> None:
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("plain", concurrency=2)(handle)
    consumers.route("orders", concurency=2)(handle)

    with pytest.raises(OptionError, match="of 'orders' takes no 'concurency'. Did you mean 'concurrency'"):
        _ = consumers.instances
