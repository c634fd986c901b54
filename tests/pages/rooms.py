"""The picture of the rooms, drawn from the layers that import-linter checks.

python -m tests.pages.rooms        draws docs/assets/rooms.svg anew
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

from tests.pages.markdown import ROOT

PICTURE: Final = ROOT / "docs" / "assets" / "rooms.svg"
PACKAGE: Final = ROOT / "streamtools"
#: The first room of each band, with the band's words and colours: room -> (words, fill, line).
BANDS: Final = {
    "cli": ("for operators and tests", "#dcfce7", "#15803d"),
    "bus": ("commands and events", "#e0e7ff", "#4f46e5"),
    "drivers": ("protocols", "#fef3c7", "#b45309"),
    "consumer": ("what users call", "#e0e7ff", "#4f46e5"),
    "engine": ("the way of a message", "#fee2e2", "#b91c1c"),
    "driver": ("hooks of drivers", "#fef3c7", "#b45309"),
    "retry": ("nouns, checks, texts", "#f1f5f9", "#334155"),
}
WIDTH: Final = 760
BOX: Final = 34
GAP: Final = 8
#: Left of the rooms, for the words of the bands.
MARGIN: Final = 165
FONT: Final = "font-family=\"system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif\""


def layers() -> list[list[str]]:
    """The rooms from the top down, as import-linter knows them: those of one layer do not import each other."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    found = [[room for room in re.findall(r"\w+", layer) if _is_there(room)] for layer in contracts[0]["layers"]]
    return [layer for layer in found if layer]


def picture() -> str:
    """The picture, as SVG."""
    rows, y = [], GAP
    words, fill, line = "", "", ""
    for layer in layers():
        for room in layer:
            if room in BANDS:
                words, fill, line = BANDS[room]
                rows.append(
                    f'<text x="{GAP + 4}" y="{y + BOX / 2 + 5:g}" font-size="13" fill="{line}">{words}</text>'
                )
        rows += _row(layer, y, fill, line)
        y += BOX + GAP
    told = ". ".join(", ".join(layer) for layer in layers())
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    lines = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc" {FONT}>',
        '<title id="title">The rooms of the package</title>',
        f'<desc id="desc">From the top down; a room imports only rooms below it. {told}.</desc>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="12" fill="#ffffff" stroke="#cbd5e1"/>',
        *rows,
        "</svg>",
    )
    return "\n".join(lines) + "\n"


def _row(layer: list[str], y: int, fill: str, line: str) -> list[str]:
    width = (WIDTH - MARGIN - GAP * (len(layer) + 1)) / len(layer)
    rows, letters = [], min(_size(room, width) for room in layer)
    for number, room in enumerate(layer):
        x, middle = MARGIN + GAP + number * (width + GAP), y + BOX / 2 + 5
        text = f'x="{x + width / 2:.1f}" y="{middle:g}" text-anchor="middle" font-size="{letters}"'
        rows += [
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}" rx="7" fill="{fill}" stroke="{line}"/>',
            f'<text {text} fill="#0f172a">{room}</text>',
        ]
    return rows


def _size(room: str, width: float) -> int:
    """The largest size of letters, up to 15, in which a name fits its box."""
    return min(15, int((width - 6) / (0.6 * len(room))))


def _is_there(room: str) -> bool:
    return (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
