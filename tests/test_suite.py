"""The suite itself."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tests.faults.left_open import left_open


def test_one_process_runs_the_tests_of_a_file(request: pytest.FixtureRequest) -> None:
    """Else each process would start brokers of its own, and tests that share a topic would run at the same time."""
    if request.config.getoption("loadgroup", default=False):  # with -n and --dist loadgroup
        assert request.node.nodeid.endswith("@tests/test_suite.py")


def test_a_connection_that_is_left_open_is_seen_when_its_loop_is_closed() -> None:
    near, far = socket.socketpair()
    loop: Any = asyncio.new_event_loop()
    transport, _ = loop.run_until_complete(loop.create_connection(asyncio.Protocol, sock=near))
    loop.close()
    assert len(left_open) == 1
    left_open.clear()
    transport._sock = None  # asyncio would warn of it, too
    near.close()
    far.close()
