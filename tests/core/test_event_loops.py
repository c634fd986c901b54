"""Objects of a module in any number of event loops: one after the other, one for each test, and in threads."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from streamtools import (
    Bus,
    Command,
    ConfigurationError,
    Consumer,
    ConsumerFactory,
    ConsumerRunner,
    HandlerFactory,
    Producer,
    QueueAdmin,
)
from streamtools.engine.tasks.eventloops import PerLoop
from streamtools.jobs import connect
from streamtools.testing.waiting import eventually, reaches
from tests.brokers.address import ROOT
from tests.brokers.processes import free_ports
from tests.lengths import length

PROTOCOLS = [
    "asyncio",
    "sqlite",
    "http",
    pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    pytest.param("kafka", marks=pytest.mark.kafka),
]
WITH_QUEUES = [one for one in PROTOCOLS if one != "http"]


@pytest.fixture
def protocol(request: pytest.FixtureRequest) -> str:
    """Which."""
    return str(request.param)


@pytest.fixture
def url(request: pytest.FixtureRequest, protocol: str, tmp_path: Path) -> str:
    """Empty, and the test's own."""
    if protocol == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    if protocol == "kafka":
        return str(request.getfixturevalue("kafka").url)
    if protocol == "http":
        return f"http://127.0.0.1:{free_ports(1)[0]}"
    return f"sqlite:///{tmp_path}/queues.db" if protocol == "sqlite" else "asyncio://"


@pytest.fixture
def queue() -> str:
    """A queue's name of its own: Kafka's topics are everybody's."""
    return f"orders-{os.urandom(4).hex()}"


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No connection is dropped open, and nothing complains of a loop that has ended."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)] == []
    assert "Event loop is closed" not in caplog.text
    assert "never retrieved" not in caplog.text


class InThread:
    """An event loop that runs in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> InThread:
        self._thread.start()
        return self

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def _cancel_what_is_left(self) -> None:
        """A broker that is slow to say goodbye leaves tasks of its client library."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def __exit__(self, *_: object) -> None:
        self.run(self.loop.shutdown_asyncgens())
        self.run(self._cancel_what_is_left())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


# --- one loop after the other -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
class TestOneAfterTheOther:
    def test_a_runner_with_its_factory_and_producer(self, url: str, queue: str) -> None:
        consumers, producer, seen = ConsumerFactory(url=url), Producer(queue, url=url), list[int]()

        @consumers.route(queue)
        async def handle(msg: int) -> None:
            seen.append(msg)

        runner = ConsumerRunner(consumers, producer)

        async def round_(number: int) -> None:
            async with runner:
                await producer.send(number)
                await reaches(seen, number + 1)

        took = [_seconds(partial(asyncio.run, round_(n))) for n in range(4)]
        assert seen == list(range(4))
        assert max(took) < 20

    def test_a_runner_that_serves_until_it_is_stopped(self, url: str, queue: str) -> None:
        consumers, producer, seen = ConsumerFactory(url=url), Producer(queue, url=url), list[int]()

        @consumers.route(queue)
        async def handle(msg: int) -> None:
            seen.append(msg)
            runner.stop()

        runner = ConsumerRunner(consumers, producer)

        async def round_(number: int) -> None:
            serving = asyncio.create_task(runner.serve(signals=False))
            await eventually(lambda: runner.health().ready)
            await producer.send(number)
            await asyncio.wait_for(serving, 30)

        for number in range(3):
            asyncio.run(round_(number))
        assert seen == [0, 1, 2]

    def test_a_decorated_consumer_that_is_cancelled(self, url: str, queue: str) -> None:
        consumer, producer, seen = Consumer(queue, url=url), Producer(queue, url=url), list[int]()

        @consumer()
        async def handle(msg: int) -> None:
            seen.append(msg)

        async def round_(number: int) -> None:
            running = asyncio.create_task(handle())
            await eventually(lambda: consumer.connected)
            await producer.send(number)
            await reaches(seen, number + 1)
            del running  # the end of the loop cancels it

        for number in range(3):
            asyncio.run(round_(number))
        assert seen == [0, 1, 2]

    def test_a_pair_of_a_handler_factory(self, url: str, queue: str, protocol: str) -> None:
        pairs = HandlerFactory({"a": {"name": queue, "consumer_loop": protocol}}, url=url)
        seen: list[int] = []

        @pairs["a"].consumer()
        async def handle(msg: int) -> None:
            seen.append(msg)

        async def round_(number: int) -> None:
            async with ConsumerRunner(pairs):
                await pairs["a"].producer.send(number)
                await reaches(seen, number + 1)

        for number in range(3):
            asyncio.run(round_(number))
        assert seen == [0, 1, 2]


