"""The runner: hooks, signals, restarts, failures."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamtools import (
    ConfigurationError,
    ConnectError,
    Consumer,
    ConsumerFactory,
    ConsumerRunner,
    HandlerError,
    HandlerFactory,
    Producer,
    QueueError,
)
from streamtools.delivery import Delivery
from streamtools.drivers.asyncio import AsyncIOConsumer
from streamtools.testing import eventually
from tests.brokers.address import ROOT
from tests.brokers.processes import free_ports


def service(handler: Callable[..., Any] | None = None, **options: Any) -> tuple[ConsumerFactory, list[Any]]:
    consumers, seen = ConsumerFactory(url="asyncio://", **options), list[Any]()

    @consumers.route("orders")
    async def order(msg: Any) -> None:
        seen.append(msg)
        if handler is not None:
            await handler(msg)

    return consumers, seen


async def send(*payloads: Any, queue: str = "orders") -> None:
    async with Producer(queue, url="asyncio://") as producer:
        await producer.send_many(payloads)


# --- beside a host ------------------------------------------------------------------------------


async def test_hooks_run_before_the_first_message_and_after_the_last() -> None:
    order: list[str] = []
    consumers, _ = service(lambda msg: _note(order, "message"))
    await send(1)

    async def start() -> None:
        order.append("start")

    runner = ConsumerRunner(
        consumers, on_startup=[start, lambda: order.append("start 2")], on_shutdown=[lambda: order.append("end")]
    )
    async with runner:
        await eventually(lambda: "message" in order)
    assert order == ["start", "start 2", "message", "end"]


async def _note(order: list[str], what: str) -> None:
    order.append(what)


async def test_async_with_is_ready_at_once_and_leaves_the_hosts_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    consumers, seen = service()
    async with ConsumerRunner(consumers) as runner:
        assert runner.health().ready and runner.health().live
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        await send(1, 2)
        await eventually(lambda: seen == [1, 2])
    assert not runner.health().ready


async def test_entering_that_is_cancelled_leaves_nothing_running() -> None:
    # Given a broker that cannot be reached, so that the runner is never ready
    consumers = ConsumerFactory(url="amqp://127.0.0.1:1", connect_timeout=60)
    consumers.route("orders")(send)
    before = asyncio.all_tasks()

    # When the host has no more patience
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), ConsumerRunner(consumers):
            raise AssertionError("it is never ready")

    # Then the runner has ended too
    assert asyncio.all_tasks() == before


async def test_a_runner_runs_again_after_it_ended() -> None:
    consumers, seen = service()
    runner = ConsumerRunner(consumers)
    for number in (1, 2):
        async with runner:
            await send(number)
            await eventually(lambda: len(seen) == number)  # noqa: B023


async def test_several_protocols_run_in_one_loop(tmp_path: Path) -> None:
    seen: list[str] = []
    memory, disk = ConsumerFactory(url="asyncio://"), ConsumerFactory(url=f"sqlite:///{tmp_path}/q.db")
    web = ConsumerFactory(url=f"http://127.0.0.1:{free_ports(1)[0]}")
    for factory in (memory, disk, web):

        @factory.route("orders")
        async def handle(msg: str) -> None:
            seen.append(msg)

    async with ConsumerRunner(memory, disk, web):
        for factory in (memory, disk, web):
            async with Producer("orders", url=factory.url) as producer:
                await producer.send(producer.protocol)
        await eventually(lambda: sorted(seen) == ["asyncio", "http", "sqlite"])


async def test_pairs_open_their_producers_first_and_close_them_last() -> None:
    pairs = HandlerFactory({"a": {"name": "queue_a", "consumer_loop": "AsyncIOHandler"}}, url="asyncio://")
    answers: list[int] = []
    pair = pairs["a"]

    @pair.consumer()
    async def handle(msg: int) -> None:
        answers.append(msg)
        if msg:
            await pair.producer.send(msg - 1)

    async with ConsumerRunner(pairs):
        assert pair.producer._connected
        await pair.producer.send(3)
        await eventually(lambda: answers == [3, 2, 1, 0])
    assert not pair.producer._connected


async def test_draining_lets_handlers_finish_within_the_time() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def wait(msg: Any) -> None:
        entered.set()
        await leave.wait()
        done.append(msg)

    done: list[Any] = []
    consumers, _ = service(wait)
    runner = ConsumerRunner(consumers, shutdown_timeout=20)
    serving = asyncio.create_task(runner.serve(signals=False))
    await send("slow", "waits")
    await entered.wait()
    runner.stop()
    await eventually(lambda: runner.health().loops[0].state == "draining")
    leave.set()
    await asyncio.wait_for(serving, 20)
    assert done == ["slow"]
    async with Consumer("orders", url="asyncio://") as consumer:
        left = await consumer.receive(5, timeout=0)
        assert [d.message.body for d in left] == [b"waits"]
        await consumer.ack_many(left)  # in-process queues belong to the process: the next test meets what stays


async def test_a_handler_that_hangs_is_cancelled_when_the_time_is_over() -> None:
    entered = asyncio.Event()

    async def hang(msg: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    consumers, _ = service(hang)
    start = time.monotonic()
    async with ConsumerRunner(consumers, shutdown_timeout=0.05):
        await send("stuck")
        await entered.wait()
    assert time.monotonic() - start < 10
    async with Consumer("orders", url="asyncio://") as consumer:
        left = await consumer.receive(5, timeout=0)
        assert [d.message.body for d in left] == [b"stuck"]
        await consumer.ack_many(left)


# --- what cannot run ----------------------------------------------------------------------------


async def test_nothing_to_run_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="no handler to run"):
        await ConsumerRunner(ConsumerFactory(url="asyncio://")).serve(signals=False)
    for wrong in (object(), lambda msg: None, Consumer("orders", url="asyncio://")):
        with pytest.raises(ConfigurationError, match="cannot run"):
            ConsumerRunner(wrong)  # type: ignore[arg-type]


async def test_a_hook_that_fails_ends_the_start_and_undoes_it() -> None:
    consumers, _ = service()
    ended: list[str] = []
    runner = ConsumerRunner(consumers, on_startup=[lambda: 1 / 0], on_shutdown=[lambda: ended.append("end")])
    with pytest.raises(ZeroDivisionError):
        async with runner:
            raise AssertionError("it must not come this far")
    assert ended == ["end"]


async def test_a_broker_that_never_answers_ends_the_runner_by_its_error() -> None:
    consumers = ConsumerFactory(url=f"amqp://user:hunter2@127.0.0.1:{free_ports(1)[0]}", connect_timeout=0.2)
    fine, _ = service()

    @consumers.route("orders")
    async def handle(msg: Any) -> None: ...

    with pytest.raises(ConnectError) as caught:
        async with ConsumerRunner(fine, consumers):
            raise AssertionError("it must not come this far")
    assert "hunter2" not in str(caught.value)


async def test_a_runner_that_failed_can_be_run_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/orders.db"
    consumers = ConsumerFactory(url=url, declare="passive")
    seen: list[Any] = []

    @consumers.route("orders")
    async def handle(msg: Any) -> None:
        seen.append(msg)

    runner = ConsumerRunner(consumers)
    with pytest.raises(QueueError):
        await runner.serve(signals=False)
    async with Producer("orders", url=url) as producer, Producer("error", url=url):
        await producer.send(1)
        async with runner:
            await eventually(lambda: seen == [1])


class Breaking(AsyncIOConsumer):
    """Its loop ends by an error each time it has received something, while there are `failures` left."""

    failures = 0

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        batch = await super()._receive(limit)
        if self.failures:
            self.failures -= 1
            raise ZeroDivisionError("a bug in the driver")
        return batch


def breaking(failures: int) -> tuple[Breaking, list[Any]]:
    consumer, seen = Breaking("orders", url="asyncio://"), list[Any]()
    consumer.failures = failures

    @consumer()
    async def handle(msg: Any) -> None:
        seen.append(msg)

    return consumer, seen


async def test_a_loop_that_ended_by_an_error_is_started_again() -> None:
    consumer, seen = breaking(2)
    await send("kept")
    async with ConsumerRunner(consumer) as runner:
        await eventually(lambda: seen == ["kept"])
        [loop] = runner.health().loops
        assert (loop.restarts, loop.state) == (2, "running")


async def test_when_the_budget_is_used_up_the_runner_ends_by_that_error() -> None:
    consumer, _ = breaking(100)
    await send("x")
    runner = ConsumerRunner(consumer, restarts=2)
    with pytest.raises(ZeroDivisionError, match="a bug in the driver"):
        await asyncio.wait_for(runner.serve(signals=False), 30)
    assert runner.health().loops[0].state == "dead" and not runner.health().live


async def test_a_consumer_closed_by_someone_else_ends_the_runner_loudly(caplog: pytest.LogCaptureFixture) -> None:
    consumers, _ = service()
    runner = ConsumerRunner(consumers)
    with pytest.raises(HandlerError, match="was closed while the runner was running it"):
        async with runner:
            await consumers.instances[0].close()
            await eventually(lambda: (task := runner._in.here().task) is not None and task.done())
            # Now, not only when the host leaves the block.
            assert "cannot go on, and the runner ends" in caplog.text


# --- as a process -------------------------------------------------------------------------------


class Process:
    """The service of service.py, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().strip())

    async def says(self, word: str) -> None:
        await eventually(lambda: word in " ".join(self.lines), f"it says {word!r}, not only {self.lines}")

    def numbers(self, word: str) -> list[int]:
        return [int(line.split()[1]) for line in self.lines if line.startswith(word + " ")]

    async def ends(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), 60)
        await self._reading
        return code


