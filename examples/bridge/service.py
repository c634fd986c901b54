"""Sends over HTTP and consumes from Kafka, as a pair, with bridge.py between. Run it: python service.py"""

from __future__ import annotations

import asyncio
from typing import Any

from streamtools import ConsumerRunner, HandlerFactory, Message

queues = {
    "queue_1": {
        "name": "queue_1",
        "consumer_loop": "KafkaHandler",
        "producer": "HTTPHandler",
    }
}
pairs = HandlerFactory(queues)
handled: asyncio.Queue[Message] = asyncio.Queue()


@pairs["queue_1"].consumer()
async def handle(msg: Any, message: Message) -> None:
    """Handle a message that has come through the bridge."""
    print(f"handled {msg} of {message.headers['shop']}, key {message.key}")
    await handled.put(message)


async def main() -> None:
    """Send three messages, and end when all have arrived."""
    producer = pairs["queue_1"].producer
    async with ConsumerRunner(pairs):
        sent = {(await producer.send({"id": id}, key="k-1", headers={"shop": "north"})).id for id in (1, 2, 3)}
        while sent:
            sent.discard((await handled.get()).id)


if __name__ == "__main__":
    asyncio.run(main())