class Place(Command, name="loops.Place"):
    id: int


@pytest.mark.parametrize("protocol", WITH_QUEUES, indirect=True)
class TestWithQueues:
    def test_what_is_never_closed(self, url: str, queue: str) -> None:
        producer, consumer = Producer(queue, url=url), Consumer(queue, url=url)

        async def send(number: int) -> None:
            await producer.send(number)

        async def take() -> bytes | None:
            [delivery] = await consumer.receive(timeout=30)
            await delivery.ack()
            return delivery.message.body

        for number in range(3):
            asyncio.run(send(number))
            assert asyncio.run(take()) == str(number).encode()

    def test_what_was_in_hand_when_its_loop_ended_comes_again_at_once(self, url: str, queue: str) -> None:
        producer, consumer = Producer(queue, url=url), Consumer(queue, url=url)

        async def take(times: int) -> list[bytes | None]:
            if times == 1:
                await producer.send("kept")
            return [delivery.message.body for delivery in await consumer.receive(timeout=30)]

        took = time.monotonic()
        assert [asyncio.run(take(n)) for n in (1, 2, 3)] == [[b"kept"]] * 3
        assert time.monotonic() - took < 25  # no lease has to run out

    def test_what_a_broken_off_iteration_holds_goes_back(self, url: str, queue: str) -> None:
        producer, consumer = Producer(queue, url=url), Consumer(queue, url=url)

        async def first() -> bytes | None:
            await producer.send_many(["a", "b"])
            async for delivery in consumer:
                return delivery.message.body
            return None

        assert asyncio.run(first()) == b"a"

        async def rest() -> list[bytes | None]:
            found: list[bytes | None] = []
            async with asyncio.timeout(30):
                while len(found) < 2:
                    found += [delivery.message.body for delivery in await consumer.receive(5, timeout=5)]
            return found

        assert sorted(filter(None, asyncio.run(rest()))) == [b"a", b"b"]

    def test_a_bus(self, url: str, queue: str) -> None:
        bus, seen = Bus(queue, url=url), list[int]()

        @bus.handler
        async def place(command: Place) -> int:
            seen.append(command.id)
            return command.id * 2

        async def started(number: int) -> None:
            async with bus:
                await bus.send(Place(id=number), queue)
                await reaches(seen, len(seen) + 1)
                assert await bus.request(Place(id=number), queue, timeout=30) == 2 * number

        async def left_running(number: int) -> None:
            await bus.start()
            assert await bus.request(Place(id=number), queue, timeout=30) == 2 * number

        async def by_a_runner(number: int) -> None:
            async with ConsumerRunner(bus):
                await bus.send(Place(id=number), queue)
                await eventually(lambda: seen[-1] == number)

        for number, use in enumerate([started, left_running, by_a_runner, left_running, started]):
            assert _seconds(partial(asyncio.run, use(number))) < 20, use

    def test_an_admin_and_a_job_connection(self, url: str, queue: str) -> None:
        admin, jobs = QueueAdmin(url=url), connect(url)
        fields: dict[str, Any] = {"title": "t", "message_type": "m", "send_from": "here", "send_to": queue}

        async def round_() -> int:
            await jobs.send_message(**fields)
            async with admin:
                return (await admin.stats(queue)).ready

        assert [asyncio.run(round_()) for _ in range(3)] == [1, 2, 3]


# --- one loop for each test -------------------------------------------------------------------------

SERVICE = """
import os
from streamtools import ConsumerFactory, ConsumerRunner, Producer

QUEUE = os.environ["QUEUE"]
consumers = ConsumerFactory()
orders, payments = Producer(QUEUE), Producer(QUEUE + "-payments")
paid = []


@consumers.route(QUEUE)
async def order(msg: dict) -> None:
    await payments.send({"order": msg["id"]}, id=f"payment-{msg['id']}")

@consumers.route(QUEUE + "-payments")
async def payment(msg: dict) -> None:
    paid.append(msg["order"])

runner = ConsumerRunner(consumers, payments)
"""

SETTINGS = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
timeout = 30
"""

ANYIO = """
import pytest

pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

