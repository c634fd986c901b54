"""Waiting for what can only be looked at, with a deadline; never for a length of time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sized
from typing import Final

#: Seconds after which what should have happened has not; long, for busy machines.
TIMEOUT: Final = 30.0
#: Seconds between two looks.
POLL_INTERVAL: Final = 0.005


async def eventually(
    condition: Callable[[], object | Awaitable[object]], what: str = "", *, timeout: float = TIMEOUT
) -> None:
    """Wait until `condition()` is true; the look in between costs 5 ms.

    Parameters:
        condition: a function, `def` or `async def`.
        what: named in the error.
        timeout: seconds.

    Raises:
        TimeoutError: it has not become true.
    """
    try:
        async with asyncio.timeout(timeout):
            while not await _holds(condition):  # noqa: ASYNC110 - there is nothing else to wait for
                await asyncio.sleep(POLL_INTERVAL)
    except TimeoutError:
        raise TimeoutError(f"Not true after {timeout:g} s: {what or _source(condition)}") from None


async def reaches(items: Sized, number: int, what: str = "items") -> None:
    """Wait until `items` holds so many.

    Raises:
        TimeoutError: it holds fewer.
    """
    await eventually(lambda: len(items) >= number, f"{number} {what}")


async def _holds(condition: Callable[[], object | Awaitable[object]]) -> bool:
    answer = condition()
    return bool(await answer if isinstance(answer, Awaitable) else answer)


def _source(condition: Callable[..., object]) -> str:
    code = getattr(condition, "__code__", None)  # not the text itself: reading the file would block
    return repr(condition) if code is None else f"the condition at {code.co_filename}:{code.co_firstlineno}"
