"""`streamtools run`: services as processes, with workers, signals and reload."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

from streamtools.engine.tasks.signals import SAME_SIGNAL_TIMEOUT
from streamtools.text.installation import install_line
from tests.brokers.processes import free_ports
from tests.cli.conftest import ROOT, Cli, Service, received

Start = Callable[..., Service]

SERVICE = """
import asyncio, os
from streamtools import ConsumerFactory, ConsumerRunner, Retry

consumers = ConsumerFactory(retry=Retry(retries=0))

@consumers.route("orders")
async def handle(msg):
    os.write(1, f"begun {msg}\\n".encode())
    if msg == "slow":
        while not os.path.exists("go"):
            await asyncio.sleep(0.01)
    os.write(1, f"handled {msg}\\n".encode())

def up():
    os.write(1, f"up {os.getpid()}\\n".encode())  # one write: two workers share the pipe

runner = ConsumerRunner(consumers, on_startup=[up])
nothing = 5
"""


@pytest.fixture
def service(tmp_path: Path) -> None:
    """A package `shop` with a module `service`, in the directory where commands are started."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "service.py").write_text(SERVICE)


@pytest.mark.usefixtures("service")
class TestOneProcess:
    @pytest.mark.parametrize("name", ["runner", "consumers", "handle"])
    def test_handles_messages_until_sigterm_and_ends_with_0(self, cli: Cli, start: Start, name: str) -> None:
        running = start("run", f"shop.service:{name}")
        cli("send", "orders", "one")

        assert running.wait_for("handled ") == ["one"]
        assert running.end(signal.SIGTERM) == 0

    def test_what_is_in_hand_is_finished_before_the_end(
        self, cli: Cli, start: Start, url: str, tmp_path: Path
    ) -> None:
        running = start("run", "shop.service:runner")
        cli("send", "orders", "slow")
        running.wait_for("begun ")

        running.process.send_signal(signal.SIGINT)
        running.wait_until(lambda: "finishing" in running.output)
        (tmp_path / "go").touch()

        assert running.wait() == 0
        assert running.lines("handled ") == ["slow"]
        assert received(url, "orders") == []

    def test_url_chooses_the_broker(self, start: Start, cli: Cli, tmp_path: Path) -> None:
        other = f"sqlite:///{tmp_path}/other.db"
        running = start("run", "shop.service:runner", "--url", other)
        cli("send", "orders", "one", "--url", other)

        assert running.wait_for("handled ") == ["one"]
        assert running.end() == 0

    @pytest.mark.parametrize(
        ("target", "hint"),
        [
            ("shop.servce:runner", "'shop.service'"),
            ("shop.service:runer", "shop.service:runner"),
            ("shop.service", "shop.service:runner"),
            ("shop/service.py:runner", "shop.service:app"),
            ("shop.service:nothing", "int"),
        ],
    )
    def test_a_wrong_name_ends_with_2_and_names_the_right_one(self, start: Start, target: str, hint: str) -> None:
        running = start("run", target)

        assert running.wait() == 2
        assert hint in running.output
        assert "Traceback" not in running.output

    def test_a_module_that_is_broken_shows_where(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "shop" / "broken.py").write_text("import not_installed_at_all\n")
        running = start("run", "shop.broken:runner")

        assert running.wait() == 1
        assert running.output.count("  File ") == 1
        assert 'broken.py", line 1' in running.output
        assert "No module named 'not_installed_at_all'" in running.output

    def test_a_module_that_is_no_python_shows_where(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "shop" / "broken.py").write_text("runner = = 1\n")
        running = start("run", "shop.broken:runner")

        assert running.wait() == 1
        assert running.output.count("  File ") == 1
        assert 'broken.py", line 1' in running.output

    def test_a_misspelt_option_ends_with_2_and_one_line(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "shop" / "misspelt.py").write_text(SERVICE.replace('route("orders"', 'route("orders", prefech=1'))
        running = start("run", "shop.misspelt:consumers")

        assert running.wait() == 2
        assert "of 'orders' takes no 'prefech'. Did you mean 'prefetch'?" in running.output
        assert "Traceback" not in running.output

    def test_a_hook_that_raises_shows_its_own_lines_alone(self, start: Start, tmp_path: Path) -> None:
        broken = SERVICE.replace("def up():", "def up():\n    raise LookupError('no database')")
        (tmp_path / "shop" / "broken.py").write_text(broken)
        running = start("run", "shop.broken:runner")

        assert running.wait() == 1
        assert running.output.count("  File ") == 1
        assert "LookupError: no database" in running.output

    def test_a_broker_that_cannot_be_used_ends_with_1_and_one_line(self, start: Start) -> None:
        running = start("run", "shop.service:runner", "--url", "sqlite:////nowhere/at/all/x.db")

        assert running.wait() == 1
        assert "Traceback" not in running.output


