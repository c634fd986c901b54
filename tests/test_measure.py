"""`make measure`: it counts what it says it counts, in a package made up for the purpose and in this one."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "measure"

SHOP = '''"""A docstring
of two lines."""

from typing import ClassVar, Final

#: Seconds between two looks, and the most of it.
LOOK: Final = 0.5
MOST: Final = 10.0
ROWS: Final = 100
#: Rows that are read within WINDOW seconds.
LIMIT: Final = 5
CLOSE_TIMEOUT: Final = 2 * 30
TEXT: Final = """three
# lines, no comment

of a string"""


class Lane:  # comments do not count
    """Keeps a, b, c, d and e."""

    __slots__ = ("a", "b")
    c: int = 0
    shared: ClassVar[int] = 1

    def __init__(self, other: "Lane") -> None:
        """Not code."""
        self.a, self.d = 1, 2
        self.e: int = 3
        other.f = 4

        class Inner:
            def __init__(self) -> None:
                self.g = 5

    def lane(self) -> int:
        try:
            return (
                self.a
            )
        except (ValueError, BaseException):
            return 0
'''

CLIENT = """import aiokafka._private
from aiokafka.records import Batch, _Fast


def look(client, batch):
    client._fetcher.pause(batch._own, batch.__class__, client.public)


def _own():
    pass
"""

DATA = """from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fixed:
    one: int
    two: int


@dataclass
class Open:
    one: int
    two: int


class Fields:
    one: int
"""


@pytest.fixture(scope="module")
def measure() -> Any:
    loader = SourceFileLoader("measure", str(SCRIPT))
    spec = importlib.util.spec_from_loader("measure", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module  # where its dataclass looks for its annotations
    loader.exec_module(module)
    del sys.modules["measure"]
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    long = "def long() -> None:\n" + "    print()\n" * 40
    for path, text in {
        "shop.py": SHOP,
        "cli/demo/data.py": DATA,
        "drivers/kafka/client.py": CLIENT,
        "drivers/memory.py": long + "\n" * 500,
        "testing/conformance/__init__.py": "assert True\n",
    }.items():
        file = tmp_path / "streamtools" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_lines_of_code_are_those_without_blanks_comments_and_docstrings(measure: Any, root: Path) -> None:
    assert measure.code(measure.read(root)) == {
        "all": 87,
        "without_conformance_and_demo": 75,
        "rooms": {"conformance": 1, "core": 28, "demo": 11, "drivers/kafka": 6, "drivers/memory": 41},
    }


def test_functions_and_files_that_are_too_long_are_named(measure: Any, root: Path) -> None:
    sources = measure.read(root)
    found = measure.functions(sources)
    assert (found["count"], found["median"], found["p90"]) == (6, 4.5, 41)
    assert found["longest"] == found["over"] == [(41, "long", "drivers/memory.py:1")]
    assert measure.long_files(sources) == [(541, "drivers/memory.py")]


def test_attributes_are_what_code_sets_and_what_is_declared_but_no_fixed_data(measure: Any, root: Path) -> None:
    found = measure.classes(measure.read(root))
    assert {name: number for number, name, _ in found["largest"]} == {
        "Lane": 5,
        "Open": 2,
        "Inner": 1,
        "Fixed": 0,
        "Fields": 0,
    }
    assert found["over"] == 0


def test_durations_are_told_from_other_numbers_by_comment_and_name(measure: Any, root: Path) -> None:
    found = [line.split(" ", 1)[1] for line in measure.durations(measure.read(root))]
    assert found == ["LOOK = 0.5", "MOST = 10.0", "CLOSE_TIMEOUT = 2 * 30"]


def test_private_names_of_clients_are_found_where_they_are_imported_and_reached(measure: Any, root: Path) -> None:
    assert measure.private_names(measure.read(root)) == {
        "drivers/kafka/client.py": {
            "imported": ["aiokafka._private", "aiokafka.records._Fast"],
            "reached": ["_fetcher"],
        }
    }


def test_broad_excepts_and_words_for_several_things_are_counted(measure: Any, root: Path) -> None:
    sources = measure.read(root)
    [place] = measure.broad_excepts(sources)
    assert place.startswith("shop.py:")
    assert measure.words(sources) == {
        "lane": {"classes": 1, "functions": 1},
        "look": {"functions": 1, "constants": 1},
    }


def test_a_folder_without_the_package_is_refused(measure: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no Python files; --root takes a checkout"):
        measure.read(tmp_path)


def test_the_calls_of_one_message_are_counted_in_the_package_of_the_checkout(measure: Any) -> None:
    for counted in measure.message_calls(ROOT, rounds=2).values():
        assert counted["calls"] > counted["changes"] > counted["files"] > 5


def test_it_prints_a_table_or_json_and_why_calls_were_not_counted(
    measure: Any, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["measure", "--root", str(root), "--json"])
    measure.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["code"]["all"] == 87 and len(figures["durations"]) == 3
    table = measure.text(figures)
    assert "longest 41: long (drivers/memory.py:1)" in table
    assert "drivers/kafka/client.py 2 + 1" in table
    assert "not counted: " in table  # the made-up package cannot send
