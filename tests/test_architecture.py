"""The page on the architecture names what is there, and every room."""

from __future__ import annotations

import ast
import re

import pytest

from tests.pages.markdown import ROOT
from tests.pages.rooms import BANDS, PACKAGE, PICTURE, layers, picture

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
    rooms = {room for layer in layers() for room in layer} - {"jobs", "handlers"}  # older names
    assert {room for room in rooms if f"`{room}/`" not in PAGE and f"`{room}.py`" not in PAGE} == set()


def test_the_picture_shows_the_layers_as_they_are() -> None:
    assert PICTURE.read_text("utf-8") == picture(), "draw it anew: python -m tests.pages.rooms"
    assert BANDS.keys() <= {room for layer in layers() for room in layer}
