"""The check for known vulnerabilities: what it finds, and what it says where no service answers."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "advisories"


@pytest.fixture
def advisories() -> Any:
    loader = SourceFileLoader("advisories", str(SCRIPT))
    spec = importlib.util.spec_from_loader("advisories", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_nothing_is_known_against_what_is_used(advisories: Any) -> None:
    assert advisories.too_old() == []
    assert {"aiohttp", "aiokafka", "pydantic", "yarl", "pydantic-core"} <= set(advisories.closure())


def test_a_bound_and_an_installed_version_that_are_too_old_are_named(
    advisories: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisories, "KNOWN", (("aiohttp", "999", "CVE-1", "x"), ("yarl", "999", "CVE-2", "y")))
    first, second, third = advisories.too_old()
    assert first.startswith("pyproject.toml allows aiohttp 3.") and "CVE-1" in first and "999" in first
    assert second.startswith("installed here is aiohttp")
    assert third.startswith("installed here is yarl")


def test_where_no_service_answers_it_says_so_and_does_not_fail(
    advisories: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for printed, why in (
        ("", "pip-audit failed: no such module"),
        ("[]", "pip-audit failed"),
        ('{"dependencies": [{"name": "aiohttp", "skip_reason": "?"}]}', "does not know aiohttp"),
        ('{"dependencies": [{"name": "aiohttp", "version": "3.9.3", "vulns": []}]}', "has nothing against aiohttp"),
    ):
        done = subprocess.CompletedProcess([], 1, printed, "Traceback\nno such module\n")
        monkeypatch.setattr(advisories.subprocess, "run", lambda *_, done=done, **__: done)
        assert advisories.main() == 0
        said = capsys.readouterr().out
        assert f"note: no advisory service answers here: {why}" in said or f"here: the service {why}" in said
        assert "the list in scripts/advisories alone" in said


def test_what_a_service_knows_fails_unless_it_is_accepted(
    advisories: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"name": "aiohttp", "version": "3.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1"]}]}]
    monkeypatch.setattr(advisories, "audit", lambda requirements: found)
    assert advisories.main() == 1
    assert "aiohttp 3.0 has PYSEC-1" in capsys.readouterr().out
    monkeypatch.setattr(advisories, "ACCEPTED", {"PYSEC-1": "we do not do that"})
    assert advisories.main() == 0
