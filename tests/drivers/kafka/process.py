"""What another process does: `python -m tests.drivers.kafka.process exactly HOST ...`.

Several may write one history: each line is appended whole, so the file's order is the order of events.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable

from streamtools.drivers.kafka import KafkaConsumer, KafkaProducer
from streamtools.settings import KafkaSettings

#: Seconds after which the group counts a killed member as dead.
SESSION = 3.0


def settings(bootstrap: str) -> KafkaSettings:
    return KafkaSettings(host=bootstrap, session_timeout=SESSION)


def writer(path: str) -> Callable[[str], None]:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(line: str) -> None:
        os.write(file, f"{line}\n".encode())

    return write


async def exactly(bootstrap: str, queue: str, out: str, history: str) -> None:
    """Send each number on, in the transaction of its message."""
    write, name = writer(history), os.getpid()
    consumer = KafkaConsumer(
        queue, url=settings(bootstrap), concurrency=8, exactly_once=True, revoke_timeout=5, prefetch=50
    )
    async with KafkaProducer(out, url=settings(bootstrap)) as producer:

        @consumer()
        async def handle(msg: int) -> None:
            await asyncio.sleep(random.uniform(0, 0.01))
            await producer.send(msg)
            write(f"handled {name} - {msg}")

        await consumer.run(handle, on_started=lambda: write(f"up {name} - 0"))


async def plainly(bootstrap: str, queue: str, history: str) -> None:
    """Handle each number, one after the other."""
    write, name = writer(history), os.getpid()
    consumer = KafkaConsumer(queue, url=settings(bootstrap), error_queue="{queue}.error", revoke_timeout=5)

    @consumer()
    async def handle(msg: int) -> None:
        await asyncio.sleep(0.02)
        write(f"handled {name} - {msg}")

    await consumer.run(handle, on_started=lambda: write(f"up {name} - 0"))


if __name__ == "__main__":
    asyncio.run({"exactly": exactly, "plainly": plainly}[sys.argv[1]](*sys.argv[2:]))
