"""Installation: how this package was installed, and so the line that adds one of its extras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

#: The distribution's name on a package index. `streamtools` is another project's there.
DISTRIBUTION: Final = "streamtools-asyncio"


def install_line(extra: str) -> str:
    """The line that installs what `extra` brings, from where this package came.

    A bare `pip install "streamtools[...]"` would install another project of that name.

    Parameters:
        extra: one of the extras in pyproject.toml, such as `kafka`.

    Source: PEP 610, direct_url.json.
    """
    from importlib import metadata  # a fifth of the import time of streamtools; asked for by errors alone

    try:
        origin = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # not installed: imported from its source
        return _from_folder(Path(__file__).resolve().parents[2], extra)
    return _from_origin(json.loads(origin), extra) if origin else _install(f"{DISTRIBUTION}[{extra}]")


def _from_origin(origin: dict[str, Any], extra: str) -> str:
    url = urlsplit(origin["url"])
    if url.scheme == "file":
        path = Path(url2pathname(url.path))
        return _from_folder(path, extra, editable=origin.get("dir_info", {}).get("editable", False))
    # Without a user and password, which a URL of an installer may hold.
    address = urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))
    if version_control := origin.get("vcs_info"):
        address = f"{version_control['vcs']}+{address}@{version_control['commit_id']}"
    return _install(f"{DISTRIBUTION}[{extra}] @ {address}")


def _from_folder(path: Path, extra: str, *, editable: bool = False) -> str:
    """From a clone or a file on this machine."""
    return _install(f"{path}[{extra}]", option="-e " if editable else "")


def _install(what: str, option: str = "") -> str:
    return f'pip install {option}"{what}"'
