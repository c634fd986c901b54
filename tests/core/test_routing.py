"""ConsumerFactory."""

from __future__ import annotations

from typing import Any

from streamtools import ConsumerFactory, Handler, Message


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
