"""A service in a process: `python -m tests.bus.service URL QUEUE [hang]`; says `ready`, then what it handles."""

from __future__ import annotations

import asyncio
import sys
import time

from streamtools import Bus, ConsumerRunner, MessageContext, Retry
from tests.bus.contracts import OrderPlaced, PlaceOrder, Quote

bus = Bus(sys.argv[2], url=sys.argv[1], concurrency=20, retry=Retry(retries=3, delay=0.05))


@bus.handler
async def quote(command: Quote) -> int:
    await asyncio.sleep(0.001)
    return command.id * 2


@bus.handler
async def place(command: PlaceOrder, context: MessageContext) -> None:
    print(f"placed {command.id} {context.message.deliver_at} {time.time()}", flush=True)


@bus.handler
async def works(event: OrderPlaced, context: MessageContext) -> None:
    print(f"works {event.id} {context.attempt}", flush=True)


@bus.handler
async def fails(event: OrderPlaced, context: MessageContext) -> None:
    print(f"fails {event.id} {context.attempt}", flush=True)
    if context.attempt == 1:
        raise ValueError("once")
    if "hang" in sys.argv:
        await asyncio.Event().wait()


async def main() -> None:
    """Serve, and say so once the queue is there and consumed."""
    runner = ConsumerRunner(bus)
    serving, ready = asyncio.create_task(runner.serve()), asyncio.create_task(runner.ready())
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if ready.done():
        print("ready", flush=True)
    ready.cancel()
    await serving


if __name__ == "__main__":
    asyncio.run(main())
