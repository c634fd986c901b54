"""A place in a group that is lost, kept, or claimed by two."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from streamtools import ConnectError, QueueAdmin
from streamtools.consumer import BoundHandler
from streamtools.drivers.kafka import KafkaConsumer
from streamtools.drivers.kafka.consuming import static_names
from streamtools.settings import WORKER_VARIABLE, KafkaSettings
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, Running
from tests.drivers.kafka.process import SESSION
from tests.drivers.kafka.test_chaos import events, workers

pytestmark = pytest.mark.real_kafka("members that lose their place")


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> None:
    """The history of a process is read between the looks of `eventually`, which counts as ours."""


@pytest.fixture
async def commits(kafka: KafkaAddress, queue: str) -> Any:
    """What the group of the queue has committed, asked from outside."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()

    async def read() -> dict[int, int]:
        found = await admin.list_consumer_group_offsets(queue)
        return {place.partition: commit.offset for place, commit in found.items() if place.topic == queue}

    yield read
    await admin.close()


def quick(kafka: KafkaAddress) -> KafkaSettings:
    return KafkaSettings(host=kafka.bootstrap, session_timeout=SESSION)


# --- losing it ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_process_that_was_stopped_beyond_its_session_never_moves_the_group_backwards(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, tmp_path: Path, commits: Any
) -> None:
    history, number = tmp_path / "history", 300
    sender = await producer(partitions=1)
    await sender.send_many(range(number))
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    def by_sleeper() -> list[int]:
        return [int(number) for what, _, _, number in events(history) if what == "handled"]

    async with workers() as start:
        sleeper = await start("plainly", kafka.bootstrap, queue, str(history))
        await eventually(lambda: len(by_sleeper()) > 10, timeout=60)
        os.kill(sleeper.pid, signal.SIGSTOP)
        async with running(handle, url=quick(kafka)):
            await eventually(lambda: bool(seen) and max(seen) == number - 1, timeout=60)
        assert await commits() == {0: number}
        before = len(by_sleeper())
        os.kill(sleeper.pid, signal.SIGCONT)
        await sender.send(number)
        while number not in by_sleeper():
            assert (await commits())[0] >= number
            await asyncio.sleep(0.01)
        await eventually(lambda: _is(commits, {0: number + 1}))
    assert len(by_sleeper()) - before <= 2, "the one at work, and the one that was sent last"


