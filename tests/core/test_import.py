"""Importing streamtools does nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import streamtools
from streamtools.text.installation import install_line


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_it_loads_no_client_library_and_no_driver() -> None:
    code = "import streamtools, sys; streamtools.Producer, streamtools.ConsumerRunner; print(*sys.modules)"
    loaded = set(run(code).split())
    clients = {"aio_pika", "aiormq", "pamqp", "aiohttp", "sqlite3", "typer", "rich", "uvloop", "pytest"}
    assert not loaded & clients
    assert not [name for name in loaded if name.startswith("streamtools.drivers")]


def test_it_reads_no_environment_and_opens_nothing() -> None:
    code = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event.startswith(("socket.", "subprocess")) else None)
import asyncio, streamtools
for name in streamtools.__all__:
    getattr(streamtools, name)
assert asyncio.events._get_running_loop() is None
print(seen)
"""
    assert run(code) == "[]"


def test_every_public_name_is_there_and_sorted() -> None:
    constants = [n for n in streamtools.__all__ if n.isupper()]
    others = [n for n in streamtools.__all__ if not n.isupper()]
    assert constants == sorted(constants)
    assert others == sorted(others, key=str.casefold) or others == sorted(others)
    for name in streamtools.__all__:
        assert getattr(streamtools, name) is not None
    with pytest.raises(AttributeError, match="Producers"):
        streamtools.Producers


def test_the_testing_tools_load_pytest_only_for_the_suite() -> None:
    assert "pytest" not in run("import streamtools.testing, sys; print(*sys.modules)").split()


@pytest.mark.parametrize("package", ["pytest", "pytest_asyncio"])
def test_without_pytest_the_suite_says_what_to_install(package: str) -> None:
    code = f"""
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)
import streamtools.testing
try:
    streamtools.testing.ConformanceSuite
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code) == (
        f"ConformanceSuite needs {package}, not installed here. Install the extra: {install_line('testing')}"
    )