TESTS = """
import pytest
from service import consumers, orders, paid, payments, runner
from streamtools import ConsumerRunner
from streamtools.testing import eventually

@pytest.mark.parametrize("number", range(NUMBER))
async def test_an_order_is_paid(number: int) -> None:
    # Every way in turn: the module's runner, one of the test's own, a producer that is closed or is not.
    async with runner if number % 2 else ConsumerRunner(consumers, payments):
        if number % 3:
            await orders.send({"id": number})
        else:
            async with orders:
                await orders.send({"id": number})
        await eventually(lambda: number in paid)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
@pytest.mark.parametrize(("plugin", "number"), [("asyncio", 50), ("anyio", length(10, 50))], ids=["asyncio", "anyio"])
def test_many_tests_each_with_a_loop_of_its_own(
    url: str, queue: str, tmp_path: Path, plugin: str, number: int
) -> None:
    tests = (TESTS if plugin == "asyncio" else ANYIO + TESTS).replace("NUMBER", str(number))
    settings = SETTINGS.replace("auto", "auto" if plugin == "asyncio" else "strict")
    output = _pytest(tmp_path, tests, settings, STREAMTOOLS_URL=url, QUEUE=queue)
    assert f"\n{number} passed" in output, output[-4000:]
    for text in ("ResourceWarning", "Event loop is closed", "Task was destroyed", "never retrieved"):
        assert text not in output, output[-4000:]


LEFT = """
import pytest
from service import QUEUE, orders
from streamtools import Consumer

@pytest.mark.parametrize("number", range(3))
async def test_the_queue_is_empty_at_first(number: int) -> None:
    consumer = Consumer(QUEUE)
    assert await consumer.receive(timeout=0) == []
    await orders.send({"id": number})
    [delivery] = await consumer.receive(timeout=5)  # and neither settled nor closed
    await orders.send({"id": -number})
