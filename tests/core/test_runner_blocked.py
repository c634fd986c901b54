"""How a runner ends when code blocks its event loop, and what a forked child has of its signals."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from streamtools.engine.tasks.signals import SAME_SIGNAL_TIMEOUT
from tests.core.test_runner_ends import SOON, ends, process, said, sleeps

BLOCKING = """
import asyncio, os, sys, time
from streamtools import ConsumerFactory, ConsumerRunner, Producer

how, what = sys.argv[1:]
consumers, orders = ConsumerFactory(url="asyncio://"), Producer("orders", url="asyncio://")

def say(text):
    os.write(1, (text + "\\n").encode())

def block():
    say("blocks")
    time.sleep(600)

async def blocks():
    await asyncio.sleep(0)
    block()

async def cleans_up():
    try:
        await asyncio.sleep(600)
    finally:
        block()

@consumers.route("orders")
async def handle(msg):
    if what == "handler":
        block()
    say("handled")

async def first():
    await orders.send(1)

hooks = {"def": block, "async": blocks, "cleanup": cleans_up, "handler": lambda: None}
runner = ConsumerRunner(
    consumers, orders, on_startup=[first], shutdown_timeout=0.1,
    on_shutdown=[hooks[what], lambda: 1 / 0, lambda: say("last")],
)
try:
    if how == "run":
        runner.run()
    elif how == "asyncio":
        with asyncio.Runner() as loop:
            loop.run(runner.serve())
    else:
        import uvloop
        uvloop.run(runner.serve())
except* TimeoutError as error:
    say(str(error.exceptions[0]))
except* ZeroDivisionError:
    say("divided")
"""


@pytest.mark.parametrize(
    ("how", "what"),
    [("run", "def"), ("run", "async"), ("run", "cleanup"), ("asyncio", "def"), ("uvloop", "def")],
)
async def test_a_hook_that_blocks_the_loop_at_the_end_keeps_no_later_one_from_running(
    tmp_path: Path, what: str, how: str
) -> None:
    if how == "uvloop":
        pytest.importorskip("uvloop")
    with process(tmp_path, BLOCKING, how, what) as running:
        await said(running, "handled")
        code, output, errors, took = await ends(running, signal.SIGTERM)
    assert (code, took < 20) == (0, True), (took, errors)
    told = {
        "def": "block blocked the event loop for more than 5 s, and was interrupted.",
        "async": "blocks blocked the event loop for more than 5 s, and was interrupted.",
        "cleanup": "cleans_up did not end within 5 s, and was cancelled.",
    }
    assert output.splitlines() == ["blocks", "last", f"The on_shutdown hook {told[what]}", "divided"]


@pytest.mark.parametrize("how", ["run", "asyncio", "uvloop"])
async def test_a_handler_that_blocks_the_loop_is_interrupted_when_its_time_is_over(tmp_path: Path, how: str) -> None:
    if how == "uvloop":
        pytest.importorskip("uvloop")
    with process(tmp_path, BLOCKING, how, "handler") as running:
        await said(running, "blocks")
        await sleeps(running)
        code, output, errors, took = await ends(running, signal.SIGTERM)
    assert (code, took < 20) == (0, True), (took, errors)
    assert output.splitlines() == ["last", "divided"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["handler", "def"])
async def test_a_second_signal_ends_at_once_what_blocks_the_loop(tmp_path: Path, what: str, number: int) -> None:
    script = BLOCKING.replace("shutdown_timeout=0.1", "shutdown_timeout=600")
    with process(tmp_path, script, "run", what) as running:
        if what == "def":
            await said(running, "handled")
            running.send_signal(number)
        await said(running, "blocks")
        await sleeps(running)
        if what == "handler":
            running.send_signal(number)
        await asyncio.sleep(4 * SAME_SIGNAL_TIMEOUT)  # sooner, it is the same signal
        code, _, errors, took = await ends(running, number)
    assert (code, took < SOON) == (128 + number, True), (took, errors)


FORKING = """
import asyncio, multiprocessing, os, signal, sys, time
from streamtools import ConsumerFactory, ConsumerRunner, Producer

consumers, orders = ConsumerFactory(url="asyncio://"), Producer("orders", url="asyncio://")

def say(text):
    os.write(1, (text + "\\n").encode())

def works(there):
    there.send("begun")
    while True:  # not one long sleep: a signal that comes just before it is seen after it
        time.sleep(0.1)

@consumers.route("orders")
async def handle(number):
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=works, args=(there,))
    child.start()
    await asyncio.to_thread(here.recv)
    os.kill(child.pid, (signal.SIGTERM, signal.SIGINT)[number])
    await asyncio.to_thread(child.join, 5)
    say(f"child {child.exitcode}")
    child.kill()

async def first():
    await orders.send_many([0, 1])

runner = ConsumerRunner(consumers, orders, on_startup=[first], on_shutdown=[lambda: say("down")])
if __name__ == "__main__":
    asyncio.run(runner.serve()) if "asyncio" in sys.argv else runner.run()
"""


@pytest.mark.parametrize("how", ["asyncio", "run", "command"])
async def test_a_signal_for_a_forked_child_ends_the_child_alone(tmp_path: Path, how: str) -> None:
    arguments = ("-m", "streamtools", "run", "script:runner") if how == "command" else (how,)
    with process(tmp_path, FORKING, *arguments) as running:
        await said(running, f"child {-signal.SIGTERM}")
        await said(running, "child 1")  # KeyboardInterrupt, as in any child of Python
        code, output, errors, took = await ends(running, signal.SIGTERM)
    assert (code, output, took < SOON) == (0, "down\n", True), errors
    assert errors.count("finishing what is in hand") <= 1
