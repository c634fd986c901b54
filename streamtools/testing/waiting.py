"""Waits for conditions that can only be checked again and again; a test should never sleep for a fixed time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sized
from typing import Final

#: After this many seconds a condition has failed; it is long, because machines may be busy.
TIMEOUT: Final = 30.0
#: Seconds between two checks.
POLL_INTERVAL: Final = 0.005


async def eventually(
    condition: Callable[[], object | Awaitable[object]], what: str = "", *, timeout: float = TIMEOUT
) -> None:
    """Wait until `condition()` is true; check it every 5 ms.

    Parameters:
        condition: a function, `def` or `async def`.
        what: names the condition in the error.
        timeout: the most seconds to wait.

    Raises:
        TimeoutError: the condition has not become true.
    """
    try:
        async with asyncio.timeout(timeout):
            while not await _holds(condition):  # noqa: ASYNC110 - there is nothing else to wait for
                await asyncio.sleep(POLL_INTERVAL)
    except TimeoutError:
        raise TimeoutError(f"Not true after {timeout:g} s: {what or _source(condition)}") from None


async def reaches(items: Sized, number: int, what: str = "items") -> None:
    """Wait until `items` has at least `number` items.

    Raises:
        TimeoutError: it still has fewer.
    """
    await eventually(lambda: len(items) >= number, f"{number} {what}")


async def _holds(condition: Callable[[], object | Awaitable[object]]) -> bool:
    answer = condition()
    return bool(await answer if isinstance(answer, Awaitable) else answer)


def _source(condition: Callable[..., object]) -> str:
    code = getattr(condition, "__code__", None)  # names the line only, because reading the file would block
    return repr(condition) if code is None else f"the condition at {code.co_filename}:{code.co_firstlineno}"
