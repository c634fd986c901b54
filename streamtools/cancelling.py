"""Telling our own cancellation from a stray one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from streamtools.errors import ConnectionLost

T = TypeVar("T")


def asked_to_stop() -> bool:
    """Someone cancelled the running task; else a CancelledError in it is not meant for it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def guard(work: Awaitable[T]) -> T:
    """Await what a driver does; a client library that cancels its callers has lost its connection.

    Raises:
        ConnectionLost: it was cancelled, and not by us.
    """
    try:
        return await work
    except asyncio.CancelledError as error:
        if asked_to_stop():
            raise
        raise ConnectionLost("The client library gave up what was under way.") from error
