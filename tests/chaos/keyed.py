"""A consumer in order of the keys, as a process of its own: `python -m tests.chaos.keyed URL QUEUE RECORD OPTIONS`.

RECORD, which all processes share, gets a line when a handler begins and one when it ends, in the order in which they
did: the kernel keeps it, whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from streamtools import ConsumerFactory, ConsumerRunner, Message


def service(url: str, queue: str, record: str, *, nap: float = 0.001, **options: Any) -> ConsumerFactory:
    """The consumer; it writes down key and number."""
    lines = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    consumers = ConsumerFactory(url=url, **options)

    @consumers.route(queue)
    async def work(number: int, message: Message) -> None:
        os.write(lines, f"begin {os.getpid()} {message.key} {number}\n".encode())
        await asyncio.sleep(nap)
        os.write(lines, f"end {os.getpid()} {message.key} {number}\n".encode())

    return consumers


if __name__ == "__main__":
    url, queue, record, options = sys.argv[1:]
    ConsumerRunner(service(url, queue, record, **json.loads(options))).run()
