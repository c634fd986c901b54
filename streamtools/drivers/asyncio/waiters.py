"""Lets tasks of several event loops wait in one line: a deque of their futures."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

Line = deque["asyncio.Future[None]"]


def stand_in(line: Line) -> asyncio.Future[None]:
    """Add a future of the running loop to the line, and return it."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    line.append(waiter)
    return waiter


async def wait_for(waiter: asyncio.Future[None], line: Line) -> None:
    try:
        await waiter
    except asyncio.CancelledError:
        if waiter.done() and not waiter.cancelled():
            wake(line)  # this task was woken, but is cancelled: wake the next one
        raise


def wake(line: Line) -> None:
    """Wake the first task that waits, in any event loop; skip tasks whose loop is closed."""
    while line:
        running = asyncio.get_running_loop()
        try:
            waiter = line.popleft()
        except IndexError:  # another thread was faster
            return
        loop = waiter.get_loop()
        if loop is running and not waiter.done():
            waiter.set_result(None)
            return
        if loop is not running and call_in(loop, _wake_there, waiter, line):
            return


def _wake_there(waiter: asyncio.Future[None], line: Line) -> None:
    if waiter.done():
        wake(line)
    else:
        waiter.set_result(None)


def wake_all(line: Line) -> None:
    for _ in range(len(line)):
        wake(line)


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Call a function in an event loop; return False if that loop is closed."""
    if loop is asyncio.get_running_loop():
        function(*arguments)
        return True
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True
