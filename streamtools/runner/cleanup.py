"""CleanupStack: runs actions at the end; all of them run, even if some fail or hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


class CleanupStack:
    """Actions to run at the end; the last one that was added runs first."""

    def __init__(self) -> None:
        self._ends: list[tuple[str, Callable[[], Awaitable[Any]], Callable[[], float]]] = []

    def add(self, name: str, end: Callable[[], Awaitable[Any]], limit: Callable[[], float]) -> None:
        """Add an action.

        Parameters:
            name: names the action in an error.
            end: the action.
            limit: called when the action begins; returns the seconds that it may take.
        """
        self._ends.append((name, end, limit))

    async def run(self) -> list[BaseException]:
        """Run all actions, even if one fails or takes too long, and return the errors."""
        errors: list[BaseException] = []
        while self._ends:
            name, end, limit = self._ends.pop()
            try:
                await _within(limit(), name, end)
            except (Exception, asyncio.CancelledError) as error:
                errors.append(error)
        return errors


async def _within(seconds: float, name: str, end: Callable[[], Awaitable[Any]]) -> None:
    try:
        async with asyncio.timeout(seconds) as limit:
            await end()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise TimeoutError(f"{name} did not end within {seconds:.3g} s, and was cancelled.") from error


def raise_all(errors: Sequence[BaseException], several: str) -> None:
    """Raise the errors: a single error itself, several as a group.

    Parameters:
        several: the text of the group.
    """
    for error in errors:
        if isinstance(error, asyncio.CancelledError):
            raise error
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BaseExceptionGroup(several, errors)
