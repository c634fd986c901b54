"""What `make dist` makes: the same bytes for the same commit, with hashes and a list of what it brings along."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(os.environ.get("VENV", ROOT / ".venv")).resolve() / "bin"
#: What a distribution is made from.
SOURCES = ("streamtools", "examples", "docs", "scripts", "pyproject.toml")
FILES = ("README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not (BIN / "cyclonedx-py").exists(), reason="needs `make lint` once, which installs the tools"
    ),
]


def make(folder: Path, *, umask: int, zone: str) -> Path:
    """Copy the sources there, as another machine would have them, and build; the folder with what was made."""
    folder.mkdir(parents=True)
    for name in (*SOURCES, *FILES):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.db*"))
        elif source.exists():
            shutil.copy(source, folder)
    for path in folder.rglob("*"):
        os.utime(path, (umask + 1e9, umask + 1e9))
        if umask == 0o077:
            path.chmod(path.stat().st_mode & 0o700)
    environment = {**os.environ, "VENV": str(BIN.parent), "SOURCE_DATE_EPOCH": "1767225600", "TZ": zone}
    done = subprocess.run(
        ["scripts/dist"], cwd=folder, env=environment, umask=umask, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("one") / "here", umask=0o022, zone="UTC")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_it_is_the_same_elsewhere(made: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "a folder of another name", umask=0o077, zone="Asia/Tokyo")
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in made.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_the_hashes_are_of_all_that_was_made(made: Path) -> None:
    lines = dict(reversed(line.split("  ")) for line in (made / "SHA256SUMS").read_text().splitlines())
    assert set(lines) == {path.name for path in made.iterdir()} - {"SHA256SUMS"}
    for name, digest in lines.items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=made, check=True)


def test_the_sbom_names_what_a_service_brings_along_and_no_tool(made: Path) -> None:
    sbom = json.loads(only(made, "*.cdx.json").read_text())
    assert (sbom["bomFormat"], sbom["metadata"]["component"]["name"]) == ("CycloneDX", "streamtools-asyncio")
    parts = {part["name"].lower().replace("_", "-"): part for part in sbom["components"]}
    assert {"pydantic", "pydantic-settings", "aio-pika", "aiormq", "aiohttp", "aiokafka", "typer", "rich"} <= set(
        parts
    )
    assert not {"pytest", "ruff", "mypy", "pip", "bandit", "streamtools-asyncio", "streamtools"} & set(parts)
    for part in parts.values():
        assert part["purl"].startswith(f"pkg:pypi/{part['name'].lower().replace('_', '-')}@{part['version']}")
    (root,) = (each for each in sbom["dependencies"] if each["ref"] == sbom["metadata"]["component"]["bom-ref"])
    assert len(root["dependsOn"]) >= 8


def test_the_wheel_holds_the_package_alone(made: Path) -> None:
    with zipfile.ZipFile(only(made, "*.whl")) as wheel:
        names = wheel.namelist()
    assert all(re.match(r"streamtools(_asyncio-[\d.]+\.dist-info)?/", name) for name in names)
    assert "streamtools/py.typed" in names and "streamtools/cli/demo/orders.jsonl" in names
    with tarfile.open(only(made, "*.tar.gz")) as sdist:
        members = sdist.getmembers()
    inside = {member.name.partition("/")[2] for member in members}
    assert {name for name in FILES if (ROOT / name).exists()} | {"pyproject.toml"} <= inside
    assert {(member.uid, member.uname) for member in members} == {(0, "")}


def test_nothing_made_names_the_machine(made: Path) -> None:
    for path in (only(made, "*.cdx.json"), made / "SHA256SUMS"):
        text = path.read_text()
        assert str(ROOT) not in text and str(made.parent) not in text and "file:" not in text
