"""Killed in the middle of a retry, a delay, or a move to the error queue: the message is somewhere, always."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import pytest

from streamtools.message import Message
from tests.brokers.rabbitmq import RabbitMQNode
from tests.chaos.process import Record, kept_alive
from tests.chaos.sending import dead_lettered, send
from tests.chaos.service import RUNS, Job
from tests.chaos.tally import show

#: Messages of each kind.
EACH = 200
#: Seconds for which the delayed ones are held.
DELAY = 3.0
RETRIED = range(EACH)
FAILING = range(EACH, 2 * EACH)
DELAYED = range(2 * EACH, 3 * EACH)

Kill = Callable[[], Awaitable[None]]


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_no_retry_delay_or_move_is_lost_when_the_service_is_killed(durable_url: str, record: Record) -> None:
    async with kept_alive(durable_url, record, nap=0.01) as lives:
        await hurt_and_count(durable_url, record, lives.kill, at=(0.25, 0.5, 0.85))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_no_retry_delay_or_move_is_lost_when_the_broker_is_killed(
    own_rabbitmq: RabbitMQNode, record: Record
) -> None:
    async def kill() -> None:
        await asyncio.to_thread(own_rabbitmq.restart, force=True)

    # The longest delay makes all queues that hold delayed messages; then they are made safe from the kill.
    await send(own_rabbitmq.url, record, [Job(DELAYED[-1])], delay=DELAY)
    await asyncio.to_thread(own_rabbitmq.wait_saved)
    async with kept_alive(own_rabbitmq.url, record, nap=0.01) as lives:
        await hurt_and_count(own_rabbitmq.url, record, kill, at=(0.25, 0.85))
        assert lives.codes == [], "the service was to live on"


async def hurt_and_count(url: str, record: Record, kill: Kill, *, at: Sequence[float]) -> None:
    """Send all kinds, kill when these parts of the runs that fail are over, and see that each comes to its end."""
    await asyncio.gather(
        send(url, record, [Job(n, "fail once") for n in RETRIED] + [Job(n, "fail") for n in FAILING]),
        send(url, record, map(Job, DELAYED), delay=DELAY),
    )
    # First runs are half of them, second and third ones (which end in the error queue) a quarter each.
    total = EACH * (1 + RUNS)
    for part in at:
        await record.shows(lambda: record.failed.total() > total * part, f"{part:.0%} of the failing runs")  # noqa: B023
        await kill()
    ended = await all_ended(url, record)

    moved = numbers(ended)
    record.confirmed -= set(FAILING)
    show(
        "killed in the middle of retries, delays and moves", record.counts(), kills=len(at),
        failed_runs=record.failed.total(), dead_lettered=len(moved), dead_lettered_twice=moved.total() - len(moved),
    )  # fmt: skip
    assert record.missing == set()
    assert moved.keys() == set(FAILING)
    assert all(message.error is not None and message.error.attempts == RUNS for message in ended)


async def all_ended(url: str, record: Record) -> Sequence[Message]:
    """Wait until each message was handled or moved; what was moved."""
    async with asyncio.timeout(90):
        while True:
            moved = await dead_lettered(url)
            if record.read().missing <= numbers(moved).keys():
                return moved
            await asyncio.sleep(0.2)


def numbers(messages: Sequence[Message]) -> Counter[int]:
    """The jobs that these are."""
    return Counter(json.loads(message.body)["n"] for message in messages)
