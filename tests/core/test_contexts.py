"""Each message has context variables of its own; what is handled now is known wherever its work is done."""

from __future__ import annotations

import asyncio
import decimal
import threading
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from streamtools import ConsumerFactory, Message, Retry
from streamtools.bus import Bus, Event
from streamtools.delivery import current
from streamtools.engine.functions.calling import within
from streamtools.errors import RetryLater
from streamtools.testing import Harness
from streamtools.types import Handler

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class StockCounted(Event):
    id: int


def current_id() -> str:
    delivery = current.get()
    return delivery.message.id if delivery is not None else ""


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("waits", [False, True])
async def test_what_a_handler_sets_is_not_seen_by_the_next_message(concurrency: int, waits: bool) -> None:
    seen: list[tuple[str, int]] = []
    precision = decimal.getcontext().prec  # there is a context of decimals, which would be shared
    factory = ConsumerFactory(url="asyncio://", concurrency=concurrency)

    @factory.route("orders")
    async def handle(msg: int) -> None:
        seen.append((tenant.get(), decimal.getcontext().prec))
        tenant.set(f"tenant {msg}")
        decimal.getcontext().prec = 5
        if waits:
            await asyncio.sleep(0)
        assert tenant.get() == f"tenant {msg}"

    async with Harness(factory) as service:
        for number in range(20):
            await service.send("orders", number)
        await service.settled()
    assert seen == [("nobody", precision)] * 20
    assert decimal.getcontext().prec == precision


async def test_an_attempt_does_not_see_what_the_one_before_has_set() -> None:
    for ordered_by in (None, "queue"):
        seen: list[str] = []
        factory = ConsumerFactory(url="asyncio://", ordered_by=ordered_by, retry=Retry(retries=2, delay=0))

        @factory.route("orders")
        async def handle(msg: int) -> None:
            seen.append(tenant.get())  # noqa: B023
            tenant.set("mine")
            if len(seen) < 3:  # noqa: B023
                raise RetryLater(0)

        async with Harness(factory) as service:
            await service.send("orders", 1)
            await service.settled()
        assert seen == ["nobody"] * 3


async def test_handlers_of_one_event_do_not_see_what_the_others_set() -> None:
    seen: list[str] = []
    bus = Bus("stock", url="asyncio://")

    @bus.handler
    async def one(event: StockCounted) -> None:
        seen.append(tenant.get())
        tenant.set("one")

    @bus.handler
    async def two(event: StockCounted) -> None:
        seen.append(tenant.get())
        tenant.set("two")

    async with Harness(bus) as service:
        await service.send("stock", StockCounted(id=1))
        await service.settled()
    assert seen == ["nobody", "nobody"]


async def test_middleware_and_handler_share_the_context_of_the_message() -> None:
    seen: list[str] = []

    async def set_tenant(message: Message, call_next: Handler) -> Any:
        tenant.set(message.headers["tenant"])
        try:
            return await call_next(message)
        finally:
            seen.append(tenant.get())

    factory = ConsumerFactory(url="asyncio://", middleware=[set_tenant])

    @factory.route("orders")
    def handle(msg: int) -> None:
        seen.append(tenant.get())

    async with Harness(factory) as service:
        await service.send("orders", 1, headers={"tenant": "acme"})
        await service.settled()
    assert seen == ["acme", "acme"]


async def test_the_delivery_in_hand_is_known_in_tasks_and_threads() -> None:
    found: dict[str, str] = {}
    factory = ConsumerFactory(url="asyncio://")

    async def note(where: str) -> None:
        await asyncio.sleep(0)
        found[where] = current_id()

    @factory.route("orders")
    async def handle(msg: int) -> None:
        found["handler"] = current_id()
        await asyncio.create_task(note("task"))
        await asyncio.gather(note("gathered"))
        found["thread"] = await asyncio.to_thread(current_id)
        async with asyncio.timeout(5):
            await note("within a timeout")

    @factory.route("plain")
    def plain(msg: int) -> None:
        assert threading.current_thread() is not threading.main_thread()
        found["plain"] = current_id()

    async with Harness(factory) as service:
        first = await service.send("orders", 1)
        second = await service.send("plain", 1)
        await service.settled()
    assert found.pop("plain") == second.id
    assert found == dict.fromkeys(["handler", "task", "gathered", "thread", "within a timeout"], first.id)
    assert current.get() is None


async def test_an_error_that_was_handled_is_not_taken_for_the_cause_of_the_next() -> None:
    async def work() -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            pass
        await asyncio.sleep(0)
        raise ValueError("own")

    with pytest.raises(ValueError, match="own") as caught:
        await within(copy_context(), work())
    assert caught.value.__context__ is None


async def test_a_coroutine_in_a_context_of_its_own_is_cancelled_and_closed_like_any_other() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(tenant.get())

    tenant.set("acme")

    async def handle() -> None:
        await within(copy_context(), work())

    task = asyncio.create_task(handle())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    left = within(copy_context(), work())
    left.send(None)
    left.close()
    assert ended == ["acme", "acme"]
