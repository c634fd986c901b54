"""How a runner ends: by a signal at whatever moment, with handlers and hooks that hang, beside another runner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamtools import ConsumerFactory, ConsumerRunner, Producer
from streamtools.testing.waiting import eventually, reaches
from tests.brokers.address import ROOT

#: Seconds within which a process that has nothing to wait for ends, on a busy machine.
SOON = 20.0

SCRIPT = """
import asyncio, logging, os, sys, time
from streamtools import Bus, Command, Consumer, ConsumerFactory, ConsumerRunner, Producer

logging.basicConfig(level="INFO")
url, where = sys.argv[1], sys.argv[2]
consumers = ConsumerFactory(url=url if where == "consumer" else "asyncio://")

@consumers.route("orders")
async def handle(msg): ...

class Place(Command, name="Place"): ...

bus = Bus("orders", url=url)

@bus.handler
async def place(command: Place): ...

def say(text):
    os.write(1, (text + "\\n").encode())

async def waits():
    say("waits")
    await asyncio.Event().wait()

def blocks():
    say("waits")
    time.sleep(600)

async def blocks_the_loop():
    await asyncio.sleep(0)
    blocks()

sources, startup = [consumers], []
if where == "producer":
    sources.insert(0, Producer("orders", url=url))
if where == "bus":
    sources = [bus]
if where == "sender":
    sources.insert(0, Bus(None, url=url))
if where in ("waits", "blocks", "blocks_the_loop"):
    startup = [globals()[where]]
runner = ConsumerRunner(*sources, on_startup=startup, on_shutdown=[lambda: say("after")])
if __name__ == "__main__":
    runner.run()
    say("ended")
