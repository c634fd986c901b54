"""The suite itself."""

from __future__ import annotations

import pytest


def test_one_process_runs_the_tests_of_a_file(request: pytest.FixtureRequest) -> None:
    """Else each process would start brokers of its own, and tests that share a topic would run at the same time."""
    if request.config.getoption("loadgroup", default=False):  # with -n and --dist loadgroup
        assert request.node.nodeid.endswith("@tests/test_suite.py")