@asynccontextmanager
async def process(url: str, mode: str = "normal") -> AsyncIterator[Process]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.core.service", url, mode, cwd=ROOT, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    running = Process(started)
    try:
        yield running
    finally:
        if started.returncode is None:
            started.kill()
        await running.ends()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_code_0_and_nothing_lost_or_done_twice(tmp_path: Path, number: int) -> None:
    url = f"sqlite:///{tmp_path}/queues.db"
    async with Producer("orders", url=url) as producer:
        await producer.send_many(range(200))
    async with process(url) as first:
        await first.says("done")
        first.process.send_signal(number)
        assert await first.ends() == 0
    assert first.lines[:2] == ["before", "ready"]
    assert first.lines[-2:] == ["after", "ended True"]
    assert first.numbers("begun") != list(range(200)), "the signal came too late to prove anything"
    assert sorted(first.numbers("begun")) == sorted(first.numbers("done"))
    async with process(url) as second:
        await eventually(lambda: len(first.numbers("done") + second.numbers("done")) >= 200)
        second.process.send_signal(number)
        assert await second.ends() == 0
    assert Counter(first.numbers("done") + second.numbers("done")) == Counter(range(200))


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queues.db?lease=2"
    async with Producer("orders", url=url) as producer:
        await producer.send(1)
    async with process(url, "hangs") as running:
        await running.says("begun")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.stderr is not None
        # Signals that come within moments are one.
        with suppress(ProcessLookupError):
            while running.process.returncode is None:
                await asyncio.sleep(0.1)
                running.process.send_signal(signal.SIGTERM)
        # One more may come when the interpreter has no handler for it any more: then it ends by the signal itself.
        assert await running.ends() in (128 + signal.SIGTERM, -signal.SIGTERM)
    async with Consumer("orders", url=url) as consumer:
        [delivery] = await consumer.receive(1, timeout=60)
        await delivery.ack()


async def test_a_start_that_fails_exits_with_1_and_says_why(tmp_path: Path) -> None:
    url = f"amqp://user:hunter2@127.0.0.1:{free_ports(1)[0]}"
    for bad, text in ((f"{url}?nonsense=1", "has no 'nonsense'"), (f"sqlite:///{tmp_path}/no/such/q.db", "q.db")):
        async with process(bad) as running:
            assert running.process.stderr is not None
            error = (await running.process.stderr.read()).decode()
            assert await running.ends() == 1
        assert text in error.splitlines()[-1] and "hunter2" not in error