@pytest.mark.usefixtures("service")
class TestWorkers:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_end_together_with_0(self, start: Start, number: int) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        pids = [int(pid) for pid in running.wait_for("up ", 2)]

        assert running.end(number) == 0
        assert not any(_alive(pid) for pid in pids)

    def test_each_knows_its_number_also_after_it_died(self, start: Start, tmp_path: Path) -> None:
        number = SERVICE.replace("up {os.getpid()}", "up {os.environ['STREAMTOOLS_WORKER']} {os.getpid()}")
        (tmp_path / "shop" / "service.py").write_text(number)
        running = start("run", "shop.service:runner", "--workers", "3")

        first = dict(line.split() for line in running.wait_for("up ", 3))
        os.kill(int(first["1"]), signal.SIGKILL)
        again = running.wait_for("up ", 4)[-1].split()

        assert sorted(first) == ["0", "1", "2"]
        assert again[0] == "1"
        assert running.end() == 0

    def test_a_worker_that_dies_is_started_again(self, cli: Cli, start: Start) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        first = running.wait_for("up ", 2)
        os.kill(int(first[0]), signal.SIGKILL)

        assert len(set(running.wait_for("up ", 3))) == 3
        cli("send", "orders", "one")
        assert running.wait_for("handled ") == ["one"]
        assert running.end() == 0

    def test_workers_end_by_themselves_when_their_parent_is_killed(self, start: Start) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        pids = [int(pid) for pid in running.wait_for("up ", 2)]

        running.process.kill()

        running.wait_until(lambda: not any(_alive(pid) for pid in pids))

    def test_finish_what_is_in_hand(self, cli: Cli, start: Start, tmp_path: Path) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        running.wait_for("up ", 2)
        cli("send", "orders", "slow")
        running.wait_for("begun ")

        running.process.send_signal(signal.SIGTERM)
        running.wait_until(lambda: "finishing" in running.output)
        (tmp_path / "go").touch()

        assert running.wait() == 0
        assert running.lines("handled ") == ["slow"]

    def test_a_second_signal_ends_at_once_with_1(self, cli: Cli, start: Start) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        running.wait_for("up ", 2)
        cli("send", "orders", "slow")
        running.wait_for("begun ")

        running.process.send_signal(signal.SIGTERM)
        running.wait_until(lambda: running.output.count("finishing") == 2)

        first = time.monotonic()
        running.wait_until(lambda: time.monotonic() > first + 4 * SAME_SIGNAL_TIMEOUT)  # sooner, it is the same one

        assert running.end() == 1

    def test_a_protocol_that_processes_cannot_share_is_refused(self, start: Start) -> None:
        running = start("run", "shop.service:runner", "--workers", "2", "--url", "asyncio://")

        assert running.wait() == 2
        assert "leave --workers out" in running.output

    def test_a_service_that_dies_again_and_again_ends_the_command_with_1(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "shop" / "service.py").write_text(SERVICE + "\nos._exit(3)\n")
        running = start("run", "shop.service:runner", "--workers", "1", "--log-level", "warning", "--reload")
        running.wait_until(lambda: "starts again when a file changes" in running.output)
        assert running.end() == 0

        running = start("run", "shop.service:runner", "--workers", "2", "--log-level", "warning")
        assert running.wait() == 1
        assert "for the 6th time" in running.output

    def test_a_wrong_name_is_not_tried_again(self, start: Start) -> None:
        running = start("run", "shop.service:nobody", "--workers", "2", "--log-level", "warning")

        assert running.wait() == 2
        assert "starting it again" not in running.output


def health(port: int, path: str = "") -> tuple[int, dict[str, Any]]:
    """The status and the report; status 0 while nobody listens."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/health{path}", timeout=30) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)
    except (URLError, ConnectionError):
        return 0, {}


def _is_ready(port: int) -> bool:
    return health(port, "/ready")[0] == 200


@pytest.fixture
def port(service: None, tmp_path: Path) -> int:
    """The service's health port."""
    port = free_ports(1)[0]
    module = tmp_path / "shop" / "service.py"
    module.write_text(SERVICE.replace("on_startup=[up])", f"on_startup=[up], health_port={port})"))
    return port


