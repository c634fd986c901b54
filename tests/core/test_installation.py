"""What errors advise to install is this package, from where it came; never another project of the same name."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from streamtools.text.installation import DISTRIBUTION, install_line

ROOT = Path(__file__).resolve().parents[2]


class Installed:
    """A distribution with this direct_url.json (PEP 610)."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, 'pip install "streamtools-asyncio[kafka]"'),
        ({"url": "file:///src/my%20clone", "dir_info": {}}, 'pip install "/src/my clone[kafka]"'),
        ({"url": "file:///src/clone", "dir_info": {"editable": True}}, 'pip install -e "/src/clone[kafka]"'),
        (
            {"url": "file:///d/st-1-py3-none-any.whl", "archive_info": {}},
            'pip install "/d/st-1-py3-none-any.whl[kafka]"',
        ),
        (
            {"url": "https://me:secret@host/st.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            'pip install "streamtools-asyncio[kafka] @ git+https://host/st.git@abc"',
        ),
        (
            {"url": "https://host/st.whl", "archive_info": {}},
            'pip install "streamtools-asyncio[kafka] @ https://host/st.whl"',
        ),
    ],
)
def test_the_line_installs_from_where_this_came(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, line: str
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(origin))
    assert install_line("kafka") == line


def test_the_line_names_the_source_tree_when_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_line("cli") == f'pip install "{ROOT}[cli]"'


def test_no_text_of_ours_advises_to_install_another_project() -> None:
    advice = re.compile(r"""pip install (?!-)['"]?streamtools(?!-asyncio)""")
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "streamtools").rglob("*.py")]
    assert texts
    assert not [str(path) for path in texts if advice.search(path.read_text()) and path.name != "installation.py"]


def test_the_distribution_has_this_name_and_is_imported_as_streamtools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == DISTRIBUTION
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["streamtools"]
    assert metadata.metadata(DISTRIBUTION)["Name"] == DISTRIBUTION
