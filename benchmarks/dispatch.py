"""What the framework costs per message, from the in-process queue to the handler and back.

The raw twin takes the same messages from an asyncio.Queue, decodes them in the same way and awaits
the same handler, in one task. The difference in time per message is the framework's.
"""

from __future__ import annotations

import asyncio
import statistics

from benchmarks.rounds import Contender, Stopwatch, compare
from streamtools import Consumer, Message
from streamtools.codec import decode, encode
from streamtools.message import id_generator

MESSAGES = 20_000
URL = f"asyncio://bench?maxsize={MESSAGES + 1}"
PAYLOAD = {"id": 1, "customer": "Ada", "lines": [{"sku": "A-1", "quantity": 2}], "note": "x" * 128}


class Counter:
    """A handler that counts, and says when it has seen all."""

    def __init__(self) -> None:
        self.left = MESSAGES
        self.done = asyncio.Event()

    async def handle(self, payload: object) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()


def _messages() -> list[Message]:
    new_id = id_generator()
    body, content_type = encode(PAYLOAD)
    return [Message(body=body, queue="bench", id=new_id(), content_type=content_type) for _ in range(MESSAGES)]


async def _framework(concurrency: int) -> tuple[int, float, float]:
    counter = Counter()
    consumer = Consumer("bench", url=URL, concurrency=concurrency)
    await consumer.open()
    messages = _messages()
    for message in messages:
        consumer._queues[0].put(message)  # the send side is not what is measured
    handler = consumer()(counter.handle)
    with Stopwatch() as watch:
        loop = asyncio.create_task(handler())
        await counter.done.wait()
    consumer.stop()
    await loop
    return MESSAGES, watch.wall, watch.cpu


async def _raw() -> tuple[int, float, float]:
    counter = Counter()
    queue: asyncio.Queue[Message] = asyncio.Queue()
    for message in _messages():
        queue.put_nowait(message)

    async def loop() -> None:
        while counter.left:
            message = await queue.get()
            await counter.handle(decode(message))

    with Stopwatch() as watch:
        await loop()
    return MESSAGES, watch.wall, watch.cpu


def main() -> None:
    """Print the table and the framework's microseconds per message."""
    contenders = [
        Contender("streamtools, concurrency 1", lambda: asyncio.run(_framework(1))),
        Contender("streamtools, concurrency 8", lambda: asyncio.run(_framework(8))),
        Contender("raw asyncio.Queue", lambda: asyncio.run(_raw())),
    ]
    compare("Dispatch: in-process queue to handler and back", contenders)
    raw = 1e6 / statistics.median(contenders[-1].rates)
    for contender in contenders[:-1]:
        cost = 1e6 / statistics.median(contender.rates) - raw
        print(f"{contender.name}: {cost:.1f} us of framework per message (budget: 10)")


if __name__ == "__main__":
    main()
