"""Protocols of other packages, installed as such: a module, a dist-info, an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
from streamtools.drivers.asyncio import AsyncIOAdmin, AsyncIOConsumer, AsyncIOProducer
from streamtools.settings import AsyncIOSettings


class PaperPlaneSettings(AsyncIOSettings):
    protocol = "paperplane"
    schemes = ("paperplane",)


class PaperPlaneProducer(AsyncIOProducer, protocol="paperplane"):
    settings_class = PaperPlaneSettings


class PaperPlaneConsumer(AsyncIOConsumer, protocol="paperplane"):
    settings_class = PaperPlaneSettings


class PaperPlaneAdmin(AsyncIOAdmin, protocol="paperplane"):
    settings_class = PaperPlaneSettings
"""
CONFORMANCE = """
import pytest
from streamtools.testing.conformance.administration import AdministrationCases
from streamtools.testing.conformance.receiving import ReceivingCases
from streamtools.testing.conformance.sending import SendingCases


class TestPaperPlane(SendingCases, ReceivingCases, AdministrationCases):
    protocol = "paperplane"

    @pytest.fixture
    def url(self):
        return "paperplane://"
"""


def install(folder: Path, name: str, protocol: str, module: str, **files: str) -> None:
    """As pip would: the package's modules, and beside them what it says of itself."""
    package = folder / name
    package.mkdir(parents=True)
    for file, text in {"__init__": "", **files}.items():
        (package / f"{file}.py").write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[streamtools.protocols]\n{protocol} = {module}\n")


def python(folder: Path, *line: str) -> str:
    """What Python prints with this folder on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(folder)])}
    done = subprocess.run(
        [sys.executable, *line], env=environment, cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package whose entry point names one module, and whose classes stand in another."""
    install(
        tmp_path, "paperplane", "paperplane", "paperplane.plugin", driver=DRIVER, plugin="import paperplane.driver"
    )
    return tmp_path


def test_an_installed_protocol_is_there_by_name_and_by_url(installed: Path) -> None:
    script = """
import asyncio, sys
from streamtools import CONSUMER_LOOPS, PRODUCERS, Consumer, ConsumerFactory, HandlerFactory, Producer, QueueAdmin

assert "paperplane" in PRODUCERS and "paperplane" in list(CONSUMER_LOOPS)
assert "paperplane" not in sys.modules, "nothing is imported before it is used"
assert type(Producer("orders", url="paperplane://")) is PRODUCERS["paperplane"]
pairs = HandlerFactory({"orders": {"consumer_loop": "paperplane", "producer": "paperplane"}})
factory = ConsumerFactory("paperplane")

@factory.route("orders")
async def order(msg):
    print("handled", msg)
    factory.instances[0].stop()

async def main():
    await pairs["orders"].producer.send("hello")
    await order()
    async with QueueAdmin(url="paperplane://") as admin:
        print([info.name for info in await admin.list()])

asyncio.run(main())
"""
    assert python(installed, "-c", script).splitlines() == ["handled hello", "['error', 'orders']"]


def test_it_may_be_imported_before_it_is_looked_up_and_after(installed: Path) -> None:
    script = """
from streamtools import PRODUCERS
list(PRODUCERS)
import paperplane.driver
assert PRODUCERS["paperplane"] is paperplane.driver.PaperPlaneProducer
"""
    python(installed, "-c", script)
    python(installed, "-c", script.replace("list(PRODUCERS)\n", ""))


def test_it_passes_the_conformance_suite(installed: Path) -> None:
    (installed / "test_paperplane.py").write_text(CONFORMANCE)
    (installed / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    summary = python(installed, "-m", "pytest", "-q", "test_paperplane.py").splitlines()[-1]
    assert "passed" in summary and int(summary.split(" passed")[0]) > 60


def test_two_packages_of_one_protocol_are_an_error_that_names_both(installed: Path) -> None:
    install(installed, "origami", "paperplane", "origami.driver", driver=DRIVER)
    script = """
from streamtools import PRODUCERS, Producer
from streamtools.errors import ConfigurationError
for look in (lambda: PRODUCERS["paperplane"], lambda: Producer("orders", url="paperplane://")):
    try:
        look()
    except ConfigurationError as error:
        print(error)
PRODUCERS["sqlite"]
"""
    lines = python(installed, "-c", script).splitlines()
    assert len(lines) == 2
    assert all("paperplane.plugin" in line and "origami.driver" in line and "Uninstall" in line for line in lines)


def test_a_package_cannot_take_a_built_in_protocol(tmp_path: Path) -> None:
    install(tmp_path, "evil", "sqlite", "evil.driver", driver=DRIVER.replace("paperplane", "sqlite"))
    script = """
from streamtools import PRODUCERS
list(PRODUCERS)
print(PRODUCERS["sqlite"].__module__)
try:
    import evil.driver
except ValueError as error:
    print(error)
"""
    text = python(tmp_path, "-c", script)
    assert "evil.driver announces 'sqlite'" in text
    assert "streamtools.drivers.sqlite" in text and "'sqlite' is taken" in text


def test_a_package_that_lacks_something_says_for_which_protocol(tmp_path: Path) -> None:
    install(tmp_path, "broken", "broken", "broken.driver", driver="import paper_that_is_out")
    script = """
import traceback
from streamtools import PRODUCERS
try:
    PRODUCERS["broken"]
except ModuleNotFoundError:
    print(traceback.format_exc())
"""
    text = python(tmp_path, "-c", script)
    assert "paper_that_is_out" in text and "for the protocol 'broken': broken.driver" in text
