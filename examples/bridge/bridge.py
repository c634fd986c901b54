"""HTTP in, Kafka out. Run it: python bridge.py"""

from __future__ import annotations

from streamtools import HTTP, KAFKA, PRODUCERS, ConsumerFactory, ConsumerRunner, Message

consumers = ConsumerFactory(HTTP, concurrency=32)
queue_1 = PRODUCERS[KAFKA]("queue_1", client_id="bridge")


@consumers.route("queue_1")
async def pass_on(msg: Message) -> None:
    """Send the message to Kafka. The request is answered when Kafka holds it; otherwise the sender tries again."""
    await queue_1.send_messages([msg.replace(attempt=1)])


if __name__ == "__main__":
    ConsumerRunner(consumers, queue_1).run()
