"""Waiting for what can only be looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def wait_until(
    condition: Callable[[], bool | Awaitable[bool]], *, timeout: float = 30, poll: float = 0.01
) -> None:
    """Wait for what only can be looked at: a depth, a state. Never a sleep in its place.

    Raises:
        TimeoutError: naming the condition.
    """
    try:
        async with asyncio.timeout(timeout):
            while not await _holds(condition):
                await asyncio.sleep(poll)
    except TimeoutError:
        raise TimeoutError(f"not true after {timeout:g} s: {condition.__qualname__}") from None


async def _holds(condition: Callable[[], bool | Awaitable[bool]]) -> bool:
    answer = condition()
    return answer if isinstance(answer, bool) else await answer
