"""Pages: what a reader is shown as code, as a command, or as a link."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: the first word behind the fence.
        title: the file's name, where the block is one.
        text: what stands in it, without the indentation that all of it has.
        line: where it begins on its page.
    """

    language: str
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """One Markdown file.

    Attributes:
        path: from the repository's root.
        text: all of it.
    """

    path: str
    text: str

    @property
    def blocks(self) -> list[Block]:
        """Its fenced blocks, in order."""
        return [_block(found, self.text) for found in _FENCE.finditer(self.text)]

    @property
    def prose(self) -> str:
        """What is left without the fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def links(self) -> list[str]:
        """Where its links lead."""
        return _LINK.findall(_INLINE.sub("", self.prose))

    @property
    def spans(self) -> list[str]:
        """What stands between single backticks."""
        return _INLINE.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What a link may name behind `#`."""
        return {_slug(heading) for heading in _HEADING.findall(self.prose)}


def _block(found: re.Match[str], text: str) -> Block:
    language, _, options = found["info"].strip().partition(" ")
    title = _TITLE.search(options)
    line = text.count("\n", 0, found.start()) + 1
    return Block(language, title[1] if title else "", textwrap.dedent(found["text"]), line)


def _slug(heading: str) -> str:
    """The anchor that Markdown's table of contents gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def pages() -> Iterator[Page]:
    """The README, what is for contributors, and the whole of docs/."""
    files = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
    for file in sorted(files):
        yield Page(str(file.relative_to(ROOT)), file.read_text("utf-8"))
