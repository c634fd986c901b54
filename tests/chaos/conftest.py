"""Where the chaos happens: a broker or a file that several processes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.process import Record

#: Seconds after which a file's messages come back from a process that was killed.
LEASE = 1

#: Protocols whose messages outlive the process.
DURABLE = [pytest.param("rabbitmq", marks=pytest.mark.rabbitmq), "sqlite"]


@pytest.fixture(params=DURABLE)
def durable_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each durable protocol."""
    return address(request, request.param, tmp_path)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """An empty record."""
    return Record(tmp_path / "record")


def address(request: pytest.FixtureRequest, protocol: str, directory: Path) -> str:
    """An empty place of a protocol's."""
    if protocol == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    return "asyncio://" if protocol == "asyncio" else f"sqlite:///{directory}/queues.db?lease={LEASE}"
