"""What another process does: `python -m tests.drivers.sqlite.process consume URL ...`.

It says on its standard output what it has done, one line each, so that a test knows it when it dies.
"""

from __future__ import annotations

import asyncio
import os
import sys

from streamtools.drivers.sqlite import SQLiteConsumer, SQLiteProducer


def say(text: object) -> None:
    os.write(1, f"{text}\n".encode())


async def consume(url: str, prefetch: str, pause: str) -> None:
    """Handle messages until killed; says each body."""
    consumer = SQLiteConsumer("orders", url=url, prefetch=int(prefetch))

    @consumer()
    async def handle(body: bytes) -> None:
        await asyncio.sleep(float(pause))
        say(body.decode())

    await handle()


async def hold(url: str, number: str) -> None:
    """Take messages into hand and keep them; says how many."""
    async with SQLiteConsumer("orders", url=url) as consumer:
        say(len(await consumer.receive(int(number))))
        await asyncio.Event().wait()


async def produce(url: str, size: str) -> None:
    """Send batches until killed; says each id once it is confirmed."""
    async with SQLiteProducer("orders", url=url) as producer:
        while True:
            receipts = await producer.send_many([b"x" * 256] * int(size))
            say("\n".join(receipt.id for receipt in receipts))


async def send(url: str, body: str) -> None:
    """Send one message once a line has come in."""
    async with SQLiteProducer("orders", url=url) as producer:
        say("ready")
        await asyncio.to_thread(sys.stdin.readline)
        await producer.send(body)


async def fork(url: str) -> None:
    """Use a producer in a forked child, and in the parent afterwards."""
    async with SQLiteProducer("orders", url=url) as producer:
        await producer.send("before")
        child = os.fork()
        if child == 0:
            asyncio.run(_in_child(producer))
            os._exit(0)
        await asyncio.to_thread(os.waitpid, child, 0)
        await producer.send("after")


async def _in_child(producer: SQLiteProducer) -> None:
    await producer.send("child")
    await producer.close()


if __name__ == "__main__":
    COMMANDS = {"consume": consume, "hold": hold, "produce": produce, "send": send, "fork": fork}
    asyncio.run(COMMANDS[sys.argv[1]](*sys.argv[2:]))  # type: ignore[operator]
