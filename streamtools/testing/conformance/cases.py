"""The base of all cases: the fixtures, and the rules by which a protocol's Features exclude cases."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
import pytest_asyncio

from streamtools.consumer import CONSUMER_LOOPS
from streamtools.features import Features
from streamtools.testing.conformance.stage import Stage

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

Case = TypeVar("Case", bound=Callable[..., Any])


def needs(*names: str) -> Callable[[Case], Case]:
    """Skip this case if one of these Features is False."""

    def mark(case: Case) -> Case:
        case.needs = names  # type: ignore[attr-defined]
        return case

    return mark


def except_with(name: str, why: str) -> Callable[[Case], Case]:
    """Skip this case if this Feature is True."""

    def mark(case: Case) -> Case:
        case.excluded = {**getattr(case, "excluded", {}), name: why}  # type: ignore[attr-defined]
        return case

    return mark


class Cases:
    """Fixtures for every case."""

    #: The driver's name in the registries.
    protocol: ClassVar[str] = ""
    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [pytest.mark.asyncio]

    @property
    def features(self) -> Features:
        """The features of the protocol."""
        return CONSUMER_LOOPS[self.protocol].features

    @pytest.fixture
    def url(self) -> str | ProtocolSettings:
        """The address of the broker. Write this fixture in your class."""
        raise TypeError(f"{type(self).__name__} does not say where its broker is: write a fixture named url.")

    @pytest.fixture
    def queue(self) -> str:
        """A queue name that no other case uses."""
        return f"orders-{secrets.token_hex(4)}"

    @pytest_asyncio.fixture
    async def stage(self, url: str | ProtocolSettings, queue: str) -> AsyncIterator[Stage]:
        """The stage, with which a case opens, sends and receives."""
        stage = Stage(self.protocol, url, queue)
        yield stage
        await stage.close()

    @pytest.fixture(autouse=True)
    def _skip_what_features_exclude(self, request: pytest.FixtureRequest) -> None:
        features = self.features  # this imports the driver's module here, outside the event loop
        for name in getattr(request.function, "needs", ()):
            if not getattr(features, name):
                pytest.skip(f"{self.protocol!r} says {name}=False")
        for name, why in getattr(request.function, "excluded", {}).items():
            if getattr(features, name):
                pytest.skip(f"{self.protocol!r} says {name}=True: {why}")
