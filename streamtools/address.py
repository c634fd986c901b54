"""The address that holds when none is given. It and `settings` are the only readers of the environment."""

from __future__ import annotations

import os
from typing import Final

URL_VARIABLE: Final = "STREAMTOOLS_URL"
#: The embedded default: a file in the working directory.
DEFAULT_URL: Final = "sqlite:///streamtools.db"


def default_url() -> str:
    """`STREAMTOOLS_URL`, or the embedded default."""
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL
