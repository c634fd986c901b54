"""For tests: `Harness` runs a service's real handlers, `ConformanceSuite` tests a driver.

`Harness` needs only streamtools; `ConformanceSuite` needs the extra `testing`.
"""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from streamtools.testing.harness import Harness
from streamtools.testing.waiting import eventually
from streamtools.text.installation import install_line

if TYPE_CHECKING:
    from streamtools.testing.conformance import ConformanceSuite

__all__ = ["ConformanceSuite", "Harness", "eventually"]

#: The packages of the extra that the suite needs.
PACKAGES: Final = ("pytest", "pytest_asyncio")
_SUITE: Final = "streamtools.testing.conformance"


def __getattr__(name: str) -> Any:
    if name == "ConformanceSuite":  # imported at its first use, because it needs pytest
        missing = [package for package in PACKAGES if find_spec(package) is None]
        if missing:
            raise ModuleNotFoundError(
                f"ConformanceSuite needs {' and '.join(missing)}, not installed here. "
                f"Install the extra: {install_line('testing')}",
                name=missing[0],
            )
        import pytest  # noqa: PLC0415

        if _SUITE not in sys.modules:
            pytest.register_assert_rewrite(_SUITE)
        from streamtools.testing.conformance import ConformanceSuite  # noqa: PLC0415

        return ConformanceSuite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