"""


@contextmanager
def process(directory: Path, script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A script under way."""
    (directory / "script.py").write_text(script)
    running = subprocess.Popen(
        [sys.executable, *(arguments if arguments[:1] == ("-m",) else ("script.py", *arguments))],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


async def said(running: subprocess.Popen[str], line: str) -> None:
    """Wait until it has said this line."""
    assert running.stdout is not None
    while (found := await asyncio.to_thread(running.stdout.readline)).strip() != line:
        assert found, f"it ended without {line!r}: {await asyncio.to_thread(running.communicate)}"


async def sleeps(running: subprocess.Popen[str]) -> None:
    """Wait until its main thread is in a system call that blocks.

    Python sees a signal that comes between two of its instructions, or while such a call waits. One that comes in the
    few microseconds just before the call is seen after it.
    """
    status = Path(f"/proc/{running.pid}/stat")
    while (await asyncio.to_thread(status.read_text)).rpartition(")")[2].split()[0] != "S":
        await asyncio.sleep(0.01)


async def ends(running: subprocess.Popen[str], number: int) -> tuple[int, str, str, float]:
    """Signal it; its exit code, what it has said since, and the seconds that it took."""
    start = time.monotonic()
    running.send_signal(number)
    output, errors = await asyncio.to_thread(running.communicate, None, 60)
    return running.returncode, output, errors, time.monotonic() - start


@asynccontextmanager
async def silence() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A port that takes connections and never says a word; the event is set with the first."""
    came, writers = asyncio.Event(), list[asyncio.StreamWriter]()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        came.set()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], came
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


# --- at start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["producer", "bus", "sender", "consumer"])
@pytest.mark.parametrize("scheme", ["amqp", "kafka"])
async def test_a_signal_while_something_connects(tmp_path: Path, scheme: str, where: str, number: int) -> None:
    async with silence() as (port, came):
        with process(tmp_path, SCRIPT, f"{scheme}://127.0.0.1:{port}", where) as running:
            await asyncio.wait_for(came.wait(), 60)
            code, output, errors, took = await ends(running, number)
    assert (code, took < SOON) == (0, True), (took, errors)
    assert output.splitlines()[-1] == "ended"
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hook", ["waits", "blocks", "blocks_the_loop"])
@pytest.mark.parametrize("how", ["script", "command"])
async def test_a_signal_while_an_on_startup_hook_waits(tmp_path: Path, how: str, hook: str, number: int) -> None:
    script = SCRIPT.replace("sys.argv[1], sys.argv[2]", repr(("asyncio://", hook)))
    arguments = () if how == "script" else ("-m", "streamtools", "run", "script:runner")
    with process(tmp_path, script, *arguments) as running:
        await said(running, "waits")
        await sleeps(running)
        code, output, errors, took = await ends(running, number)
    assert (code, took < SOON) == (0, True), (took, errors)
    assert output.splitlines() == (["after", "ended"] if how == "script" else ["after"])
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options", [(), ("--workers", "2"), ("--reload",)])
async def test_a_signal_while_the_command_imports_the_service(
    tmp_path: Path, options: tuple[str, ...], number: int
) -> None:
    script = 'import os, time\nos.write(1, b"waits\\n")\ntime.sleep(600)\n'
    with process(tmp_path, script, "-m", "streamtools", "run", "script:runner", *options) as running:
        await said(running, "waits")
        await sleeps(running)
        code, _, errors, took = await ends(running, number)
    assert (code, took < SOON) == (0, True), (took, errors)
    assert "Traceback" not in errors


@pytest.mark.kafka
async def test_a_signal_while_a_kafka_group_is_joined(tmp_path: Path, kafka: Any) -> None:
    # Given a member that is stopped, so that the group waits for it
    queue = f"orders-{os.urandom(4).hex()}"
    script = SCRIPT.replace('"orders"', repr(queue))
    with process(tmp_path, script, kafka.url, "consumer") as first:
        assert first.stderr is not None
        while "Running" not in await asyncio.to_thread(first.stderr.readline):
            pass
        first.send_signal(signal.SIGSTOP)
        # When a second one that joins is told to end
        with process(tmp_path, script, kafka.url, "consumer") as second:
            assert second.stderr is not None
            while "oining" not in (line := await asyncio.to_thread(second.stderr.readline)) and line:
                pass
            code, output, errors, took = await ends(second, signal.SIGTERM)
        first.send_signal(signal.SIGCONT)
    assert (code, took < SOON) == (0, True), (took, errors)
    assert output.splitlines()[-1] == "ended"


async def test_stop_ends_a_runner_that_is_still_starting_from_any_thread() -> None:
    begun, order = asyncio.Event(), list[str]()
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("orders")(_ignore)

    async def start() -> None:
        begun.set()
        await asyncio.Event().wait()

    runner = ConsumerRunner(consumers, on_startup=[start], on_shutdown=[lambda: order.append("after")])
    for _ in range(2):
        begun.clear()
        serving = asyncio.create_task(runner.serve(signals=False))
        await begun.wait()
        threading.Thread(target=runner.stop).start()
        await asyncio.wait_for(serving, 10)
    assert order == ["after", "after"]


async def _ignore(msg: Any) -> None: ...


# --- handlers that hang -----------------------------------------------------------------------------

STUBBORN = """
import asyncio, os, sys, time
from streamtools import ConsumerFactory, ConsumerRunner, Producer

how, deed = sys.argv[1:]
consumers, orders = ConsumerFactory(url="asyncio://"), Producer("orders", url="asyncio://")

@consumers.route("orders")
async def handle(msg):
    os.write(1, b"begun\\n")
    if deed == "task":
        asyncio.create_task(never())
        return
    if deed == "thread":
        await asyncio.to_thread(time.sleep, 600)
    await never()

async def never():
    while True:
        try:
            await asyncio.sleep(600)
        except (asyncio.CancelledError, Exception):
            pass

async def first():
    await orders.send(1)

runner = ConsumerRunner(consumers, orders, on_startup=[first], shutdown_timeout=0.2)
if how == "run":
    runner.run()
else:
    asyncio.run(runner.serve())
os.write(1, b"ended\\n")
"""


@pytest.mark.parametrize(
    ("how", "deed"), [("run", "handler"), ("serve", "handler"), ("run", "task"), ("run", "thread")]
)
async def test_a_handler_that_nothing_ends_keeps_no_process_alive(tmp_path: Path, how: str, deed: str) -> None:
    with process(tmp_path, STUBBORN, how, deed) as running:
        await said(running, "begun")
        code, output, errors, took = await ends(running, signal.SIGTERM)
    assert (code, took < 20) == (0, True), (took, errors)
    assert output.splitlines() == ["ended"]
    assert "left behind" in errors or deed == "thread"


# --- several runners --------------------------------------------------------------------------------

TWO = """
import asyncio, os, signal, sys
from streamtools import ConsumerFactory, ConsumerRunner, Producer

before = lambda number, frame: None
signal.signal(signal.SIGTERM, before)
signal.signal(signal.SIGINT, before)

def make(name):
    consumers, producer = ConsumerFactory(url="asyncio://"), Producer(name, url="asyncio://")

    @consumers.route(name)
    async def handle(msg):
        os.write(1, b"begun\\n")
        await asyncio.sleep(0.5)
        os.write(1, f"done {name}\\n".encode())

    async def first():
        await producer.send(1)

    return ConsumerRunner(consumers, producer, on_startup=[first])

async def main():
    a, b = make("a"), make("b")
    serving = [asyncio.create_task(r.serve()) for r in (a, b)]
    if sys.argv[1] != "both":  # one of them ends before the signal
        await asyncio.gather(a.ready(), b.ready())
        early, late = (a, b) if sys.argv[1] == "first" else (b, a)
        early.stop()
        await serving[0 if early is a else 1]
        os.write(1, b"one left\\n")
    await asyncio.gather(*serving)
    assert signal.getsignal(signal.SIGTERM) is before and signal.getsignal(signal.SIGINT) is before
    os.write(1, b"ended\\n")

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("which", ["both", "first", "second"])
async def test_two_runners_in_one_loop_end_together_and_undisturbed(tmp_path: Path, which: str, number: int) -> None:
    with process(tmp_path, TWO, which) as running:
        for line in ["begun", "begun"] if which == "both" else ["one left"]:
            await said(running, line)
        code, output, errors, _ = await ends(running, number)
    assert code == 0, errors
    assert output.splitlines()[-1] == "ended"
    if which == "both":
        assert sorted(output.splitlines()[:-1]) == ["done a", "done b"]


async def test_a_handler_that_the_host_has_given_to_its_loop_is_put_back() -> None:
    loop, told = asyncio.get_running_loop(), list[int]()
    loop.add_signal_handler(signal.SIGTERM, told.append, 1)
    try:
        consumers = ConsumerFactory(url="asyncio://")
        consumers.route("orders")(_ignore)
        serving = asyncio.create_task(ConsumerRunner(consumers).serve())
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 10)
        assert told == []
        os.kill(os.getpid(), signal.SIGTERM)
        await reaches(told, 1)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


