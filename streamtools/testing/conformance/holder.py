"""A process that takes messages into hand, and keeps them until it is killed.

`python -m streamtools.testing.conformance.holder MODULE PROTOCOL URL QUEUE NUMBER by_hand|in_handlers`
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys

from streamtools.consumer import CONSUMER_LOOPS
from streamtools.delivery import Delivery


async def hold(protocol: str, url: str, queue: str, number: int, how: str) -> None:
    """Take `number` messages into hand, print a line about it, and keep them."""
    consumer = CONSUMER_LOOPS[protocol](
        queue, url=url, concurrency=number, prefetch=number, error_queue="{queue}.error"
    )
    held: list[object] = []

    async def keep(msg: object) -> None:
        held.append(msg)
        if len(held) == number:
            os.write(1, b"holding\n")
        await asyncio.Event().wait()

    if how == "in_handlers":
        await consumer.run(consumer()(keep))
    await consumer.open()
    taken: list[Delivery] = []
    while len(taken) < number:
        taken += await consumer.receive(number - len(taken))
    os.write(1, b"holding\n")
    await asyncio.Event().wait()


def main() -> None:
    """Read the command line, and hold messages."""
    module, *words = sys.argv[1:]
    importlib.import_module(module)
    asyncio.run(hold(words[0], words[1], words[2], int(words[3]), words[4]))


if __name__ == "__main__":
    main()
