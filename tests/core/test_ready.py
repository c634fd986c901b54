"""ReadyQueue: the order in which workers take deliveries."""

from __future__ import annotations

import asyncio
from typing import Any

from streamtools.engine.ready import ReadyQueue


def waiting(keys: list[str | None]) -> tuple[ReadyQueue, list[Any]]:
    queue = ReadyQueue(lambda delivery: delivery[1])  # type: ignore[index]
    deliveries: list[Any] = list(enumerate(keys))
    for delivery in deliveries:
        queue.add(delivery)
    return queue, deliveries


async def test_what_is_held_is_taken_in_the_same_order_later() -> None:
    queue, deliveries = waiting([None, None])
    queue.hold()
    queue.hold()  # nothing is lost by asking twice
    queue.add(later := (2, None))  # type: ignore[arg-type]
    worker = asyncio.create_task(queue.wait())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not queue.deliveries
    assert not worker.done()
    queue.resume()
    await worker
    assert list(queue.deliveries) == [*deliveries, later]
    queue.resume()
    assert list(queue.deliveries) == [*deliveries, later]


def test_the_next_of_a_key_waits_too_while_all_is_held() -> None:
    queue, (first, second, other) = waiting(["a", "a", "b"])
    assert queue.deliveries.popleft() is first
    queue.hold()
    queue.decided(first)
    assert not queue.deliveries
    queue.resume()
    assert list(queue.deliveries) == [other, second]


def test_what_is_held_is_given_back_with_the_rest() -> None:
    queue, deliveries = waiting(["a", "a", None])
    queue.hold()
    assert sorted(queue.clear()) == deliveries  # type: ignore[type-var]
    assert not queue.deliveries
