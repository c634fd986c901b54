"""How the servers of the tests end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection


async def end_server(server: asyncio.Server, tasks: Collection[asyncio.Task[None]]) -> None:
    """Take no more connections, and end the tasks that serve those there are."""
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
