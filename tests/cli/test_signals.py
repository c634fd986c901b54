"""`streamtools run` and signals: at whatever moment one comes, the service ends well, at once, with 0."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.brokers.address import ROOT
from tests.lengths import length

#: Seconds within which a process that has nothing to wait for ends, on a busy machine.
SOON = 20.0
#: Moments between the start of a process and its running; other ones each time that the test runs.
MOMENTS = length(2, 20)

SERVICE = """
import os
from streamtools import ConsumerFactory, ConsumerRunner, Producer

QUEUE = os.environ["QUEUE"]
consumers, sender = ConsumerFactory(), Producer(QUEUE + "-others")

@consumers.route(QUEUE)
async def handle(msg): ...

def say(text):
    os.write(1, f"{text} {os.getpid()}\\n".encode())

runner = ConsumerRunner(consumers, sender, on_startup=[lambda: say("up")], on_shutdown=[lambda: say("down")])
"""

#: Sends the process a signal while it imports a module. What the importing code makes of an exception is its affair.
DURING_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["DURING"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["NUMBER"]))

sys.meta_path.insert(0, Finder())
"""


@contextmanager
def command(
    directory: Path, *options: str, target: str = "service:runner", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`streamtools run` under way, in a process group of its own."""
    (directory / "service.py").write_text(SERVICE)
    running = subprocess.Popen(
        [sys.executable, "-m", "streamtools", "run", target, *options],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{directory}:{ROOT}", **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def ended(running: subprocess.Popen[str]) -> tuple[int, list[str], str, float]:
    """The exit code, the lines of both streams, and the seconds that it took."""
    start = time.monotonic()
    output, errors = running.communicate(timeout=60)
    return running.returncode, output.splitlines(), errors, time.monotonic() - start


def heeds(running: subprocess.Popen[str]) -> bool:
    """Whether it has come to its first line, which takes Python some time."""
    status = Path(f"/proc/{running.pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


def came_down(lines: list[str]) -> bool:
    """Whether each process whose hook of the start has run has run that of the end, and no other one."""
    said = [line.split() for line in lines]
    return sorted(pid for word, pid in said if word == "up") == sorted(pid for word, pid in said if word == "down")


# --- at exactly this moment -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "module",
    ["streamtools.cli.app", "logging", "typer", "pydantic", "streamtools.cli.run", "rich",
     "streamtools.runner", "streamtools.cli.loading", "service", "streamtools.drivers.sqlite", "uvloop"],
)  # fmt: skip
def test_a_signal_during_an_import(tmp_path: Path, module: str, number: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(DURING_IMPORT)
    url = f"sqlite:///{tmp_path}/queues.db"
    with command(tmp_path, STREAMTOOLS_URL=url, QUEUE="orders", DURING=module, NUMBER=str(int(number))) as running:
        code, lines, errors, took = ended(running)
    assert (code, took < SOON) == (0, True), (took, errors)
    assert "Traceback" not in errors
    assert lines == []


def test_a_service_that_catches_everything_as_it_is_imported_ends_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DURING_IMPORT)
    swallows = "try:\n    import not_installed\nexcept:\n    print('swallowed', flush=True)\n" + SERVICE
    (tmp_path / "shop.py").write_text(swallows)
    url = f"sqlite:///{tmp_path}/queues.db"
    environment = {"STREAMTOOLS_URL": url, "QUEUE": "orders", "DURING": "not_installed", "NUMBER": "15"}
    with command(tmp_path, target="shop:runner", **environment) as running:
        code, lines, errors, took = ended(running)
    assert (code, took < SOON, lines) == (0, True, ["swallowed"]), (took, errors)


def test_a_signal_during_a_callback_whose_exceptions_python_ignores(tmp_path: Path) -> None:
    blocks = (
        "import os, signal, time, weakref\n"
        "class Thing: pass\n"
        "thing = Thing()\n"
        "reference = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGTERM), [*range(1000)]))\n"
        "del thing\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "shop.py").write_text(blocks + SERVICE)
    environment = {"STREAMTOOLS_URL": f"sqlite:///{tmp_path}/queues.db", "QUEUE": "orders"}
    with command(tmp_path, target="shop:runner", **environment) as running:
        code, lines, errors, took = ended(running)
    assert (code, took < SOON, lines) == (0, True, []), (took, errors)
    assert "Traceback" not in errors


# --- at any moment ----------------------------------------------------------------------------------


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Empty, and the test's own."""
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    if request.param == "kafka":
        return str(request.getfixturevalue("kafka").url)
    return f"sqlite:///{tmp_path}/queues.db"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), ("--workers", "2"), ("--reload",)], ids=["alone", "workers", "reload"])
@pytest.mark.parametrize(
    "url",
    ["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq), pytest.param("kafka", marks=pytest.mark.kafka)],
    indirect=True,
)
def test_a_signal_at_any_moment_of_the_start(tmp_path: Path, url: str, options: tuple[str, ...]) -> None:
    environment = {"STREAMTOOLS_URL": url, "QUEUE": f"orders-{os.urandom(4).hex()}"}
    processes = 2 if "--workers" in options else 1

    def after(seconds: float) -> tuple[Any, ...]:
        with command(tmp_path, *options, **environment) as running:
            begun = time.monotonic()
            while not heeds(running):
                pass
            while time.monotonic() < begun + seconds:
                pass
            running.send_signal(signal.SIGTERM if int(seconds * 1000) % 2 else signal.SIGINT)
            return (*ended(running), seconds)

    with command(tmp_path, *options, **environment) as running:
        start, ready = time.monotonic(), 0
        assert running.stderr is not None
        while ready < processes:
            ready += "Running: " in (line := running.stderr.readline())
            assert line
        whole = time.monotonic() - start
        running.send_signal(signal.SIGTERM)
        assert ended(running)[0] == 0
    for moment in range(MOMENTS):
        code, lines, errors, took, seconds = after(whole * 1.1 * (moment + random.random()) / MOMENTS)
        assert (code, took < SOON) == (0, True), (seconds, took, errors)
        assert came_down(lines), (seconds, lines, errors)
        assert "Traceback" not in errors, (seconds, errors)
        for word in ("ResourceWarning", "never retrieved", "never awaited", "Exception ignored", "was destroyed"):
            assert word not in errors, (seconds, errors)
