"""The package's public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import streamtools

LOADED = "import sys, streamtools; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


@pytest.mark.parametrize("name", streamtools.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(streamtools, name) is not None
    assert name in dir(streamtools)


def test_the_names_are_sorted_as_ruff_sorts_them() -> None:
    assert sorted(set(streamtools.__all__)) == sorted(streamtools.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Produzer'"):
        streamtools.Produzer  # noqa: B018


def test_importing_the_package_loads_no_library() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)

    loaded = set(done.stdout.split())
    assert "streamtools" in loaded
    assert not loaded & {"aio_pika", "aiormq", "aiohttp", "sqlite3", "pydantic", "asyncio", "typer"}


def test_using_producers_and_consumers_loads_no_client_library() -> None:
    code = LOADED.replace("streamtools;", "streamtools; streamtools.Producer, streamtools.ConsumerRunner;")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = set(done.stdout.split())
    assert "pydantic" in loaded
    assert not loaded & {"aio_pika", "aiormq", "aiohttp", "sqlite3", "pydantic_settings", "typer"}
