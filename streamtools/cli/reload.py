"""Notices changed .py files by their modification times."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

#: Seconds between two checks.
POLL_INTERVAL: Final = 0.5
#: Directories that contain no sources of the user.
SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages", "build", "dist"})

Stamps = dict[str, int]


async def changes(directory: Path) -> AsyncIterator[str]:
    """Yield the name of a file under `directory` whenever one is changed, added or removed; never end."""
    before = await asyncio.to_thread(_stamps, directory)
    while True:
        # We poll, because notifications of changes would need another package on each operating system.
        await asyncio.sleep(POLL_INTERVAL)
        now = await asyncio.to_thread(_stamps, directory)
        if now != before:
            changed = sorted({name for name, _ in now.items() ^ before.items()})
            before = now
            yield changed[0].removeprefix(f"{directory}/")


def _stamps(directory: Path) -> Stamps:
    return {entry.path: entry.stat().st_mtime_ns for entry in _sources(str(directory)) if entry.is_file()}


def _sources(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith(".") and entry.name not in SKIPPED and not _is_environment(entry.path):
                    yield from _sources(entry.path)
            elif entry.name.endswith(".py"):
                yield entry


def _is_environment(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, "pyvenv.cfg"))