"""


def test_the_documented_fixture_keeps_messages_from_the_next_test(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guides" / "test-your-service.md").read_text()
    fixture = page.partition('title="conftest.py"\n')[2].partition("```")[0]
    for conftest, passed in (("", "1 passed"), (fixture, "3 passed")):
        (tmp_path / "conftest.py").write_text(conftest)
        assert passed in _pytest(tmp_path, LEFT, STREAMTOOLS_URL="asyncio://", QUEUE="orders")


def _pytest(directory: Path, tests: str, settings: str = SETTINGS, **environment: str) -> str:
    """What pytest says of these tests."""
    (directory / "service.py").write_text(SERVICE)
    (directory / "test_service.py").write_text(tests)
    (directory / "pytest.ini").write_text(settings)
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3", "-rA"],
        cwd=directory, env={**os.environ, "PYTHONPATH": f"{directory}:{ROOT}", **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    return ended.stdout + ended.stderr


# --- several at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS, indirect=True)
class TestInThreads:
    def test_a_producer_sends_from_many_loops_at_once(self, url: str, queue: str) -> None:
        consumers, producer, seen = ConsumerFactory(url=url), Producer(queue, url=url), set[int]()

        @consumers.route(queue, concurrency=4)
        async def handle(msg: int) -> None:
            seen.add(msg)

        def send(number: int) -> None:
            asyncio.run(_send(producer, number))

        async def serve() -> None:
            async with ConsumerRunner(consumers):
                await producer.send(-1)
                with ThreadPoolExecutor(4) as pool:
                    loop = asyncio.get_running_loop()
                    await asyncio.gather(*(loop.run_in_executor(pool, send, n) for n in range(20)))
                await producer.send(-2)
                await eventually(lambda: seen == {-2, -1, *range(20)})

        asyncio.run(serve())

    @pytest.mark.parametrize("outbox", [False, True])
    def test_a_def_handler_sends_by_a_loop_of_its_thread(self, url: str, queue: str, outbox: bool) -> None:
        consumers, seen = ConsumerFactory(url=url), list[int]()
        producer = Producer(queue, url=url)
        others = Producer(f"{queue}-others", url=url, outbox=outbox)

        @consumers.route(queue)
        def handle(msg: int) -> None:
            asyncio.run(_send(others, msg))

        @consumers.route(f"{queue}-others")
        async def other(msg: int) -> None:
            seen.append(msg)

        async def serve(expected: int) -> None:
            async with ConsumerRunner(consumers):
                for number in range(3):
                    await producer.send(number)
                await reaches(seen, expected)

        for expected in (3, 6):
            asyncio.run(serve(expected))
        assert sorted(seen) == [0, 0, 1, 1, 2, 2]

    def test_a_consumer_that_runs_in_another_loop_says_so_at_once(self, url: str, queue: str) -> None:
        consumer, seen = Consumer(queue, url=url), list[int]()

        @consumer()
        async def handle(msg: int) -> None:
            seen.append(msg)

        with InThread() as other:
            running = asyncio.run_coroutine_threadsafe(consumer.run(handle), other.loop)
            asyncio.run(eventually(lambda: consumer.connected))
            for use in (consumer.run(handle), consumer.receive(timeout=1), consumer.open(), consumer.close()):
                with pytest.raises(ConfigurationError, match="in use.*run_coroutine_threadsafe"):
                    asyncio.run(use)
            with pytest.raises(ConfigurationError, match="in use in another event loop"):
                asyncio.run(ConsumerRunner(consumer).serve())
            consumer.stop()  # from any thread
            running.result(30)
        asyncio.run(_once(consumer, handle, Producer(queue, url=url), seen))


async def _send(producer: Producer, number: int) -> None:
    await producer.send(number)


async def _once(consumer: Consumer, handle: Any, producer: Producer, seen: list[int]) -> None:
    running = asyncio.create_task(consumer.run(handle))
    await eventually(lambda: consumer.connected)
    await producer.send(7)
    await eventually(lambda: 7 in seen)
    consumer.stop()
    await running


@pytest.mark.parametrize("protocol", WITH_QUEUES, indirect=True)
class TestQueuesInThreads:
    def test_a_bus_sends_and_asks_from_another_loop_than_it_runs_in(self, url: str, queue: str) -> None:
        bus = Bus(queue, url=url)

        @bus.handler
        async def place(command: Place) -> int:
            return command.id + 1

        async def ask(number: int) -> Any:
            return await bus.request(Place(id=number), queue, timeout=30)

        with InThread() as other:
            other.run(bus.start())
            assert [asyncio.run(ask(n)) for n in range(3)] == [1, 2, 3]
            with pytest.raises(ConfigurationError, match="runs in another event loop: stop it there"):
                asyncio.run(bus.stop())
            other.run(bus.stop())

    def test_a_message_of_another_loop_is_not_settled_from_here(self, url: str, queue: str) -> None:
        consumer = Consumer(queue, url=url)
        with InThread() as other:
            other.run(Producer(queue, url=url).send("x"))
            [delivery] = other.run(consumer.receive(timeout=30))
            with pytest.raises(ConfigurationError, match="in use in another event loop"):
                asyncio.run(delivery.ack())
            other.run(delivery.ack())

    def test_a_delayed_message_is_due_for_a_loop_that_began_later(self, url: str, queue: str) -> None:
        producer = Producer(queue, url=url)

        async def send() -> None:
            async with Consumer(queue, url=url):
                await producer.send("late", delay=0.5)

        async def take() -> list[bytes | None]:
            async with Consumer(queue, url=url) as consumer:
                return [delivery.message.body for delivery in await consumer.receive(timeout=30)]

        asyncio.run(send())
        assert asyncio.run(take()) == [b"late"]


async def test_a_runner_that_serves_already_says_so_at_once() -> None:
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("orders")(_ignore)
    runner = ConsumerRunner(consumers)
    async with runner:
        with pytest.raises(ConfigurationError, match="runs already"):
            await runner.serve()
        with pytest.raises(ConfigurationError, match="runs already"):
            await asyncio.to_thread(asyncio.run, runner.serve())
    async with runner:
        pass


async def _ignore(msg: Any) -> None: ...


# --- loops that end otherwise -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["asyncio", "sqlite"], indirect=True)
def test_a_loop_that_is_closed_without_its_last_rites(url: str, queue: str) -> None:
    producer, consumer = Producer(queue, url=f"{url}?lease=1" if "sqlite" in url else url), Consumer(queue, url=url)

    async def round_() -> bytes | None:
        await producer.send("x")
        [delivery] = await consumer.receive(timeout=30)
        return delivery.message.body

    for _ in range(3):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(round_()) == b"x"
        loop.close()


@pytest.mark.parametrize("protocol", ["sqlite", "rabbitmq", "kafka"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_connections_of_its_own(url: str, queue: str) -> None:
    producer = Producer(queue, url=url)

    async def send(text: str) -> None:
        await producer.send(text)

    async def both() -> None:
        await send("parent")
        child = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(send("child")))
        child.start()
        await asyncio.to_thread(child.join, 60)
        assert child.exitcode == 0
        await send("parent again")

    asyncio.run(both())

    async def take() -> set[bytes | None]:
        found: set[bytes | None] = set()
        async with Consumer(queue, url=url) as consumer, asyncio.timeout(60):
            while len(found) < 3:
                for delivery in await consumer.receive(5, timeout=5):
                    found.add(delivery.message.body)
                    await delivery.ack()
        return found

    assert asyncio.run(take()) == {b"parent", b"child", b"parent again"}


def test_one_object_for_each_loop_and_none_for_those_that_have_ended() -> None:
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    objects = PerLoop(make)

    async def look() -> object:
        assert objects.here() is objects.here()
        return objects.here()

    assert asyncio.run(look()) is not asyncio.run(look())
    with InThread() as other:
        there = other.run(look())

        async def elsewhere() -> list[object]:
            return objects.elsewhere()

        assert asyncio.run(elsewhere()) == [there]
    assert len(made) == 3 and asyncio.run(elsewhere()) == []


def _seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start
