"""A driver that keeps its client for the whole process: it belongs to the event loop that it was made in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer
from streamtools.message import Message
from streamtools.receipt import Receipt


class CachedProducer(SQLiteProducer, protocol="cached"):
    #: What every client library has inside: something that is bound to a loop as it is first waited for.
    client: ClassVar[asyncio.Queue[None] | None] = None

    async def _send(self, batch: Sequence[Message], options: Any) -> Sequence[Receipt]:
        client = CachedProducer.client = CachedProducer.client or asyncio.Queue()
        asyncio.get_running_loop().call_soon(client.put_nowait, None)
        await client.get()
        return await super()._send(batch, options)


class CachedConsumer(SQLiteConsumer, protocol="cached"):
    pass
