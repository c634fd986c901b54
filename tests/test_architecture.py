"""The page on the architecture names what is there, and every room."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "streamtools"
PAGE = (ROOT / "docs" / "contribute" / "architecture.md").read_text("utf-8")
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)`", PAGE)) - {"options.py"})
NAMES = sorted(set(re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", PAGE)))


@pytest.mark.parametrize("path", PLACES)
def test_a_file_that_it_names_is_there(path: str) -> None:
    assert (PACKAGE / path).is_file()


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_name_is_defined_in_the_file_that_it_is_said_to_be_in(path: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse((PACKAGE / path).read_text("utf-8")).body
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        [found] = [node for node in body if isinstance(node, kinds) and node.name == part][:1] or [None]
        assert found is not None, f"{part} of {name}"
        body = found.body


def test_every_room_is_on_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    rooms = {
        room for layer in contracts[0]["layers"] for room in re.findall(r"\((\w+)\)", layer) if _is_there(room)
    } - {"jobs", "handlers"}  # older names
    assert {room for room in rooms if f"`{room}/`" not in PAGE and f"`{room}.py`" not in PAGE} == set()


def _is_there(room: str) -> bool:
    return (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
