"""How often what comes due one by one is woken for."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamtools import Consumer, Producer
from streamtools.engine.tasks import wake_throttle
from streamtools.engine.tasks.wake_throttle import REST_LIMIT, REST_PER_MESSAGE, WAKE_INTERVAL, WakeThrottle


class Clock:
    """Stands still until it is told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(wake_throttle.time, "monotonic", clock)
    return clock


def _wakes(clock: Clock, rate: float, seconds: float) -> Iterator[tuple[float, int]]:
    """At so many a second, evenly: the seconds that the first message of each wake waited, and how many came."""
    steady, due, end = WakeThrottle(), clock.now, clock.now + seconds
    while due < end:
        clock.now = max(due, clock.now) + steady.wait()
        number = int((clock.now - due) * rate) + 1
        steady.woke(number)
        yield clock.now - due, number
        due += number / rate


def test_a_few_at_once_are_all_woken_for_singly(clock: Clock) -> None:
    single, wakes = WakeThrottle(), 0
    while not single.wait():
        single.woke(1)
        wakes += 1

    assert wakes == pytest.approx(REST_LIMIT / REST_PER_MESSAGE, abs=1)


def test_fewer_than_fifty_a_second_never_wait(clock: Clock) -> None:
    assert {late for late, _ in _wakes(clock, rate=40, seconds=60)} == {0.0}


def test_five_hundred_a_second_are_woken_for_ten_times_a_second_and_none_waits_longer_than_a_tick(
    clock: Clock,
) -> None:
    wakes = [*_wakes(clock, rate=500, seconds=60)]

    assert sum(number for _, number in wakes) == pytest.approx(30_000, abs=50)
    assert len(wakes) < 60 / WAKE_INTERVAL + 30
    assert max(late for late, _ in wakes) <= WAKE_INTERVAL


def test_whatever_was_counted_the_wait_is_a_tick_at_most(clock: Clock) -> None:
    steady = WakeThrottle()
    for _ in range(100):
        steady.woke(1000)
        assert steady.wait() <= WAKE_INTERVAL + 1e-9
    steady.forget()
    assert not steady.wait()


@pytest.fixture(params=["asyncio", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/wake_throttle.db" if request.param == "sqlite" else "asyncio://"


async def test_many_that_come_due_one_by_one_come_together_and_none_early(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes: list[int] = []
    count = WakeThrottle.woke

    def woke(self: WakeThrottle, number: int) -> None:
        wakes.append(number)
        count(self, number)

    monkeypatch.setattr(WakeThrottle, "woke", woke)
    number = 400
    async with Consumer("later", url=url) as consumer, Producer("later", url=url) as producer:
        await asyncio.gather(*(producer.send(str(n), delay=0.5 + n / number) for n in range(number)))
        came: set[int] = set()
        while len(came) < number:
            deliveries = await consumer.receive(100, timeout=20)
            now = time.time()
            assert deliveries
            assert all(now >= (delivery.message.deliver_at or now + 1) for delivery in deliveries), "it came early"
            came.update(int(delivery.message.body) for delivery in deliveries)
            await asyncio.gather(*(delivery.ack() for delivery in deliveries))

    assert sum(wakes) <= number
    assert len(wakes) < number / 4


async def test_who_asks_for_what_is_there_has_what_is_due_though_its_tick_is_not_over(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WakeThrottle, "wait", lambda self: 3600.0)
    async with Consumer("later", url=url) as consumer, Producer("later", url=url) as producer:
        await producer.send("x", delay=0.05)
        found = await consumer.receive(timeout=0)
        assert not found
        deadline = time.monotonic() + 20
        while not found and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            found = await consumer.receive(timeout=0)
        assert [delivery.message.body for delivery in found] == [b"x"]
        await found[0].ack()
