"""Every example runs, with the output that its reader is to expect."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A broker of the test's own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "STREAMTOOLS_URL": f"sqlite:///{tmp_path}/examples.db"}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Run an example to its end."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@contextmanager
def running(
    log: Path, environment: dict[str, str], *arguments: str, cwd: Path = ROOT, ends: bool = False
) -> Iterator[Path]:
    """An example beside the test; gives the file with its output. It must end with 0.

    Parameters:
        ends: it comes to its end by itself; otherwise it runs until SIGTERM.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield log
        if not ends:
            process.send_signal(signal.SIGTERM)
        assert process.wait(120 if ends else 30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_for(log: Path, texts: set[str], seconds: float = 30) -> None:
    """Wait until the output has all these texts."""
    deadline = time.monotonic() + seconds
    while not all(text in log.read_text() for text in texts):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


PAID = {"A-1 paid 89.90", "A-2 paid 153.60", "A-3 paid 415.25"} | {
    f"B-{number} paid {number * 675 / 100:.2f}" for number in range(1, 6)
}


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        (["examples/run.py"], ROOT),
        (["-m", "streamtools", "run", "run:runner", "--workers", "2"], EXAMPLES),
    ],
)
def test_what_the_async_service_sends_is_handled_by_the_runner(
    run: Run, environment: dict[str, str], tmp_path: Path, arguments: list[str], directory: Path
) -> None:
    sent = run("examples/async_service.py")
    assert (sent.returncode, sent.stdout) == (0, "8 orders sent to 'orders'.\n"), sent.stderr

    with running(tmp_path / "log", environment, *arguments, cwd=directory) as log:
        wait_for(log, PAID)

    text = log.read_text()
    assert all(text.count(line) == 1 for line in PAID)
    # A-2's card company answered the second time.
    assert "attempt 1: TimeoutError" in text


@pytest.mark.rabbitmq
def test_the_same_two_programs_run_on_rabbitmq(
    environment: dict[str, str], tmp_path: Path, rabbitmq_vhost: object
) -> None:
    there = {**environment, "STREAMTOOLS_URL": str(getattr(rabbitmq_vhost, "url"))}  # noqa: B009
    command = [sys.executable, "examples/async_service.py"]

    sent = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=60)
    assert sent.stdout == "8 orders sent to 'orders'.\n", sent.stderr
    with running(tmp_path / "log", there, "examples/run.py") as log:
        wait_for(log, PAID)


JOBS = """\
bioconnect-data-package: Package a sample 111111
bioconnect-id-service: Register a package 111111.zip, asked for by l7
No more messages.
"""


@pytest.mark.parametrize("protocol", ["sqlite", "asyncio", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def test_job_messages_go_from_application_to_application(
    environment: dict[str, str], protocol: str, request: pytest.FixtureRequest
) -> None:
    url = {"sqlite": environment["STREAMTOOLS_URL"], "asyncio": "asyncio://"}.get(protocol)
    there = {**environment, "STREAMTOOLS_URL": url or request.getfixturevalue("rabbitmq_vhost").url}

    command = [sys.executable, "examples/jobs.py"]
    ran = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, JOBS), ran.stderr


def test_two_services_meet_in_their_contract_alone(run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    here = EXAMPLES / "two_services"

    with running(tmp_path / "log", environment, "-m", "streamtools", "run", "warehouse:runner", cwd=here):
        shop = run("webshop.py", cwd=here)

    assert shop.returncode == 0, shop.stderr
    assert sorted(shop.stdout.splitlines()) == [
        "W-1: reserved, 1 left",
        "W-2: reserved, 0 left",
        "W-3: sold out, 1 left",
    ]


def test_neither_service_imports_the_other() -> None:
    for name, other in (("webshop", "warehouse"), ("warehouse", "webshop")):
        source = (EXAMPLES / "two_services" / f"{name}.py").read_text()
        assert not re.search(rf"^(from|import) {other}\b", source, re.MULTILINE)


def test_the_handlers_can_be_called_as_functions() -> None:
    code = (
        "import asyncio\n"
        "from streamtools import Message\n"
        "from handlers.payments import Payment, payment\n"
        "message = Message(body=b'', queue='payments', id='1')\n"
        "asyncio.run(payment(Payment(order_id='A-1', amount='1.50'), message))\n"
    )
    called = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert (called.returncode, called.stdout) == (0, "A-1 paid 1.50\n"), called.stderr


def test_the_order_events_are_what_the_generator_writes() -> None:
    code = "import generate; print('\\n'.join(generate.events()))"
    written = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], cwd=EXAMPLES / "data", capture_output=True, check=True
    )

    assert written.stdout.decode() == (EXAMPLES / "data" / "orders.jsonl").read_text("utf-8")


def test_every_example_file_is_run_here() -> None:
    tested = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    reached = {"__init__", "orders", "payments", "contract"}  # by run.py, and by the web apps
    for file in EXAMPLES.rglob("*.py"):
        assert file.stem in reached or file.stem in tested, f"{file} is run by no test"
