"""Connections: what a bus has open in one event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamtools.bus.requests import Requests

if TYPE_CHECKING:
    from streamtools.admin import QueueAdmin
    from streamtools.consumer import Consumer
    from streamtools.runner import ConsumerRunner


class Connections:
    """What a bus has open in one event loop, beside the producer that it sends by.

    Attributes:
        requests: the reply queue, and the requests that wait for a reply.
        admin: creates queues and bindings; None until it is needed.
        runner: runs the handlers between `start` and `stop`.
        pulling: the consumers that `receive` uses, by queue.
        opening_admin: held while the administrator connects.
        starting: held while the bus starts or stops.
    """

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.admin: QueueAdmin | None = None
        self.runner: ConsumerRunner | None = None
        self.pulling: dict[str, Consumer] = {}
        self.opening_admin: asyncio.Lock = asyncio.Lock()
        self.starting: asyncio.Lock = asyncio.Lock()

    async def close(self) -> None:
        """Close all but the runner. Safe to repeat."""
        pulling, self.pulling = self.pulling, {}
        admin, self.admin = self.admin, None
        await self.requests.close()
        for consumer in pulling.values():
            await consumer.close()
        if admin is not None:
            await admin.close()
