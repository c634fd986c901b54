"""The loop in the background, for code that has none."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from streamtools import background

ROOT = Path(__file__).parents[2]


def test_a_result_and_an_error_come_back() -> None:
    async def add(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    async def fail() -> None:
        raise LookupError("nothing there")

    assert background.run(add(1, 2)) == 3
    with pytest.raises(LookupError, match="nothing there"):
        background.run(fail())


def test_the_loop_does_not_wait_for_itself() -> None:
    async def inner() -> None:
        pass

    async def outer() -> None:
        background.run(inner())

    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        background.run(outer())


def test_stopping_waits_until_the_coroutine_has_cleaned_up() -> None:
    begun, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    under_way = background.start(work())
    assert begun.wait(30)
    under_way.stop()
    assert cleaned.is_set()
    with pytest.raises(asyncio.CancelledError):
        under_way.result()


def test_stopping_at_once_does_not_hang() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    under_way = background.start(work())
    under_way.stop()
    under_way.stop()
    assert under_way.done()


def test_a_forked_process_has_a_loop_of_its_own() -> None:
    code = """
import asyncio, os
from streamtools import background
background.run(asyncio.sleep(0))
child = os.fork()
background.run(asyncio.sleep(0, "fine"))
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ended = subprocess.run(
        # Python 3.12 warns of a fork beside threads, whatever they do.
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_script_ends_without_a_word_about_its_loop() -> None:
    code = "import asyncio; from streamtools import background; print(background.run(asyncio.sleep(0, 'done')))"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_what_is_open_on_it_is_closed_when_the_interpreter_ends(tmp_path: Path) -> None:
    script = """
from streamtools import Consumer, Producer, background
producer, consumer = Producer("orders", url=URL), Consumer("orders", url=URL)
background.run(producer.send("x"))
print(len(background.run(consumer.receive(5, timeout=30))))
"""
    url = f"sqlite:///{tmp_path}/orders.db"
    for number in (1, 2):  # what was in hand is there at once, before a lease has run out
        ended = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", f"URL = {url!r}\n{script}"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{number}\n", "")


def test_a_child_that_is_forked_while_other_threads_send_has_a_loop_of_its_own(tmp_path: Path) -> None:
    script = """
import os, threading
from streamtools import background
stop = threading.Event()

async def here():
    return os.getpid()

def work():
    while not stop.is_set():
        background.run(here())

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(20):
    if (child := os.fork()) == 0:
        os._exit(background.run(here()) != os.getpid())
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print("done")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
