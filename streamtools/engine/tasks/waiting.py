"""Waits for an event for some time."""

from __future__ import annotations

import asyncio


async def is_set_within(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait until the event is set; return False if the seconds are over first. None waits without a limit."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
