"""Reads spans of time, sizes and places as people type them: 90s, 7d, 1.5GB, beginning, 2h."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from streamtools.errors import ConfigurationError

if TYPE_CHECKING:
    from streamtools.queues import Place

SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
BYTES: Final = {
    "": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40
}  # fmt: skip
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d+)?) *([a-zA-Z]*)")
#: The words for no limit.
FOREVER: Final = "forever"
UNLIMITED: Final = "unlimited"


def seconds(text: str) -> float:
    """Return the seconds of a text such as `90s`, `30min`, `12h`, `7d`, `2w`, or `forever`.

    Raises:
        ConfigurationError: the text is not a span of time.
    """
    return math.inf if text == FOREVER else _amount(text, SECONDS, f"90s, 30min, 12h, 7d, 2w or {FOREVER}")


def size(text: str) -> float:
    """Return the whole bytes of a text such as `500`, `64MB`, `1.5GiB`, or `unlimited`.

    Raises:
        ConfigurationError: the text is not a size.
    """
    return math.inf if text == UNLIMITED else int(_amount(text, BYTES, f"64MB, 1.5GiB, 5000 or {UNLIMITED}"))


def place(text: str) -> Place:
    """Read a place: `beginning`, `end`, an offset (`1200`), a time (`2026-01-31T08:00`), or how long ago (`2h`).

    Raises:
        ConfigurationError: the text is not a place.
    """
    if text == "beginning":
        return "beginning"
    if text == "end":
        return "end"
    if text.isdecimal():
        return int(text)
    try:
        return datetime.fromisoformat(text).astimezone()  # a time without a zone is local
    except ValueError:
        pass
    known = "beginning, end, an offset, a time (2026-01-31T08:00) or how long ago (2h)"
    return datetime.now(UTC) - timedelta(seconds=_amount(text, SECONDS, known))


def show_size(number: float) -> str:
    """Return a number of bytes as people read it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:g} bytes"


def _amount(text: str, units: Mapping[str, int], known: str) -> float:
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2].lower() not in units:
        raise ConfigurationError(f"{text!r} cannot be read: write {known}.")
    return float(found[1]) * units[found[2].lower()]