async def test_nothing_begins_while_the_coordinator_is_silent_for_the_whole_session(
    producer: MakeProducer, running: Running, kafka: KafkaAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    turns = asyncio.Semaphore(0)

    async def handle(msg: int) -> None:
        await turns.acquire()
        seen.append(msg)

    async with running(handle, url=quick(kafka), prefetch=50) as consumer:
        await (await producer(partitions=1)).send_many(range(50))
        await eventually(lambda: consumer._loop.in_hand == 50)
        coordinator, answered = consumer._member.coordinator, asyncio.Event()
        send = coordinator._send

        async def send_late(request: Any) -> Any:
            response = await send(request)
            await answered.wait()
            return response

        monkeypatch.setattr(coordinator, "_send", send_late)
        await eventually(lambda: coordinator.is_doubtful and coordinator._in_doubt, timeout=30)
        for _ in range(50):
            turns.release()
        await eventually(lambda: bool(seen))
        for _ in range(100):
            await asyncio.sleep(0)
        assert seen == [0], "the one at work, and none of those that wait behind it"
        answered.set()
        await eventually(lambda: len(seen) == 50)
    assert seen == list(range(50))


async def _is(commits: Any, expected: dict[int, int]) -> bool:
    return bool(await commits() == expected)


async def test_what_a_member_finished_before_it_lost_its_place_is_not_handled_again(
    kafka: KafkaAddress,
    producer: MakeProducer,
    running: Running,
    queue: str,
    commits: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamtools.drivers.kafka.consuming.commits.COMMIT_AGE", 600)
    seen: list[int] = []
    slow = asyncio.Event()

    async def handle(msg: int) -> None:
        seen.append(msg)
        if msg == 3:
            await slow.wait()

    sender = await producer(partitions=1)
    async with running(handle, concurrency=4, url=quick(kafka)) as consumer:
        await sender.send_many(range(10))
        await eventually(lambda: len(seen) == 10)
        assigned = consumer._member.partitions[next(p for p in consumer._member.partitions if p.topic == queue)]
        await consumer._member.coordinator.leave()  # as the broker does it, unheard by the library
        await eventually(lambda: assigned.revoking)
        slow.set()
        await eventually(lambda: assigned.revoked)
        await sender.send(10)
        await eventually(lambda: 10 in seen)
    assert seen == list(range(11))
    assert await commits() == {0: 11}


async def test_what_an_operator_moved_backwards_meanwhile_is_handled_again(
    kafka: KafkaAddress,
    producer: MakeProducer,
    running: Running,
    admin: QueueAdmin,
    queue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    sender = await producer(partitions=1)
    async with running(handle, url=quick(kafka)) as consumer:
        await sender.send_many(range(5))
        await eventually(lambda: len(seen) == 5)
        await consumer._member.commits.commit()
        monkeypatch.setattr("streamtools.drivers.kafka.consuming.commits.COMMIT_AGE", 600)
        await sender.send_many(range(5, 10))
        await eventually(lambda: len(seen) == 10)
        await consumer._member.coordinator.leave()
        await admin.seek(queue, "beginning", group=queue)
        await eventually(lambda: len(seen) == 20)
    assert seen == [*range(10), *range(10)]


# --- names ----------------------------------------------------------------------------------------


def test_each_consumer_of_a_process_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKER_VARIABLE, raising=False)
    first, second, elsewhere = (static_names.take("kafka://a", g, "one") for g in ("g", "g", "h"))
    assert (first, second, elsewhere) == ("one", "one.consumer-2", "one")
    monkeypatch.setenv(WORKER_VARIABLE, "1")
    third, fourth = (static_names.take("kafka://a", "g", "one") for _ in range(2))
    assert (third, fourth) == ("one.worker-1", "one.worker-1.consumer-2")
    monkeypatch.delenv(WORKER_VARIABLE)
    static_names.release("kafka://a", "g", first)
    assert static_names.take("kafka://a", "g", "one") == first
    for group, name in [("g", first), ("g", second), ("h", elsewhere), ("g", third), ("g", fourth)]:
        static_names.release("kafka://a", group, name)


async def test_two_consumers_of_a_process_share_a_group_though_their_static_id_is_the_same(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    other = f"{queue}-other"
    options = {"group": queue, "static_id": "one", "url": quick(kafka)}
    await producer(other)
    async with (
        running(handle, **options) as first,
        running(handle, **options) as second,
        running(handle, other, **options) as third,
    ):
        sender, further = await producer(), await producer(other)
        for number in range(50):
            await sender.send(number)
            await further.send(1000 + number)
        await eventually(lambda: len(seen) >= 100)
        found = {c._member.coordinator.place.generation for c in (first, second, third)}
        await asyncio.sleep(SESSION)  # several heartbeats of each
        again = {c._member.coordinator.place.generation for c in (first, second, third)}
    assert sorted(seen) == [*range(50), *range(1000, 1050)]
    assert len(found) == 1 and found == again


async def test_a_consumer_whose_name_another_process_takes_over_ends_and_says_so(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_names, "take", lambda _address, _group, name: name)  # as another process would
    seen: list[tuple[str, int]] = []

    async def handle(msg: int) -> None:
        seen.append(("second", msg))

    options = {"static_id": "one", "url": quick(kafka)}
    consumer = KafkaConsumer(queue, error_queue="{queue}.error", **options)
    started = asyncio.Event()

    async def first(msg: int) -> None:
        seen.append(("first", msg))

    task = asyncio.create_task(consumer.run(BoundHandler(consumer, first), on_started=started.set))
    await started.wait()
    sender = await producer()
    await sender.send(1)
    await eventually(lambda: seen == [("first", 1)])
    async with running(handle, **options) as second:
        with pytest.raises(ConnectError) as caught:
            async with asyncio.timeout(30):
                await task
        assert caught.value.permanent
        for word in ("'one'", repr(queue), "static_id=", "Another consumer"):
            assert word in str(caught.value)
        generation = second._member.coordinator.place.generation
        await sender.send(2)
        await eventually(lambda: ("second", 2) in seen)
        await asyncio.sleep(SESSION)
        assert second._member.coordinator.place.generation == generation


# --- at most once ---------------------------------------------------------------------------------


async def test_on_receive_no_handler_begins_before_the_commit_holds(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str, commits: Any
) -> None:
    sender = await producer(partitions=1)
    held: list[tuple[int, int]] = []

    async def handle(msg: int) -> None:
        held.append((msg, (await commits()).get(0, 0)))

    async with running(handle, ack="on_receive", url=quick(kafka)) as consumer:
        await sender.send(0)
        await eventually(lambda: len(held) == 1)
        # As if others had the partitions since, and this member had not heard of it yet.
        consumer._member.coordinator._inner.generation -= 1
        await sender.send(1)
        await eventually(lambda: len(held) == 2, timeout=60)
        await sender.send(2)
        await eventually(lambda: len(held) == 3)
    assert [number for number, _ in held] == [0, 1, 2]
    assert all(committed > number for number, committed in held)