# --- hooks ------------------------------------------------------------------------------------------


async def test_hooks_that_fail_or_hang_keep_no_later_one_from_running() -> None:
    order: list[str] = []
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("orders")(_ignore)

    async def hangs() -> None:
        order.append("hangs")
        await asyncio.Event().wait()

    def fails() -> None:
        order.append("fails")
        raise LookupError("no such table")

    async def fails_too() -> None:
        order.append("fails too")
        raise KeyError("x")

    producer = Producer("orders", url="asyncio://")
    hooks = [fails, hangs, fails_too, lambda: order.append("last")]
    runner = ConsumerRunner(consumers, producer, on_shutdown=hooks, shutdown_timeout=0.1)
    start = time.monotonic()
    with pytest.raises(ExceptionGroup) as caught:
        async with runner:
            assert producer._connected
    assert order == ["fails", "hangs", "fails too", "last"]
    assert [type(error) for error in caught.value.exceptions] == [LookupError, TimeoutError, KeyError]
    assert "on_shutdown hook" in str(caught.value.exceptions[1]) and "hangs" in str(caught.value.exceptions[1])
    assert not producer._connected
    assert time.monotonic() - start < 20


async def test_one_hook_that_fails_raises_its_own_error() -> None:
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("orders")(_ignore)
    with pytest.raises(ZeroDivisionError):
        async with ConsumerRunner(consumers, on_shutdown=[lambda: 1 / 0]):
            pass


async def test_what_ended_the_start_is_raised_and_what_failed_after_it_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("orders")(_ignore)

    def never_opened() -> None:
        raise AttributeError("it was never opened")

    runner = ConsumerRunner(consumers, on_startup=[lambda: 1 / 0], on_shutdown=[never_opened])
    with pytest.raises(ZeroDivisionError):
        await runner.serve(signals=False)
    assert "it was never opened" in caplog.text


async def test_a_runner_that_was_ended_by_a_signal_runs_again() -> None:
    consumers, seen = ConsumerFactory(url="asyncio://"), list[int]()

    @consumers.route("orders")
    async def handle(msg: int) -> None:
        seen.append(msg)

    runner = ConsumerRunner(consumers)
    for number in range(3):
        serving = asyncio.create_task(runner.serve())
        await eventually(lambda: runner.health().ready)
        async with Producer("orders", url="asyncio://") as producer:
            await producer.send(number)
        await reaches(seen, number + 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 10)
    assert seen == [0, 1, 2]