@pytest.mark.usefixtures("service")
class TestHealth:
    def test_of_all_workers_is_told_at_one_port(self, start: Start, port: int) -> None:
        running = start("run", "shop.service:runner", "--workers", "3")
        running.wait_until(lambda: health(port, "/ready")[0] == 200)

        status, report = health(port)

        assert status == 200
        assert [worker["worker"] for worker in report["workers"]] == [0, 1, 2]
        assert {worker["state"] for worker in report["workers"]} == {"running"}
        assert [(loop["worker"], loop["queue"]) for loop in report["loops"]] == [(n, "orders") for n in range(3)]
        assert health(port, "/live")[0] == 200
        assert running.end() == 0
        assert health(port) == (0, {})

    def test_a_worker_that_died_is_not_ready_until_its_successor_is(self, start: Start, port: int) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        running.wait_until(lambda: health(port, "/ready")[0] == 200)
        victim = health(port)[1]["workers"][1]["pid"]

        os.kill(victim, signal.SIGKILL)

        running.wait_until(lambda: health(port, "/ready")[0] == 503)
        assert health(port, "/live")[0] == 200
        running.wait_until(lambda: health(port, "/ready")[0] == 200)
        assert health(port)[1]["workers"][1]["pid"] != victim
        assert running.end() == 0

    def test_a_worker_that_stands_still_is_not_live(self, start: Start, port: int) -> None:
        running = start("run", "shop.service:runner", "--workers", "2")
        running.wait_until(lambda: health(port, "/ready")[0] == 200)
        victim = health(port)[1]["workers"][0]["pid"]

        os.kill(victim, signal.SIGSTOP)
        try:
            assert health(port, "/ready")[0] == health(port, "/live")[0] == 503
            assert [worker["state"] for worker in health(port)[1]["workers"]] == ["silent", "running"]
        finally:
            os.kill(victim, signal.SIGCONT)

        running.wait_until(lambda: health(port, "/ready")[0] == 200)
        assert running.end() == 0

    def test_a_worker_whose_start_hangs_is_not_ready(self, start: Start, port: int, tmp_path: Path) -> None:
        module = tmp_path / "shop" / "service.py"
        hangs = "import time\n\ndef up():\n    time.sleep(600 * (os.environ['STREAMTOOLS_WORKER'] == '1'))\n"
        module.write_text(module.read_text().replace("def up():", f"{hangs}\ndef _():"))
        running = start("run", "shop.service:runner", "--workers", "2")

        running.wait_until(lambda: health(port)[0] == 200)
        running.wait_until(lambda: health(port)[1]["workers"][0]["ready"])

        assert health(port, "/ready")[0] == 503
        assert health(port)[1]["workers"][1]["state"] == "starting"
        assert running.end() == 0

    def test_of_a_worker_that_is_started_anew_at_each_change(self, start: Start, port: int) -> None:
        running = start("run", "shop.service:runner", "--reload")
        running.wait_until(lambda: health(port, "/ready")[0] == 200)
        assert running.end() == 0

    def test_workers_that_name_ports_of_their_own_have_them(self, start: Start, port: int, tmp_path: Path) -> None:
        module, ports = tmp_path / "shop" / "service.py", free_ports(2)
        own = f"health_port={ports}[int(os.environ['STREAMTOOLS_WORKER'])]"
        module.write_text(module.read_text().replace(f"health_port={port}", own))
        running = start("run", "shop.service:runner", "--workers", "2")

        for number, own_port in enumerate(ports):
            running.wait_until(partial(_is_ready, own_port))
            assert [worker["worker"] for worker in health(own_port)[1]["workers"]] == [number]
        assert running.end() == 0

    def test_a_port_that_is_taken_ends_the_command_with_1(self, start: Start, port: int) -> None:
        with socket.create_server(("127.0.0.1", port)):
            running = start("run", "shop.service:runner", "--workers", "2")

            assert running.wait() == 1
        assert f"cannot listen on 127.0.0.1:{port}" in running.output
        assert "Traceback" not in running.output


@pytest.mark.usefixtures("service")
class TestReload:
    def test_a_changed_file_starts_the_service_anew(self, cli: Cli, start: Start, tmp_path: Path) -> None:
        running = start("run", "shop.service:runner", "--reload")
        running.wait_for("up ")
        module = tmp_path / "shop" / "service.py"

        module.write_text(SERVICE.replace("handled {msg}", "done {msg}"))

        running.wait_for("up ", 2)
        cli("send", "orders", "one")
        assert running.wait_for("done ") == ["one"]
        assert running.end() == 0

    def test_after_a_mistake_it_waits_for_the_next_change(self, start: Start, tmp_path: Path) -> None:
        running = start("run", "shop.service:runner", "--reload")
        running.wait_for("up ")
        module = tmp_path / "shop" / "service.py"

        module.write_text("this is no Python\n")
        running.wait_until(lambda: "starts again when a file changes" in running.output)
        module.write_text(SERVICE)

        running.wait_for("up ", 2)
        assert running.end() == 0


def test_python_m_streamtools_is_the_command(start: Start) -> None:
    running = start("--help")

    assert running.wait() == 0
    assert "Usage: streamtools" in running.output


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_the_command_says_what_to_install(tmp_path: Path, url: str, package: str) -> None:
    # A package of this name that cannot be found any more, whether or not it is installed.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "STREAMTOOLS_URL": url}

    import subprocess

    ended = subprocess.run(
        [sys.executable, "-m", "streamtools", "queues", "list"], env=environment, capture_output=True, text=True
    )

    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        f"The command line needs {package}, not installed here. Install the extra: {install_line('cli')}"
    )


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
